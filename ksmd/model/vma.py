"""One line of /proc/PID/maps, with its VmFlags from smaps where they were read."""

from __future__ import annotations

from typing import NamedTuple


class Kind(NamedTuple):
    """What a mapping is, wherever it lies; see :class:`Vma`. Of many mappings few are different."""

    perms: str
    device: tuple[int, int]
    inode: int
    path: str
    flags: frozenset[str] = frozenset()


class Vma(NamedTuple):  # as all that is made tens of thousands of: a dataclass takes twice as long
    """A virtual memory area [start, end), in bytes.

    ``perms`` is as in maps ("rw-p"); ``device`` is (major, minor); ``path`` is the last column
    ("" for plain anonymous memory, "[heap]", "[stack]", a file name, ...); ``flags`` holds the
    two-letter VmFlags of smaps (proc_pid_smaps(5)), empty when only maps was read.
    """

    start: int
    end: int
    perms: str
    offset: int
    device: tuple[int, int]
    inode: int
    path: str
    flags: frozenset[str] = frozenset()

    @property
    def kind(self) -> Kind:
        """What it is, without where."""
        return Kind(self.perms, self.device, self.inode, self.path, self.flags)


class Area(NamedTuple):
    """A page-aligned part of one VMA that may be scanned: [start, end) in bytes, with its VMA."""

    start: int
    end: int
    vma: Vma
