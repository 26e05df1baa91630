"""One VMA at a time: the PROCMAP_QUERY ioctl of /proc/PID/maps (Linux 6.11).

A stop window may not parse tens of thousands of lines while a program stands still. Where the ioctl
is missing, the whole of maps is read once per :class:`VmaQuery` and searched.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from bisect import bisect_right
from collections.abc import Iterator
from typing import Final

from ksmd.kernel import procfs
from ksmd.kernel.taskfile import TaskFile
from ksmd.model.vma import Vma

# struct procmap_query, include/uapi/linux/fs.h
_QUERY: Final = struct.Struct("=9Q4I2Q")
_PROCMAP_QUERY: Final = 3 << 30 | _QUERY.size << 16 | ord("f") << 8 | 17
_EXECUTABLE: Final = 4
_SHARED: Final = 8
#: The four letters of maps by the lowest flags: 1 read, 2 write, then the two above.
_PERMS: Final = tuple(
    "".join(letters[flags >> bit & 1] for bit, letters in enumerate(("-r", "-w", "-x", "ps")))
    for flags in range(16)
)
_OR_NEXT: Final = 0x10
_FILE_BACKED: Final = 0x20
_PATH_SIZE: Final = 4096


class _NoQueryError(Exception):
    """The kernel does not have the ioctl."""


class VmaQuery(TaskFile):
    """VMAs of *pid* by address, through thread *tid*; true while the target is stopped."""

    def __init__(self, pid: int, tid: int) -> None:
        super().__init__(pid, "maps", tid=tid)
        self._all: list[Vma] | None = None
        self._last: Vma | None = None

    def covering(self, address: int) -> Vma | None:
        """Give the VMA that holds *address*, without path and flags; None for a hole."""
        if self._last is not None and self._last.start <= address < self._last.end:
            return self._last
        self._last = self._search(address) if self._all is not None else self._ask(address)
        return self._last

    def files(self, *, shared: bool = False, executable: bool = False) -> Iterator[Vma]:
        """Give the mappings of files, with path, only shared or executable ones where asked for.

        The kernel passes over all others.
        """
        flags = _FILE_BACKED | (_SHARED if shared else 0) | (_EXECUTABLE if executable else 0)
        address = 0
        while self._all is None:
            try:
                vma = self._query(address, flags | _OR_NEXT, path=True)
            except _NoQueryError:
                self._search(0)
                break
            if vma is None:
                return
            yield vma
            address = vma.end
        for vma in self._all or ():
            wanted = vma.inode and "s" * shared in vma.perms and "x" * executable in vma.perms
            if wanted and vma.end > address:
                yield vma

    def _ask(self, address: int) -> Vma | None:
        try:
            return self._query(address)
        except _NoQueryError:
            return self._search(address)

    def _query(self, address: int, flags: int = 0, *, path: bool = False) -> Vma | None:
        name = ctypes.create_string_buffer(_PATH_SIZE) if path else None
        size, at = (_PATH_SIZE, ctypes.addressof(name)) if name is not None else (0, 0)
        query = bytearray(
            _QUERY.pack(_QUERY.size, flags, address, *([0] * 6), 0, 0, size, 0, at, 0)
        )
        try:
            fcntl.ioctl(self._fd, _PROCMAP_QUERY, query)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return None
            if error.errno in (errno.ENOTTY, errno.EINVAL):
                raise _NoQueryError from error
            raise procfs.translate(error, f"process {self.pid}") from error
        _, _, _, start, end, found, _, offset, inode, major, minor, *_ = _QUERY.unpack(query)
        text = os.fsdecode(name.value) if name is not None else ""
        return Vma(start, end, _PERMS[found & 15], offset, (major, minor), inode, text)

    def _search(self, address: int) -> Vma | None:
        if self._all is None:
            self._all = procfs.maps(self.pid, self.tid)
        at = bisect_right(self._all, address, key=lambda vma: vma.start) - 1
        return self._all[at] if at >= 0 and address < self._all[at].end else None
