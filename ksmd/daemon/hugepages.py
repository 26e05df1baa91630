"""Huge pages of which only a part is to be merged are split before the stop, not in it."""

from __future__ import annotations

from ksmd.core.spans import Spans
from ksmd.core.windows import Records, cut_huge_blocks
from ksmd.daemon.state import Target
from ksmd.kernel import thp
from ksmd.model.units import HUGE_PAGE_PAGES, HUGE_PAGE_SIZE, PAGE_SHIFT


def huge_blocks(target: Target, records: Records) -> frozenset[int]:
    """Give the addresses of the target's huge pages that *records* touch. TargetGoneError."""
    found: set[int] = set()
    first = records["start"] // HUGE_PAGE_SIZE
    last = (records["start"] + records["length"] - 1) // HUGE_PAGE_SIZE
    spans = _blocks(set(first.tolist()) | set(last.tolist()))
    for start, end in spans.groups():
        found.update(target.pagemap.huge(start << PAGE_SHIFT, end << PAGE_SHIFT))
    return frozenset(found)


def _blocks(numbers: set[int]) -> Spans:
    return Spans((n * HUGE_PAGE_PAGES, (n + 1) * HUGE_PAGE_PAGES) for n in sorted(numbers))


def split_cut(target: Target, records: Records, huge: frozenset[int]) -> None:
    """Split those of the *huge* pages that a window with *records* would cut. TargetGoneError."""
    if huge and (cut := huge.intersection(cut_huge_blocks(records))):
        thp.split_in(target.pid, sorted(cut))
