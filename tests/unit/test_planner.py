"""Plans: what goes to the store and where, which store page a page maps to, what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from ksmd.core.planner import PlanLimits, describe, make_plan
from ksmd.core.tables import Members
from ksmd.model.refusal import Reason
from ksmd.model.tables import RUN

ZERO = 99
VMA = 300
PLENTY = dict.fromkeys(range(16), 1 << 30)


def plan_of(sites, *, store=(), room=PLENTY, merged=(), next_extent=1, **limits):
    """``sites``: (slot, page, checksum); ``store``: (checksum, extent, index)."""
    sites = sorted(sites)
    store = sorted(store, key=lambda entry: entry[0])
    return make_plan(
        Members(
            np.array([s for s, _, _ in sites], np.uint32),
            np.array([p for _, p, _ in sites], np.uint64),
            np.array([c for _, _, c in sites], np.uint32),
        ),
        store_checksums=np.array([c for c, _, _ in store], np.uint32),
        store_pages=np.array([e << 32 | i for _, e, i in store], np.uint64),
        zero_checksum=ZERO,
        vma_room=room,
        next_extent=next_extent,
        limits=PlanLimits(**limits),
        merged_neighbours=np.array(list(merged), RUN),
    )


def array(slot, first, checksums):
    return [(slot, first + i, c) for i, c in enumerate(checksums)]


def runs(plan):
    """The merges as (slot, npages, page, extent, index), in the plan's order."""
    return [tuple(int(value) for value in run) for run in plan.merges]


def spans(column):
    return [tuple(int(value) for value in span) for span in column]


def test_two_equal_arrays_become_one_extent_and_two_runs():
    plan = plan_of([*array(0, 100, range(200, 220)), *array(3, 777, range(200, 220))])
    (extent,) = plan.extents
    assert (extent.extent, extent.npages) == (1, 20)
    assert spans(extent.sources) == [(0, 20, 100)]
    assert extent.checksums.tolist() == list(range(200, 220))
    assert sorted(runs(plan)) == [(0, 20, 100, 1, 0), (3, 20, 777, 1, 0)]
    assert (plan.saved_pages, plan.cost_bytes) == (20, 4 * VMA)
    assert not plan.refused


def test_a_page_repeated_inside_one_target_shares_one_store_page():
    plan = plan_of([(2, 10, 5), (2, 30, 5), (2, 31, 5)])
    assert sorted(runs(plan)) == [(2, 1, 10, 1, 0), (2, 1, 30, 1, 0), (2, 1, 31, 1, 0)]
    assert plan.saved_pages == 2


def test_zero_pages_are_dropped_in_runs_without_store_page_or_vma():
    plan = plan_of([*array(0, 5, [ZERO] * 4), (0, 20, ZERO), (1, 9, ZERO)], room={})
    assert spans(plan.zeros) == [(0, 4, 5), (0, 1, 20), (1, 1, 9)]
    assert (plan.merges.size, plan.extents, plan.cost_bytes) == (0, (), 0)
    assert plan.saved_pages == 6


def test_pages_the_store_holds_already_map_there_even_alone():
    plan = plan_of(array(4, 50, [70, 71]), store=[(71, 9, 3), (70, 9, 2), (72, 9, 4)])
    assert runs(plan) == [(4, 2, 50, 9, 2)]
    assert (plan.extents, plan.saved_pages) == ((), 2)


def test_new_store_pages_lie_in_the_order_of_the_first_target():
    order = [30, 10, 20, 5, 17]
    plan = plan_of([*array(0, 100, order), *array(1, 0, sorted(order))])
    assert plan.extents[0].checksums.tolist() == order
    assert runs(plan)[0] == (0, 5, 100, 1, 0)


def test_a_page_with_nobody_to_share_it_is_refused_as_no_profit():
    plan = plan_of([(0, 1, 5), (0, 9, 6), (1, 1, 6)])
    assert plan.refused == {Reason.NO_PROFIT: 1}
    assert plan.saved_pages == 1


def test_the_store_page_that_continues_a_run_is_preferred():
    store = [(5, 1, 40), (6, 1, 90), (6, 2, 7), (6, 1, 41), (7, 1, 42), (7, 2, 8)]
    plan = plan_of(array(0, 10, [5, 6, 7]), store=store)
    assert runs(plan) == [(0, 3, 10, 1, 40)]


