"""``ksmctl sysfs --mount DIR``: show ksmd as /sys/kernel/mm/ksm shows KSM.

A directory with KSM's files, for tools that know KSM and not ksmd. It stays until the command is
stopped (SIGINT, SIGTERM) or DIR is unmounted. To have a tool find it in the place of the real one,
and nobody else, mount it over that in the tool's own mount namespace:

    ksmctl sysfs --mount /run/ksmd/sysfs &
    unshare --mount sh -c 'mount --bind /run/ksmd/sysfs /sys/kernel/mm/ksm && exec TOOL'
"""

from __future__ import annotations

import argparse
import errno
import itertools
import os
import stat
import time
from pathlib import Path
from typing import Any

from ksmd.cli import sysfs_files
from ksmd.client import Client
from ksmd.model.errors import KsmdError, UsageError

HELP = "show ksmd in a directory shaped as /sys/kernel/mm/ksm"

#: As sysfs: one page, whatever is in it.
_SIZE = 4096
_TIMEOUT = 60.0
#: Writing 2 to run lasts until everything is unmerged, as it does with KSM.
_WRITE_TIMEOUT = 600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to mount."""
    parser.add_argument(
        "--mount", metavar="DIR", type=Path, required=True, help="the directory to mount it on"
    )


def run(args: argparse.Namespace) -> int:
    """Serve until stopped."""
    if not args.mount.is_dir():
        raise UsageError(f"{args.mount} is no directory", f"mkdir -p {args.mount}")
    with Client(args.socket, _TIMEOUT) as ksmd:
        ksmd.call("GetApiVersion")  # say now, and not to each reader, that nobody answers
    fuse = _library()
    mounted: list[str] = []
    try:
        fuse.FUSE(
            _operations(fuse, args.socket, mounted),
            str(args.mount.absolute()),
            raw_fi=True,
            foreground=True,
            fsname="ksmd",
            subtype="sysfs",
            allow_other=True,
            default_permissions=True,
        )
    except RuntimeError as error:
        if mounted:
            return 0  # a signal ended it, and it has been unmounted
        raise KsmdError(
            f"cannot mount on {args.mount} (FUSE says {error})",
            "it takes root, /dev/fuse, and a directory that nothing is mounted on",
        ) from error
    return 0


def _library() -> Any:
    try:
        import mfusepy  # noqa: PLC0415  (an extra; no other verb needs it)
    except ModuleNotFoundError as error:
        raise UsageError(
            "this verb needs the Python package mfusepy", "pip install 'ksmd[sysfs]'"
        ) from error
    except OSError as error:
        raise UsageError(f"this verb needs libfuse: {error}", "apt install fuse3") from error
    return mfusepy


def _operations(fuse: Any, socket: Path | str, mounted: list[str]) -> Any:
    """Make the file system's operations; the base class is known only once libfuse is found.

    *mounted* gets a path when it is in place.
    """
    begun = time.time_ns()
    folder = {"st_mode": stat.S_IFDIR | 0o755, "st_nlink": 2, "st_size": 0}

    class Sysfs(fuse.Operations):  # type: ignore[misc]  # the library has no types for us
        use_ns = True

        def __init__(self) -> None:
            self._handles = itertools.count(1)
            self._shown: dict[int, bytes] = {}  # by handle

        def init(self, path: str) -> None:
            mounted.append(path)

        def create(self, _path: str, _mode: int, _info: object = None) -> int:
            return -errno.EACCES

        def mkdir(self, _path: str, _mode: int) -> int:
            return -errno.EPERM

        def mknod(self, _path: str, _mode: int, _device: int) -> int:
            return -errno.EPERM

        def unlink(self, _path: str) -> int:
            return -errno.EPERM

        def rename(self, _old: str, _new: str, *_flags: int) -> int:
            return -errno.EPERM

        def link(self, _target: str, _source: str) -> int:
            return -errno.EPERM

        def symlink(self, _target: str, _source: str) -> int:
            return -errno.EPERM

        def getattr(self, path: str, _handle: object = None) -> dict[str, Any]:
            times = dict.fromkeys(("st_atime", "st_mtime", "st_ctime"), begun)
            if path == "/":
                return folder | times
            file = sysfs_files.FILES.get(path[1:])
            if file is None:
                raise fuse.FuseOSError(errno.ENOENT)
            mode = stat.S_IFREG | (0o644 if file.write else 0o444)
            return {"st_mode": mode, "st_nlink": 1, "st_size": _SIZE} | times

        def readdir(self, _path: str, _handle: object) -> list[str]:
            return [".", "..", *sysfs_files.FILES]

        def open(self, path: str, info: Any) -> int:
            file = sysfs_files.FILES.get(path[1:])
            if file is None:
                return -errno.ENOENT
            if file.write is None and info.flags & os.O_ACCMODE != os.O_RDONLY:
                return -errno.EACCES  # to root as well, whom the mode does not stop
            info.direct_io = True  # the size is no measure of what can be read
            info.fh = next(self._handles)
            return 0

        def release(self, _path: str, info: Any) -> int:
            self._shown.pop(info.fh, None)
            return 0

        def read(self, path: str, size: int, offset: int, info: Any) -> bytes:
            # a shell's `read` takes one byte at a time: all of them must be of one number
            shown = self._shown.get(info.fh)
            if shown is None or not offset:
                with _translated(fuse), Client(socket, _TIMEOUT) as ksmd:
                    shown = self._shown[info.fh] = sysfs_files.read(path[1:], ksmd)
            return shown[offset : offset + size]

        def write(self, path: str, data: bytes, _offset: int, _info: object) -> int:
            # every write is a value by itself, wherever in the file it lies: `echo 1 >> run`
            with _translated(fuse), Client(socket, _WRITE_TIMEOUT) as ksmd:
                sysfs_files.write(path[1:], data, ksmd)
            return len(data)

        def truncate(self, _path: str, _length: int, _handle: object = None) -> int:
            return 0  # `echo 1 > run` does it, and sysfs does not mind

    return Sysfs()


class _translated:  # noqa: N801  (reads as a statement)
    """Turn what a client raises, and our own OSErrors, into the library's error."""

    def __init__(self, fuse: Any) -> None:
        self._fuse = fuse

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, OSError):
            raise self._fuse.FuseOSError(error.errno or errno.EIO) from error
        if isinstance(error, KsmdError):
            raise self._fuse.FuseOSError(errno.EIO) from error
