"""Every plan, of any pages, store and budgets, against rules checked page by page."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import pairwise
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from ksmd.core import planner
from ksmd.core.planner import PlanLimits, make_plan
from ksmd.core.tables import Members
from ksmd.model.refusal import Reason
from ksmd.model.tables import RUN

ZERO = 3
UNBOUNDED = dict.fromkeys(range(4), 1 << 40)


@st.composite
def worlds(draw):
    """Sites (slot, page) -> checksum, a store, runs mapped already, and limits; all small."""
    # Targets hold parts of one array, here and there overwritten: runs of all lengths.
    array = draw(st.lists(st.integers(0, 11), min_size=3, max_size=24))
    places = {}
    merged = []
    for slot in range(draw(st.integers(2, 3))):
        at = draw(st.integers(505, 515))
        for _ in range(draw(st.integers(1, 4))):
            start = draw(st.integers(0, len(array) - 1))
            piece = array[start : start + draw(st.integers(1, 24))]
            if draw(st.integers(0, 2)) == 0:
                merged.append((slot, len(piece), at, 7, draw(st.integers(0, 9))))
            else:
                for i, checksum in enumerate(piece):
                    if draw(st.integers(0, 7)) < 7:
                        places[slot, at + i] = checksum
                    elif draw(st.booleans()):
                        places[slot, at + i] = draw(st.integers(0, 11))
            at += len(piece) + draw(st.sampled_from([0, 0, 1]))
    pages = draw(st.lists(st.tuples(st.integers(7, 8), st.integers(0, 12)), unique=True))
    kind = st.integers(0, 11).filter(lambda checksum: checksum != ZERO)
    store = {extent << 32 | index: draw(kind) for extent, index in pages}
    limits = PlanLimits(
        extent_pages=draw(st.integers(1, 8)),
        scattered_pages=draw(st.sampled_from([0, 0, 5, 12])),
        vma_bytes=draw(st.sampled_from([0, 300, 1500, 3000, 9000])),
    )
    return places, store, merged, limits


def plan_of(world, room):
    places, store, merged, limits = world
    keys = sorted(places)
    by_checksum = sorted(store, key=lambda page: store[page])
    return make_plan(
        Members(
            np.array([slot for slot, _ in keys], np.uint32),
            np.array([page for _, page in keys], np.uint64),
            np.array([places[key] for key in keys], np.uint32),
        ),
        store_checksums=np.array([store[page] for page in by_checksum], np.uint32),
        store_pages=np.array(by_checksum, np.uint64),
        zero_checksum=ZERO,
        vma_room=room,
        next_extent=20,
        limits=limits,
        merged_neighbours=np.array(merged, RUN),
    )


def mapped_by(runs):
    """(slot, page) -> (store page, number of the run); no page twice."""
    found = {}
    for number, (slot, npages, page, extent, index) in enumerate(runs):
        for i in range(npages):
            assert (slot, page + i) not in found, "a page is merged twice"
            found[slot, page + i] = (extent << 32 | index + i, number)
    return found


def new_store_pages(plan, places, limits):
    """Check the extents; return store page -> checksum, and store page -> source."""
    checksums, sources = {}, {}
    for extent in plan.extents:
        copied = [
            (int(span["target"]), int(span["page"]) + i)
            for span in extent.sources
            for i in range(int(span["npages"]))
        ]
        assert len(copied) == extent.npages == extent.checksums.size > 0
        assert extent.npages <= max(limits.extent_pages, limits.scattered_pages)
        for index, source in enumerate(copied):
            place = extent.extent << 32 | index
            assert place not in checksums
            checksums[place] = int(extent.checksums[index])
            sources[place] = source
            assert places[source] == checksums[place]
    assert len(set(checksums.values())) == len(checksums), "a content is stored twice"
    return checksums, sources


def vmas_of(mapped):
    """VMAs beyond the one that each target would be without any mapping."""
    total = Counter()
    for slot in {slot for slot, _ in mapped}:
        for page in range(400, 700):
            here, there = mapped.get((slot, page)), mapped.get((slot, page + 1))
            total[slot] += (here and here[1]) != (there and there[1])
    return total


def check(world, room, plan):
    places, store, merged, limits = world
    runs = [tuple(int(value) for value in run) for run in plan.merges]
    mapped = mapped_by(runs)
    fresh, sources = new_store_pages(plan, places, limits)
    assert not fresh.keys() & store.keys()
    assert not set(fresh.values()) & (set(store.values()) | {ZERO})

    users = Counter(place for place, _ in mapped.values())
    for key, (place, _) in mapped.items():
        assert places[key] == {**store, **fresh}[place]
    for place, source in sources.items():
        assert users[place] >= 2, "a page of the store is filled for one user"
        assert mapped[source][0] == place

    # Runs are as long as they can be.
    for (slot, page), (place, number) in mapped.items():
        following = mapped.get((slot, page + 1))
        if following is not None and following[0] == place + 1:
            assert following[1] == number

    # Zero pages, all of them, in runs.
    zeros = [
        (int(span["target"]), int(span["page"]) + i)
        for span in plan.zeros
        for i in range(int(span["npages"]))
    ]
    assert zeros == sorted(key for key, checksum in places.items() if checksum == ZERO)

    # VMAs, counted from the mappings and not from the plan's own sums.
    old = {
        (slot, page + i): (0, -1 - number)
        for number, (slot, npages, page, _, _) in enumerate(merged)
        for i in range(npages)
    }
    before, after = vmas_of(old), vmas_of({**old, **mapped})
    added = after - before
    for slot, vmas in added.items():
        assert vmas <= room.get(slot, 0), "over the budget"
    assert plan.cost_bytes == limits.vma_bytes * sum(added.values())
    assert plan.saved_pages == len(mapped) + len(zeros) - len(fresh)
    assert len(places) == len(mapped) + len(zeros) + sum(plan.refused.values())

    # Most profitable first: a new store page is shared out to its users.
    worth = [
        sum(1 - (fresh.keys() >= {place}) / users[place] for place in range(at, at + npages))
        for _, npages, _, extent, index in runs
        for at in [extent << 32 | index]
    ]
    assert all(a >= b - 1e-9 for a, b in pairwise(worth))
    return mapped, fresh


@given(worlds(), st.dictionaries(st.integers(0, 2), st.integers(-1, 12)))
@settings(max_examples=300)
@pytest.mark.parametrize("rounds", [planner._ROUNDS, 0])
def test_a_plan_keeps_every_rule_whatever_the_budgets(rounds, world, room):
    with patch.object(planner, "_ROUNDS", rounds):
        plan = plan_of(world, room)
    check(world, room, plan)
    for reason in plan.refused:
        event(str(reason))
    assert set(plan.refused) <= {Reason.NO_PROFIT, Reason.VMA_BUDGET}


@given(worlds())
@settings(max_examples=300)
def test_without_budgets_a_plan_saves_all_that_can_be_saved(world):
    places, store, merged, _ = world
    world = (places, store, merged, PlanLimits(3, vma_bytes=0))
    plan = plan_of(world, UNBOUNDED)
    check(world, UNBOUNDED, plan)
    groups = defaultdict(int)
    for checksum in places.values():
        groups[checksum] += 1
    saved = sum(
        n if checksum == ZERO or checksum in store.values() else n - 1
        for checksum, n in groups.items()
    )
    assert plan.saved_pages == saved


@given(worlds(), st.dictionaries(st.integers(0, 2), st.integers(0, 12)))
@settings(max_examples=100)
def test_the_same_input_gives_the_same_plan(world, room):
    first, second = plan_of(world, room), plan_of(world, room)
    assert first.merges.tolist() == second.merges.tolist()
    assert first.zeros.tolist() == second.zeros.tolist()
    assert [e.sources.tolist() for e in first.extents] == [
        e.sources.tolist() for e in second.extents
    ]
