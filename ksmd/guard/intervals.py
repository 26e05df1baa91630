"""Sets of addresses as sorted, disjoint, half-open ranges.

The pager's ledger of each context. Plain ints and two lists: copying (at every fork of a target)
and finding (at every fault) are what must be cheap, and the pager imports no numpy.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator


class Intervals:
    """A set of ints, kept as maximal ranges [start, end). Touching ranges are one."""

    __slots__ = ("_ends", "_starts")

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        for start, end in ranges:
            self.add(start, end)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self._starts, self._ends, strict=True)

    def __len__(self) -> int:
        """Give the number of ranges."""
        return len(self._starts)

    def __contains__(self, value: int) -> bool:
        index = bisect_right(self._starts, value) - 1
        return index >= 0 and value < self._ends[index]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Intervals):
            return NotImplemented
        return self._starts == other._starts and self._ends == other._ends

    __hash__ = None  # type: ignore[assignment] # mutable

    def __repr__(self) -> str:
        return f"Intervals([{', '.join(f'({s:#x}, {e:#x})' for s, e in self)}])"

    @property
    def size(self) -> int:
        """How many values are in the set."""
        return sum(self._ends) - sum(self._starts)

    def copy(self) -> Intervals:
        """Make an independent copy."""
        other = Intervals()
        other._starts = self._starts.copy()
        other._ends = self._ends.copy()
        return other

    def clear(self) -> None:
        """Remove everything."""
        self._starts.clear()
        self._ends.clear()

    def add(self, start: int, end: int) -> None:
        """Add [start, end); nothing when it is empty."""
        if start >= end:
            return
        low = bisect_left(self._ends, start)
        high = bisect_right(self._starts, end)
        if low < high:
            start = min(start, self._starts[low])
            end = max(end, self._ends[high - 1])
        self._starts[low:high] = [start]
        self._ends[low:high] = [end]

    def remove(self, start: int, end: int) -> None:
        """Remove whatever of [start, end) is there."""
        if start >= end:
            return
        low = bisect_right(self._ends, start)
        high = bisect_left(self._starts, end)
        if low >= high:
            return
        starts: list[int] = []
        ends: list[int] = []
        if self._starts[low] < start:
            starts.append(self._starts[low])
            ends.append(start)
        if self._ends[high - 1] > end:
            starts.append(end)
            ends.append(self._ends[high - 1])
        self._starts[low:high] = starts
        self._ends[low:high] = ends

    def within(self, start: int, end: int) -> list[tuple[int, int]]:
        """List the ranges that overlap [start, end), cut to it."""
        if start >= end:
            return []
        low = bisect_right(self._ends, start)
        high = bisect_left(self._starts, end)
        return [
            (max(start, self._starts[index]), min(end, self._ends[index]))
            for index in range(low, high)
        ]

    def first(self, start: int, end: int) -> tuple[int, int] | None:
        """Give the first range that overlaps [start, end), cut to it."""
        index = bisect_right(self._ends, start)
        if start >= end or index == len(self._starts) or self._starts[index] >= end:
            return None
        return max(start, self._starts[index]), min(end, self._ends[index])

    def move(self, start: int, end: int, to: int) -> None:
        """Move what is in [start, end) to the same distance from *to*, replacing what was there."""
        moved = self.within(start, end)
        self.remove(start, end)
        self.remove(to, to + end - start)
        for low, high in moved:
            self.add(low - start + to, high - start + to)

    def difference(self, other: Intervals) -> Intervals:
        """Give what is here and not in *other*."""
        result = self.copy()
        for start, end in other:
            result.remove(start, end)
        return result
