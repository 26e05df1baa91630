"""One VMA at a time: the PROCMAP_QUERY ioctl of /proc/PID/maps (Linux 6.11).

A stop window may not parse tens of thousands of lines while a program stands still. Where the ioctl
is missing, the whole of maps is read once per :class:`VmaQuery` and searched.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from bisect import bisect_right
from types import TracebackType
from typing import Final

from ksmd.kernel import procfs
from ksmd.model.vma import Vma

# struct procmap_query, include/uapi/linux/fs.h
_QUERY: Final = struct.Struct("=9Q4I2Q")
_PROCMAP_QUERY: Final = 3 << 30 | _QUERY.size << 16 | ord("f") << 8 | 17
_PERMS: Final = ((1, "r"), (2, "w"), (4, "x"))
_SHARED: Final = 8


class VmaQuery:
    """VMAs of *pid* by address, through thread *tid*; true while the target is stopped."""

    def __init__(self, pid: int, tid: int) -> None:
        self._pid = pid
        self._tid = tid
        try:
            self._fd = os.open(procfs.task_path(pid, "maps", tid), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise procfs.translate(error, f"process {pid}") from error
        self._all: list[Vma] | None = None
        self._last: Vma | None = None

    def __enter__(self) -> VmaQuery:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; a second close does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def covering(self, address: int) -> Vma | None:
        """Give the VMA that holds *address*, without path and flags; None for a hole."""
        if self._last is not None and self._last.start <= address < self._last.end:
            return self._last
        self._last = self._search(address) if self._all is not None else self._ask(address)
        return self._last

    def _ask(self, address: int) -> Vma | None:
        query = bytearray(_QUERY.pack(_QUERY.size, 0, address, *([0] * 12)))
        try:
            fcntl.ioctl(self._fd, _PROCMAP_QUERY, query)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return None
            if error.errno in (errno.ENOTTY, errno.EINVAL):
                return self._search(address)
            raise procfs.translate(error, f"process {self._pid}") from error
        _, _, _, start, end, flags, _, offset, inode, major, minor, *_ = _QUERY.unpack(query)
        perms = "".join(letter if flags & bit else "-" for bit, letter in _PERMS)
        perms += "s" if flags & _SHARED else "p"
        return Vma(start, end, perms, offset, (major, minor), inode, "")

    def _search(self, address: int) -> Vma | None:
        if self._all is None:
            self._all = procfs.maps(self._pid, self._tid)
        at = bisect_right(self._all, address, key=lambda vma: vma.start) - 1
        return self._all[at] if at >= 0 and address < self._all[at].end else None
