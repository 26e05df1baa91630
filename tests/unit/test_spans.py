"""Ranges that lie close together are asked about as one, and no page is put in a wrong one."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksmd.core.spans import Spans

GAPS_AND_LENGTHS = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 20)), max_size=20)


def ranges_of(steps: list[tuple[int, int]]) -> list[tuple[int, int]]:
    found, at = [], 100
    for gap, length in steps:
        found.append((at + gap, at + gap + length))
        at += gap + length
    return found


@given(GAPS_AND_LENGTHS, st.integers(0, 30))
def test_groups_cover_every_range_and_never_a_gap_that_is_too_wide(
    steps: list[tuple[int, int]], near: int
) -> None:
    ranges = ranges_of(steps)
    groups = list(Spans(ranges).groups(near))
    pages = {page for start, end in ranges for page in range(start, end)}
    for start, end in groups:
        inside = sorted(page for page in pages if start <= page < end)
        assert (inside[0], inside[-1] + 1) == (start, end)
        assert max(np.diff(inside), default=1) - 1 <= near
    assert all(b[0] - a[1] > near for a, b in pairwise(groups))
    assert pages <= {page for start, end in groups for page in range(start, end)}


@given(GAPS_AND_LENGTHS)
def test_a_page_is_found_in_the_range_that_holds_it_and_in_no_other(
    steps: list[tuple[int, int]],
) -> None:
    ranges = ranges_of(steps)
    pages = np.arange(90, 90 + sum(map(sum, steps)) + 30, dtype=np.uint64)
    at, inside = Spans(ranges).find(pages)
    for page, index, there in zip(pages.tolist(), at.tolist(), inside.tolist(), strict=True):
        holders = [number for number, (start, end) in enumerate(ranges) if start <= page < end]
        assert holders == ([index] if there else [])


@given(GAPS_AND_LENGTHS)
def test_a_range_is_held_by_one_that_covers_it_all(steps: list[tuple[int, int]]) -> None:
    ranges = ranges_of(steps)
    spans = Spans(ranges)
    for first in range(ranges[0][0] - 2, ranges[0][1] + 3) if ranges else [5]:
        for end in range(first + 1, first + 6):
            assert spans.hold(first, end) == any(low <= first and end <= up for low, up in ranges)


def test_ranges_that_overlap_or_run_backwards_are_refused() -> None:
    with pytest.raises(ValueError, match="overlap"):
        Spans([(1, 5), (4, 6)])
    with pytest.raises(ValueError, match="not in order"):
        Spans([(10, 11), (4, 6)])


@given(GAPS_AND_LENGTHS, GAPS_AND_LENGTHS)
def test_ranges_are_cut_at_every_border_and_lose_nothing_that_lies_inside(
    spans: list[tuple[int, int]], cut: list[tuple[int, int]]
) -> None:
    known, ranges = ranges_of(spans), ranges_of(cut)
    table = np.array(ranges, np.uint64).reshape(-1, 2)
    pieces = list(zip(*Spans(known).cut(table[:, 0], table[:, 1]), strict=True))
    expected = [
        (which, at, max(low, start), min(high, end))
        for which, (low, high) in enumerate(ranges)
        for at, (start, end) in enumerate(known)
        if max(low, start) < min(high, end)
    ]
    assert pieces == expected