def test_continuation_is_found_backwards_too():
    store = [(5, 8, 0), (5, 1, 40), (6, 8, 30), (6, 1, 41), (7, 1, 42)]
    plan = plan_of(array(0, 10, [5, 6, 7]), store=store)
    assert runs(plan) == [(0, 3, 10, 1, 40)]


def test_a_stretch_of_choices_alone_is_mapped_in_one_run():
    left = [(c, 3, 50 - c) for c in range(10, 20)]  # the wrong way round
    right = [(c, 4, c) for c in range(10, 20)]
    plan = plan_of(array(0, 0, range(10, 20)), store=[*left, *right])
    assert runs(plan) == [(0, 10, 0, 4, 10)]


def test_the_first_store_page_is_taken_where_none_continues_a_run():
    store = [(5, 1, 40), (5, 2, 70), (6, 1, 20), (6, 2, 90)]
    plan = plan_of([(0, 10, 5), (0, 11, 6)], store=store)
    assert sorted(runs(plan)) == [(0, 1, 10, 1, 40), (0, 1, 11, 1, 20)]


def test_a_run_that_is_mapped_already_is_continued_on_either_side():
    store = [(5, 1, 0), (5, 2, 31), (6, 1, 0), (6, 2, 28)]
    merged = [(0, 2, 10, 2, 29)]  # pages 10 and 11 at extent 2, index 29 and 30
    plan = plan_of([(0, 12, 5), (0, 9, 6)], store=store, merged=merged)
    assert sorted(runs(plan)) == [(0, 1, 9, 2, 28), (0, 1, 12, 2, 31)]
    assert plan.cost_bytes == 2 * VMA  # each shares a boundary with the mapped run


def test_a_run_is_not_continued_across_a_page_that_does_not_belong_to_it():
    store = [(5, 1, 40), (6, 2, 0), (6, 2, 50), (7, 1, 42), (7, 2, 1)]
    plan = plan_of(array(0, 10, [5, 6, 7]), store=store)
    assert sorted(runs(plan)) == [(0, 1, 10, 1, 40), (0, 2, 11, 2, 0)]


def test_neighbours_do_not_reach_across_targets():
    store = [(5, 1, 40), (6, 2, 0), (6, 1, 41)]
    plan = plan_of([(0, 10, 5), (1, 11, 6)], store=store)
    assert sorted(runs(plan)) == [(0, 1, 10, 1, 40), (1, 1, 11, 2, 0)]


def test_extents_are_cut_at_their_size_and_numbered_from_the_next_id():
    sums = list(range(200, 225))
    plan = plan_of([*array(0, 0, sums), *array(1, 0, sums)], extent_pages=10, next_extent=40)
    assert [(e.extent, e.npages) for e in plan.extents] == [(40, 10), (41, 10), (42, 5)]
    assert sorted(runs(plan))[:3] == [(0, 5, 20, 42, 0), (0, 10, 0, 40, 0), (0, 10, 10, 41, 0)]
    assert plan.cost_bytes == VMA * 2 * (2 + 1 + 1)


@pytest.mark.parametrize(
    ("stride", "large", "sizes"),
    [(2, 70, [70, 30]), (1, 70, [40, 40, 20]), (2, 0, [40, 40, 20]), (2, 5, [40, 40, 20])],
    ids=["scattered", "in a row", "without room", "no larger"],
)
def test_scattered_pages_go_to_extents_that_may_be_larger(stride, large, sizes):
    sites = [(slot, stride * i, 200 + i) for slot in (0, 1) for i in range(100)]
    plan = plan_of(sites, extent_pages=40, scattered_pages=large)
    assert [extent.npages for extent in plan.extents] == sizes
    assert sum(npages for _, npages, *_ in runs(plan)) == 200


def test_an_extent_is_told_to_be_scattered_by_the_runs_of_those_who_map_it():
    in_a_row = [(slot, i, 200 + i) for slot in (0, 1) for i in range(100)]
    singly = [(slot, 1000 + 2 * i, 400 + i) for slot in (0, 1) for i in range(20)]
    plan = plan_of(sorted(in_a_row + singly), extent_pages=100)
    assert [(e.npages, e.scattered) for e in plan.extents] == [(100, False), (20, True)]
    assert not plan_of([]).extents


