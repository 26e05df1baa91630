"""An estimate is what the merge would save: page by page, and by the tables and planner."""

from __future__ import annotations

import numpy as np
import pytest

from ksmd.core.estimate import Estimate, TargetPages, estimate
from ksmd.core.planner import PlanLimits, make_plan
from ksmd.core.tables import PageTables

PAGE = 4096
ZERO = 0xABCD_EF01_2345_6789
NONE32, NONE64 = np.empty(0, np.uint32), np.empty(0, np.uint64)


class Frames:
    """Hands out frames of memory."""

    def __init__(self):
        self.next = 1000

    def fresh(self, n):
        self.next += n
        return list(range(self.next - n, self.next))


def target(frames, checksums, *, first=0, pfns=None, exclusive=True, pages=None):
    n = len(checksums)
    return TargetPages(
        np.array(range(first, first + n) if pages is None else pages, np.uint64),
        np.array(frames.fresh(n) if pfns is None else pfns, np.uint64),
        np.array(checksums, np.uint64),
        np.full(n, exclusive) if isinstance(exclusive, bool) else np.array(exclusive, np.bool_),
    )


def test_equal_arrays_save_all_copies_but_one():
    frames = Frames()
    array = [2**40 + i for i in range(600)]
    found = estimate(
        {slot: target(frames, array, first=9000 * slot) for slot in range(4)}, zero_checksum=ZERO
    )
    vma_bytes = PlanLimits().vma_bytes * 2 * 4
    assert found == Estimate(
        pages=2400,
        resident_pages=2400,
        mergeable_pages=2400,
        zero_pages=0,
        duplicates_within=0,
        duplicates_across=1800,
        saved_pages=1800,
        vma_bytes=vma_bytes,
        saved_bytes=1800 * PAGE - vma_bytes,
        share_of_runs_4=1.0,
        share_of_runs_16=1.0,
        share_of_runs_512=1.0,
    )


def test_pages_shared_by_fork_are_resident_once_and_save_nothing():
    frames = Frames()
    shared = frames.fresh(10)
    sums = list(range(100, 110))
    found = estimate(
        {
            0: target(frames, [*sums, 7], pfns=[*shared, 5], exclusive=[False] * 10 + [True]),
            1: target(frames, [*sums, 8], pfns=[*shared, 6], exclusive=[False] * 10 + [True]),
            2: target(frames, [*sums]),
        },
        zero_checksum=ZERO,
    )
    assert (found.pages, found.resident_pages, found.mergeable_pages) == (32, 22, 12)
    assert (found.saved_pages, found.saved_bytes) == (0, 0)
    assert found.duplicates_across == 0


def test_zero_pages_save_themselves_and_cost_no_vma():
    frames = Frames()
    found = estimate({3: target(frames, [ZERO, 5, ZERO, ZERO])}, zero_checksum=ZERO)
    assert (found.zero_pages, found.saved_pages, found.vma_bytes) == (3, 3, 0)
    assert found.saved_bytes == 3 * PAGE
    assert found.share_of_runs_4 == 0.0


def test_duplicates_inside_one_process_are_told_from_those_across():
    frames = Frames()
    found = estimate(
        {0: target(frames, [5, 5, 5, 6]), 1: target(frames, [5, 5, 7])}, zero_checksum=ZERO
    )
    assert (found.duplicates_within, found.duplicates_across) == (3, 1)
    assert found.saved_pages == 4


def test_run_lengths_are_shares_of_what_would_be_mapped():
    frames = Frames()
    long, short = list(range(1000, 1020)), list(range(2000, 2005))
    pages = [*range(20), *range(100, 105), 300]
    found = estimate(
        {slot: target(frames, [*long, *short, 9], pages=pages) for slot in (0, 1)},
        zero_checksum=ZERO,
    )
    assert found.share_of_runs_4 == pytest.approx(25 / 26)
    assert found.share_of_runs_16 == pytest.approx(20 / 26)
    assert found.share_of_runs_512 == 0.0


def test_a_frame_that_two_targets_call_their_own_is_counted_once():
    frames = Frames()
    found = estimate(
        {0: target(frames, [5], pfns=[77]), 1: target(frames, [5], pfns=[77])}, zero_checksum=ZERO
    )
    assert (found.resident_pages, found.mergeable_pages, found.saved_pages) == (1, 1, 0)


def test_frames_that_are_not_told_are_taken_for_different_ones():
    frames = Frames()
    found = estimate(
        {0: target(frames, [5], pfns=[0]), 1: target(frames, [5], pfns=[0])}, zero_checksum=ZERO
    )
    assert (found.resident_pages, found.mergeable_pages, found.saved_pages) == (2, 2, 1)


def test_checksums_that_differ_only_above_32_bits_are_different_pages():
    frames = Frames()
    found = estimate({0: target(frames, [1 << 32 | 5, 2 << 32 | 5])}, zero_checksum=ZERO)
    assert found.saved_pages == 0


def test_the_room_for_vmas_bounds_the_estimate():
    frames = Frames()
    targets = {slot: target(frames, [5, 6], pages=[1, 9]) for slot in (0, 1)}
    assert estimate(targets, zero_checksum=ZERO).saved_pages == 2
    assert estimate(targets, zero_checksum=ZERO, vma_room={0: 2, 1: 2}).saved_pages == 1


def test_nothing_to_look_at_is_nothing_saved():
    for targets in ({}, {0: target(Frames(), [])}):
        found = estimate(targets, zero_checksum=ZERO)
        assert (found.pages, found.resident_pages, found.saved_bytes) == (0, 0, 0)


def test_columns_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="different lengths"):
        TargetPages(NONE64, NONE64, np.ones(1, np.uint64), np.ones(0, np.bool_))


def test_the_figure_is_what_tables_and_planner_would_merge():
    rng = np.random.default_rng(11)
    frames = Frames()
    array = rng.integers(1 << 20, 1 << 31, 3000, dtype=np.uint64)
    array[100:160] = 17
    targets, tables = {}, PageTables(100_000, 100_000)
    for slot in range(3):
        sums = array.copy()
        at = rng.choice(sums.size, 400, replace=False)
        sums[at] = rng.integers(1 << 31, 1 << 32, at.size, dtype=np.uint64)
        sums[rng.choice(sums.size, 300, replace=False)] = 3  # the zero page of this test
        exclusive = rng.random(sums.size) < 0.9
        targets[slot] = target(frames, sums, first=5000, exclusive=exclusive)
        pages = targets[slot].pages[exclusive]
        for seqnr in (1, 2):
            tables.observe(slot, 5000, 8000, pages, sums[exclusive].astype(np.uint32), seqnr)
    plan = make_plan(
        tables.duplicates(NONE32, zero=3),
        store_checksums=NONE32,
        store_pages=NONE64,
        zero_checksum=3,
        vma_room=dict.fromkeys(range(3), 1 << 20),
        next_extent=0,
    )
    found = estimate(targets, zero_checksum=3)
    assert plan.saved_pages > 4000
    assert (found.saved_pages, found.vma_bytes) == (plan.saved_pages, plan.cost_bytes)
