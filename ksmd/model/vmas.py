"""Mappings as columns: a program in which much is merged has tens of thousands of them.

Single values (:class:`~ksmd.model.vma.Vma` and the like) are made as they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from ksmd.model.vma import Area, Kind, Vma

U64 = NDArray[np.uint64]
Bools = NDArray[np.bool_]
Index = NDArray[np.intp]


class Vmas:
    """The mappings of a process, ascending.

    ``starts``, ``ends``, ``offsets``: uint64, in bytes. ``kind``: which of ``kinds`` each is.
    """

    __slots__ = ("ends", "kind", "kinds", "offsets", "starts")

    def __init__(
        self, starts: U64, ends: U64, offsets: U64, kind: NDArray[np.int32], kinds: Sequence[Kind]
    ) -> None:
        self.starts, self.ends, self.offsets = starts, ends, offsets
        self.kind, self.kinds = kind, tuple(kinds)

    @classmethod
    def of(cls, vmas: Iterable[Vma]) -> Vmas:
        """Take single mappings, ascending."""
        given = list(vmas)
        numbers: dict[Kind, int] = {}
        kind = [numbers.setdefault(vma.kind, len(numbers)) for vma in given]
        places = np.array([(vma.start, vma.end, vma.offset) for vma in given], np.uint64)
        starts, ends, offsets = places.reshape(-1, 3).T.copy()
        return cls(starts, ends, offsets, np.array(kind, np.int32), tuple(numbers))

    def __len__(self) -> int:
        return int(self.starts.size)

    def __iter__(self) -> Iterator[Vma]:
        columns = (self.starts, self.ends, self.offsets, self.kind)
        for start, end, offset, number in zip(*(c.tolist() for c in columns), strict=True):
            perms, device, inode, path, flags = self.kinds[number]
            yield Vma(start, end, perms, offset, device, inode, path, flags)

    def only(self, which: Bools | Index) -> Vmas:
        """Give some of them."""
        columns = (self.starts[which], self.ends[which], self.offsets[which], self.kind[which])
        return Vmas(*columns, self.kinds)

    def of_file(self, inode: int) -> Vmas:
        """Give those that show a file, by its inode."""
        return self.only(self.where(lambda kind: kind.inode == inode))

    def where(self, test: Callable[[Kind], bool]) -> Bools:
        """Tell of each whether *test* holds for its kind."""
        return np.fromiter(map(test, self.kinds), np.bool_, len(self.kinds))[self.kind]


class Areas:
    """What may be scanned: parts of mappings, ascending, none over a border.

    ``starts``, ``ends``: uint64, in bytes. ``which``: the number of its mapping in ``vmas``.
    """

    __slots__ = ("ends", "starts", "vmas", "which")

    def __init__(self, starts: U64, ends: U64, which: Index, vmas: Vmas) -> None:
        self.starts, self.ends, self.which, self.vmas = starts, ends, which, vmas

    @classmethod
    def of(cls, areas: Iterable[Area]) -> Areas:
        """Take single areas, ascending."""
        given = list(areas)
        places = np.array([area[:2] for area in given], np.uint64).reshape(-1, 2)
        starts, ends = places.T.copy()
        return cls(starts, ends, np.arange(len(given)), Vmas.of(area.vma for area in given))

    def __len__(self) -> int:
        return int(self.starts.size)

    def __iter__(self) -> Iterator[Area]:
        columns = (self.starts.tolist(), self.ends.tolist(), self.vmas.only(self.which))
        yield from map(Area, *columns)

    @property
    def kind(self) -> NDArray[np.int32]:
        """Which of the kinds of ``vmas`` each is."""
        return self.vmas.kind[self.which]
