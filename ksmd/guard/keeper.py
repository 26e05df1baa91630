"""What keeps the store in place when the daemon is gone: locked mappings and pins, held twice.

The guard's rule "a fault means dropped" holds only while every store page stays where it is. The
daemon locks and pins its extents, and its death would undo both: reclaim could then take page table
entries away, and a page that a target never dropped would be answered with zeros. So the pager,
which outlives the daemon, maps and locks every extent too, and holds the daemon's pin rings open.
"""

from __future__ import annotations

import os

from ksmd.kernel import libc


class Keeper:
    """Extents by their inode, and the rings whose registered buffers pin them."""

    def __init__(self) -> None:
        self._extents: dict[int, dict[int, tuple[int, int]]] = {}  # inode -> offset -> place
        self._rings: list[int] = []

    def __len__(self) -> int:
        return len(self._extents)

    def keep(self, fd: int, offset: int, length: int) -> None:
        """Map and lock part of the extent behind *fd*; a second time does nothing. OSError.

        Nothing is answered meanwhile, so parts should be small (16 MiB take some ms).
        """
        parts = self._extents.setdefault(os.fstat(fd).st_ino, {})
        if offset in parts:
            return
        address = libc.mmap(0, length, libc.PROT_READ, libc.MAP_SHARED, fd, offset)
        try:
            libc.mlock(address, length)
        except OSError:
            libc.munmap(address, length)
            raise
        parts[offset] = address, length

    def release(self, inode: int) -> None:
        """Let an extent go that nobody maps any more. Unknown ones are no error."""
        for place in self._extents.pop(inode, {}).values():
            libc.munmap(*place)

    def hold_rings(self, pid: int, fds: list[int]) -> None:
        """Take rings of process *pid* by pidfd_getfd: SCM_RIGHTS does not pass io_uring."""
        pidfd = os.pidfd_open(pid)
        try:
            taken = [libc.pidfd_getfd(pidfd, fd) for fd in fds]
        finally:
            os.close(pidfd)
        for old in self._rings:
            os.close(old)
        self._rings = taken
