"""Ranges of pages that lie close together, looked at as one.

A target in which thousands of short runs are merged has as many mappings, and as many areas between
them. Each question to the kernel costs some 20 us from Python, however small the range: so ask once
about everything from the first range to the last, and sort the pages of the answer into the ranges
afterwards, in one search.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]
Bools = NDArray[np.bool_]
Index = NDArray[np.intp]

#: Pages between two ranges over which one question is still cheaper than two: the kernel takes
#: some 10 ns for a page of page table.
NEAR_PAGES = 1024


class Spans:
    """Disjoint page ranges [``starts``, ``ends``), ascending; uint64 page numbers."""

    def __init__(self, ranges: Iterable[tuple[int, int]]) -> None:
        table = np.fromiter(chain.from_iterable(ranges), np.uint64).reshape(-1, 2)
        self._take(table[:, 0], table[:, 1])

    @classmethod
    def of(cls, starts: U64, ends: U64) -> Spans:
        """Take columns."""
        spans = cls.__new__(cls)
        spans._take(starts, ends)
        return spans

    def _take(self, starts: U64, ends: U64) -> None:
        if np.any(starts[1:] < ends[:-1]):
            raise ValueError("ranges overlap, or are not in order")
        self.starts, self.ends = starts, ends

    def __len__(self) -> int:
        return int(self.starts.size)

    def groups(self, near: int = NEAR_PAGES) -> Iterator[tuple[int, int]]:
        """Give (first page, end page) of each group of ranges at most *near* pages apart."""
        if not len(self):
            return
        cuts = np.flatnonzero(self.starts[1:] - self.ends[:-1] > np.uint64(near))
        first = np.append(0, cuts + 1)
        last = np.append(cuts, len(self) - 1)
        yield from zip(self.starts[first].tolist(), self.ends[last].tolist(), strict=True)

    def find(self, pages: U64) -> tuple[Index, Bools]:
        """Give for each page the range it lies in, and whether it lies in one at all.

        The range is meaningless where it lies in none.
        """
        if not len(self):
            return np.zeros(pages.size, np.intp), np.zeros(pages.size, np.bool_)
        at = np.searchsorted(self.starts, pages, side="right") - 1
        at = np.maximum(at, 0)
        return at, (pages >= self.starts[at]) & (pages < self.ends[at])

    def hold(self, first: int, end: int) -> bool:
        """Tell whether [*first*, *end*) lies in one range."""
        at = int(np.searchsorted(self.starts, np.uint64(first), side="right")) - 1
        return at >= 0 and end <= int(self.ends[at])

    def cut(self, low: U64, high: U64) -> tuple[Index, Index, U64, U64]:
        """Cut ranges [*low*, *high*), none of them empty, at the borders of these.

        Gives for each piece the number of its range and of the span that it lies in, and its two
        ends; in the order of the ranges. What lies in no span is left out.
        """
        first = np.searchsorted(self.ends, low, side="right")
        count = np.maximum(np.searchsorted(self.starts, high, side="left") - first, 0)
        which = np.repeat(np.arange(len(low)), count)
        span = np.arange(len(which)) - np.repeat(np.cumsum(count) - count, count)
        span += np.repeat(first, count)
        starts = np.maximum(low[which], self.starts[span])
        return which, span, starts, np.minimum(high[which], self.ends[span])