def test_the_longest_runs_are_taken_first_within_the_room_for_vmas():
    store = [(c, 1, c) for c in range(200, 300)]
    sites = [*array(0, 0, range(200, 203)), *array(0, 50, range(210, 240)), (0, 90, 250)]
    plan = plan_of(sites, store=store, room={0: 4})
    assert runs(plan) == [(0, 30, 50, 1, 210), (0, 3, 0, 1, 200)]
    assert plan.refused == {Reason.VMA_BUDGET: 1}
    assert plan_of(sites, store=store, room={}).refused == {Reason.VMA_BUDGET: 34}


def test_a_run_refused_for_vmas_takes_the_store_page_of_its_last_partner_with_it():
    # 7 lies alone in both; target 1 has room for one run only.
    sites = [*array(0, 0, [5, 6]), (0, 90, 7), *array(1, 10, [5, 6]), (1, 40, 7)]
    plan = plan_of(sites, room={0: 100, 1: 2})
    assert sorted(runs(plan)) == [(0, 2, 0, 1, 0), (1, 2, 10, 1, 0)]
    assert plan.extents[0].npages == 2
    assert plan.refused == {Reason.VMA_BUDGET: 1, Reason.NO_PROFIT: 1}


def test_targets_with_little_room_keep_the_same_pages():
    rng = np.random.default_rng(4)
    sites = [
        (slot, 2 * page, int(c))
        for slot in range(4)
        for page, c in enumerate(rng.permutation(np.arange(1000, 1400)))
    ]
    plan = plan_of(sites, room=dict.fromkeys(range(4), 100))
    assert plan.merges.size == 4 * 50
    assert plan.saved_pages == 3 * 50


def test_runs_that_cost_more_than_they_save_are_refused():
    long = list(range(1000, 1100))
    sites = [*array(0, 0, long), (0, 500, 5), *array(1, 0, long), (1, 500, 5)]
    plan = plan_of(sites, vma_bytes=3000)
    assert sorted(runs(plan)) == [(0, 100, 0, 1, 0), (1, 100, 0, 1, 0)]
    assert plan.refused == {Reason.NO_PROFIT: 2}
    assert plan.extents[0].npages == 100


def test_describe_tells_the_plan_in_lines_that_fit():
    sums = list(range(200, 1400))
    plan = plan_of(
        [*array(0, 0, sums), *array(1, 0, sums), (1, 5000, ZERO), (1, 9000, 7)],
        store=[(7, 8, 8)],
        room={0: 100, 1: 2},
    )
    before = repr(plan)
    lines = describe(plan, {0: "inference", 1: "a name that is far too long to fit " * 3})
    assert repr(plan) == before
    assert all(len(line) <= 100 for line in lines)
    text = "\n".join(lines)
    assert "merge 2,400 pages in 2 runs, drop 1 zero pages" in text
    assert "store 1,200 new pages in 1 extents" in text
    assert "save 4.7 MiB" in text
    assert "inference" in text
    assert "refuse 1 pages: vma-budget" in text
    assert describe(plan_of([]), {}) == [
        "merge 0 pages in 0 runs, drop 0 zero pages",
        "store 0 new pages in 0 extents",
        "save 0.0 MiB at a cost of 0.0 MiB of VMAs",
    ]


def test_lines_fit_at_the_largest_sizes_too():
    plan = plan_of([(0, 1, 5), (1, 1, 5)])
    plan.merges["npages"] = 1 << 30
    plan.merges["target"] = 65535
    assert all(len(line) <= 100 for line in describe(plan, {}))


def test_columns_out_of_order_are_refused():
    empty32, empty64 = np.empty(0, np.uint32), np.empty(0, np.uint64)
    members = Members(
        np.zeros(2, np.uint32), np.array([5, 5], np.uint64), np.array([1, 1], np.uint32)
    )
    rest = {"zero_checksum": ZERO, "vma_room": PLENTY, "next_extent": 0}
    with pytest.raises(ValueError, match="not sorted"):
        make_plan(members, store_checksums=empty32, store_pages=empty64, **rest)
    two = np.array([2, 1], np.uint32)
    with pytest.raises(ValueError, match="not in order"):
        make_plan(Members(), store_checksums=two, store_pages=two.astype(np.uint64), **rest)
    with pytest.raises(ValueError, match="store pages"):
        make_plan(Members(), store_checksums=two, store_pages=empty64, **rest)
    with pytest.raises(ValueError, match="at least one page"):
        PlanLimits(extent_pages=0)
    with pytest.raises(ValueError, match="extent ids"):
        plan_of([(0, 1, 5), (1, 1, 5)], next_extent=1 << 32)
    with pytest.raises(ValueError, match="too large"):
        plan_of([(0, 1 << 50, 5)])
