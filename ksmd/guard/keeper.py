"""What keeps the store in place when the daemon is gone: locked mappings and pins, held twice.

The guard's rule "a fault means dropped" holds only while every store page stays where it is. The
daemon locks and pins its extents, and its death would undo both: reclaim could then take page table
entries away, and a page that a target never dropped would be answered with zeros. So the pager,
which outlives the daemon, maps and locks every extent too, and holds the daemon's pin rings open.

It also keeps what the next daemon needs to go on: a read-only descriptor of each extent and what
the daemon says about it, without a look into it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

from ksmd.kernel import libc


class Kept:
    """One extent: a descriptor, the daemon's words about it, and the parts that are locked."""

    __slots__ = ("about", "fd", "parts")

    def __init__(self, fd: int, about: dict[str, Any]) -> None:
        self.fd = fd
        self.about = about
        self.parts: dict[int, tuple[int, int]] = {}  # offset -> address, length

    @property
    def offset(self) -> int:
        """Where the first part begins in the file."""
        return min(self.parts)

    @property
    def length(self) -> int:
        """Bytes of all parts."""
        return sum(length for _, length in self.parts.values())


class Keeper:
    """Extents by their inode, and the rings whose registered buffers pin them, by their names."""

    def __init__(self) -> None:
        self._extents: dict[int, Kept] = {}
        self.rings: dict[int, int] = {}  # name -> fd

    def __len__(self) -> int:
        return len(self._extents)

    def __iter__(self) -> Iterator[int]:
        return iter(self._extents)

    @property
    def busy(self) -> bool:
        """Whether anything is held."""
        return bool(self._extents or self.rings)

    def items(self) -> Iterable[tuple[int, Kept]]:
        """Give all extents, by inode."""
        return self._extents.items()

    def extent(self, inode: int) -> Kept | None:
        """Give one extent, None when it has been released."""
        return self._extents.get(inode)

    def keep(self, fd: int, offset: int, length: int, about: dict[str, Any]) -> int:
        """Map and lock part of the extent behind *fd*; a second time does nothing. OSError.

        Give the extent's inode.

        Nothing is answered meanwhile, so parts should be small (16 MiB take some ms). *about* is
        what counts of the first part's message. *fd* stays the caller's.
        """
        inode = os.fstat(fd).st_ino
        kept = self._extents.get(inode)
        if kept is not None and offset in kept.parts:
            return inode
        address = libc.mmap(0, length, libc.PROT_READ, libc.MAP_SHARED, fd, offset)
        try:
            libc.mlock(address, length)
            if kept is None:
                kept = self._extents[inode] = Kept(os.dup(fd), about)
        except OSError:
            libc.munmap(address, length)
            raise
        kept.parts[offset] = address, length
        return inode

    def release(self, inode: int) -> None:
        """Let an extent go that nobody maps any more. Unknown ones are no error."""
        kept = self._extents.pop(inode, None)
        if kept is None:
            return
        for place in kept.parts.values():
            libc.munmap(*place)
        os.close(kept.fd)

    def clear(self) -> None:
        """Let all extents and rings go."""
        for inode in list(self._extents):
            self.release(inode)
        for fd in self.rings.values():
            os.close(fd)
        self.rings.clear()

    def hold_rings(self, pid: int, rings: dict[int, int]) -> None:
        """Hold exactly these rings (name -> descriptor in process *pid*).

        New ones are taken by pidfd_getfd: SCM_RIGHTS does not pass io_uring.
        """
        taken: dict[int, int] = {}
        pidfd = os.pidfd_open(pid)
        try:
            for name, fd in rings.items():
                if name not in self.rings:
                    taken[name] = libc.pidfd_getfd(pidfd, fd)
        except OSError:
            for fd in taken.values():
                os.close(fd)
            raise
        finally:
            os.close(pidfd)
        for name in [name for name in self.rings if name not in rings]:
            os.close(self.rings.pop(name))
        self.rings |= taken
