"""Take over the path of the control socket, or find that another daemon has it.

A path is free when nobody listens behind it. Whether somebody does is found by connecting, which
leaves a live daemon as it was; looking, removing and binding are one step under a lock of the
directory, so that of two daemons that start together exactly one wins.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from ksmd.model.errors import KsmdError, PrivilegeError, UsageError

_BACKLOG = 128


def listen(path: Path) -> tuple[socket.socket, tuple[int, int]]:
    """Listen at *path*, mode 0600, non-blocking. Also give the socket's (device, inode)."""
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        with _locked(path.parent):
            _make_room(path)
            return _bind(path)
    except PermissionError as error:
        raise PrivilegeError(
            f"cannot listen at {path}: {error.strerror}",
            "run ksmd as root, or choose --socket PATH",
        ) from error
    except OSError as error:
        why = error.strerror or str(error)
        raise KsmdError(f"cannot listen at {path}: {why}", "choose --socket PATH") from error


def close_socket(listener: socket.socket, path: Path, identity: tuple[int, int]) -> None:
    """Close, and remove the path unless another daemon has taken it in the meantime."""
    with contextlib.suppress(OSError), _locked(path.parent):
        found = path.lstat()
        if (found.st_dev, found.st_ino) == identity:
            path.unlink()
    listener.close()


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _make_room(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise UsageError(f"{path} exists and is no socket", "choose another --socket PATH")
    if _answers(path):
        raise KsmdError(
            f"another ksmd answers on {path}",
            "stop it first, or give this one a --socket PATH of its own",
        )
    path.unlink()


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except OSError as error:
            # EAGAIN: its queue is full, so there is one
            if error.errno not in {errno.ECONNREFUSED, errno.ENOENT, errno.EAGAIN}:
                raise
            return error.errno == errno.EAGAIN
    return True


def _bind(path: Path) -> tuple[socket.socket, tuple[int, int]]:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        listener.setblocking(False)
        # chmod after bind would leave a moment in which anyone may connect
        before = os.umask(0o177)
        try:
            listener.bind(os.fspath(path))
        finally:
            os.umask(before)
        listener.listen(_BACKLOG)
        found = path.lstat()
    except BaseException:
        listener.close()
        raise
    return listener, (found.st_dev, found.st_ino)
