"""What one scanner covers: its part of the areas, and its part of what could be merged.

A scanner of the 2008 interface merges the pages that it scans with pages that others scanned. So
its share of all candidates is: the covered ones, up to the number of pages that the caller allows,
and for each content of theirs the places elsewhere that hold it too.

As in the patch, a page counts as merged when it joins another: of two equal pages that nobody
shares yet, the second one counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ksmd.core.sets import among
from ksmd.core.spans import Spans
from ksmd.core.tables import Members
from ksmd.model.units import PAGE_SHIFT
from ksmd.model.vma import Area

#: [start, end) ranges, ascending and disjoint, in bytes.
Ranges = Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Scope:
    """``ranges`` by slot is what is covered; None: everything. ``limit``: pages to merge."""

    ranges: Mapping[int, Ranges] | None
    limit: int

    def covers(self, slot: int) -> bool:
        """Whether anything of the target *slot* is covered."""
        return self.ranges is None or bool(self.ranges.get(slot))


def clip(areas: Iterable[Area], ranges: Ranges) -> Iterator[Area]:
    """Cut *areas* (ascending) to *ranges*."""
    at = 0
    for area in areas:
        while at < len(ranges) and ranges[at][1] <= area.start:
            at += 1
        here = at  # a range may reach into the next area: do not consume it
        while here < len(ranges) and ranges[here][0] < area.end:
            start, end = ranges[here]
            yield Area(max(start, area.start), min(end, area.end), area.vma)
            here += 1


def within(
    members: Members, scope: Scope, store_checksums: NDArray[np.uint32], zero: int
) -> Members:
    """Keep what *scope* may merge: at most ``limit`` covered pages join another, or the zero page.

    *store_checksums* (uint32, ascending) are the contents that are shared already; *zero* is the
    checksum of a page of zeros, which needs no other.
    """
    covered = _covered(members, scope)
    order = np.flatnonzero(covered)
    sums = members.checksums[order]
    # the first covered page of a content is free of charge where it can only be joined by others
    joined = among(sums, np.concatenate([store_checksums, members.checksums[~covered]]))
    joined |= sums == np.uint32(zero)
    first = np.zeros(sums.size, np.bool_)
    first[np.unique(sums, return_index=True)[1]] = True
    counts = (joined | ~first).astype(np.int64)
    allowed = np.cumsum(counts) <= scope.limit
    kept = np.zeros(len(members), np.bool_)
    kept[order[allowed]] = True
    kept |= ~covered & among(members.checksums, sums[allowed])
    return Members(members.slots[kept], members.pages[kept], members.checksums[kept])


def _covered(members: Members, scope: Scope) -> NDArray[np.bool_]:
    if scope.ranges is None:
        return np.ones(len(members), np.bool_)
    covered = np.zeros(len(members), np.bool_)
    for slot, ranges in scope.ranges.items():
        # members are sorted by slot, then page
        low, high = np.searchsorted(members.slots, [slot, slot + 1])
        if low == high or not ranges:
            continue
        spans = Spans((start >> PAGE_SHIFT, end >> PAGE_SHIFT) for start, end in ranges)
        covered[low:high] = spans.find(members.pages[low:high])[1]
    return covered
