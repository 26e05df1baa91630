"""The ledger adds up: sharing, credit per target, profit after costs, stop times."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from ksmd.core.ledger import VMA_BYTES, Ledger, StopTimes, count_sharing, headroom, profit
from ksmd.model.refusal import Reason
from ksmd.model.tables import SITES

PAGE = 4096


def runs(pages, rng=None):
    """The store pages of one target as SITES: runs of neighbours, some of them cut."""
    found = []
    for page in pages:
        if found and sum(found[-1]) == page and (rng is None or rng.random() < 0.7):
            found[-1][1] += 1
        else:
            found.append([page, 1])
    return np.array([tuple(run) for run in found], SITES)


def sites(**columns):
    return {int(name[1:]): runs(pages) for name, pages in columns.items()}


def test_sharing_counts_store_pages_and_the_sites_beyond_the_first():
    sharing = count_sharing(sites(t0=[1, 2, 3], t1=[2, 3, 3], t5=[9 << 32 | 1]))
    assert (sharing.pages_shared, sharing.pages_sharing) == (4, 3)


def test_each_site_is_credited_with_its_part_of_what_the_page_saves():
    sharing = count_sharing(sites(t0=[7], t1=[7], t2=[7, 8], t3=[7]))
    credited = {slot: own.saved_bytes for slot, own in sharing.per_slot.items()}
    assert credited == {0: 3072, 1: 3072, 2: 3072, 3: 3072}
    assert sharing.per_slot[2].merging_pages == 2


def test_what_the_targets_save_adds_up_exactly():
    rng = random.Random(2)
    for _ in range(50):
        columns = {
            slot: [rng.randrange(40) for _ in range(rng.randrange(20))]
            + list(range(first := rng.randrange(40), first + rng.randrange(40)))
            for slot in range(rng.randrange(1, 9))
        }
        sharing = count_sharing({slot: runs(column, rng) for slot, column in columns.items()})
        users = Counter(page for column in columns.values() for page in column)
        assert sharing.pages_shared == len(users)
        assert sharing.pages_sharing == sum(users.values()) - len(users)
        total = sum(own.saved_bytes for own in sharing.per_slot.values())
        assert total == PAGE * sharing.pages_sharing
        for slot, own in sharing.per_slot.items():
            exact = sum(PAGE * (1 - 1 / users[page]) for page in columns[slot])
            assert own.saved_bytes == pytest.approx(exact, abs=1)
            assert own.merging_pages == len(columns[slot])


def test_nothing_shared_is_nothing_saved():
    for nothing in ({}, sites(t0=[])):
        sharing = count_sharing(nothing)
        assert (sharing.pages_shared, sharing.pages_sharing) == (0, 0)
    assert sharing.per_slot[0].saved_bytes == 0


def test_profit_is_what_is_saved_less_vmas_and_our_own_memory():
    sharing = count_sharing(sites(t0=[1, 2, 3], t1=[1, 2, 3]))
    costs = {"vmas": 4, "table_bytes": 100, "own_rss": 5000}
    expected = PAGE * (3 + 10) - 4 * VMA_BYTES - 5000
    assert profit(sharing, zero_pages=10, **costs) == expected


def test_store_pages_without_a_user_are_a_loss():
    sharing = count_sharing(sites(t0=[1, 2], t1=[1, 2]))
    free = {"zero_pages": 0, "vmas": 0, "table_bytes": 0, "own_rss": 0}
    assert profit(sharing, **free) == 2 * PAGE
    assert profit(sharing, **free, store_pages=10) == -6 * PAGE


def test_tables_are_counted_once_as_part_of_our_memory():
    empty = count_sharing({})
    assert profit(empty, zero_pages=0, vmas=0, table_bytes=700, own_rss=0) == -700
    assert profit(empty, zero_pages=0, vmas=0, table_bytes=700, own_rss=900) == -900


def test_headroom_is_a_page_for_every_site_and_zero_page():
    sharing = count_sharing(sites(t0=[1, 2, 3], t1=[1, 2, 3]))
    assert headroom(sharing, zero_pages=4) == PAGE * 10


def test_stop_times_give_the_worst_ever_and_a_percentile_of_the_last():
    stops = StopTimes()
    assert (stops.count, stops.worst, stops.p99) == (0, 0.0, 0.0)
    stops.add(500.0)
    assert (stops.count, stops.worst, stops.p99) == (1, 500.0, 500.0)
    for n in range(1024):
        stops.add(1.0 + n / 1024)
    assert stops.worst == 500.0
    assert stops.count == 1025
    assert stops.p99 == pytest.approx(1.0 + 1013 / 1024)


def test_the_percentile_of_few_stops_is_one_of_them():
    stops = StopTimes()
    for milliseconds in (4.0, 1.0, 3.0):
        stops.add(milliseconds)
    assert stops.p99 == 4.0


def test_the_ledger_counts_refusals_by_name():
    ledger = Ledger()
    ledger.refuse(Reason.SECCOMP)
    ledger.refuse_all({Reason.VMA_BUDGET: 40, Reason.NO_PROFIT: 0})
    ledger.refuse_all(Counter({Reason.VMA_BUDGET: 2}))
    assert ledger.named_refusals() == {"vma-budget": 42, "seccomp": 1}
    assert list(ledger.named_refusals()) == ["vma-budget", "seccomp"]
