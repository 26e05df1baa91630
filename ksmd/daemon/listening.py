"""Take over the path of the control socket, or find that another daemon has it.

A path is free when nobody listens behind it. Whether somebody does is found by connecting, which
leaves a live daemon as it was; looking, removing and binding are one step under a lock of the
directory, so that of two daemons that start together exactly one wins.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import grp
import os
import socket
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from ksmd.kernel.sdnotify import Inherited
from ksmd.model.errors import KsmdError, PrivilegeError, UsageError

#: FileDescriptorName= of the control socket in its socket unit.
CONTROL_NAME = "control"
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


def group_id(name: str) -> int:
    """Give the number of the group *name*, which may be a number itself."""
    try:
        return int(name) if name.isdecimal() else grp.getgrnam(name).gr_gid
    except KeyError:
        raise UsageError(
            f"socket_group: there is no group {name!r}", "make it, or name another"
        ) from None


def permit(path: Path, identity: tuple[int, int] | None, mode: int, gid: int) -> None:
    """Let others connect: nobody who was not let in before, until all of it is done."""
    try:
        found = path.lstat()
        if (found.st_dev, found.st_ino) == identity:
            os.chmod(path, 0o600)  # noqa: PTH101  (beside its like)
            os.chown(path, -1, gid, follow_symlinks=False)
            os.chmod(path, mode)  # noqa: PTH101
    except OSError as error:
        raise KsmdError(f"{path}: cannot set its group and mode: {error.strerror}") from error


def inherited(descriptors: Iterable[Inherited]) -> socket.socket | None:
    """Take the control socket out of what the service manager gave, if it is there."""
    fds = [given.fd for given in descriptors if given.name == CONTROL_NAME]
    if len(fds) > 1:
        raise UsageError(f"the service manager gave {len(fds)} sockets named {CONTROL_NAME}")
    return inherit(fds[0]) if fds else None


def inherited_path(descriptors: Iterable[Inherited]) -> Path | None:
    """Give the path of that socket, and leave it where it is."""
    for given in descriptors:
        if given.name == CONTROL_NAME:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(given.fd)) as end:
                return Path(end.getsockname())
    return None


def inherit(fd: int) -> socket.socket:
    """Take over a listening socket that the service manager made, non-blocking.

    Its path, mode and owner are the socket unit's matter, and the path is never removed by us.
    """
    try:
        listener = socket.socket(fileno=fd)
        listening = listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise UsageError(f"inherited descriptor {fd} is no socket: {error.strerror}") from error
    if listener.family != socket.AF_UNIX or listener.type != socket.SOCK_STREAM or not listening:
        listener.close()
        raise UsageError(
            f"inherited descriptor {fd} is no listening Unix stream socket",
            "the socket unit needs ListenStream= with a path",
        )
    listener.setblocking(False)
    return listener


def close_socket(listener: socket.socket, path: Path, identity: tuple[int, int] | None) -> None:
    """Close, and remove the path unless another daemon has taken it in the meantime.

    *identity* is None for a path that is not ours to remove.
    """
    if identity is not None:
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
