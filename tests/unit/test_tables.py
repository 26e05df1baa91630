"""The rmap and page hash tables: what they answer, how much they hold, how little they weigh."""

from __future__ import annotations

import numpy as np
import pytest

from ksmd.core.pagehash import Finder, PageHash
from ksmd.core.tables import PageTables
from ksmd.model.tables import Seen

NONE = np.empty(0, np.uint32)


def observe(tables, pages, sums, seqnr=1, slot=1, span=None):
    first, end = span or (min(pages), max(pages) + 1)
    answer = tables.observe(
        slot, first, end, np.array(pages, np.uint64), np.array(sums, np.uint32), seqnr
    )
    assert answer.dtype == np.uint8
    return [Seen(value) for value in answer]


def members(tables, store=NONE, zero=None):
    found = tables.duplicates(np.array(store, np.uint32), zero)
    assert (found.slots.dtype, found.pages.dtype) == (np.uint32, np.uint64)
    return list(
        zip(found.slots.tolist(), found.pages.tolist(), found.checksums.tolist(), strict=True)
    )


def test_a_page_is_new_then_stable_and_volatile_when_it_changed():
    tables = PageTables(1000, 1000)
    assert observe(tables, [7], [10], 1) == [Seen.NEW]
    assert (tables.rows, tables.stable) == (1, 0)
    assert observe(tables, [7], [10], 2) == [Seen.STABLE]
    assert tables.stable == 1
    assert observe(tables, [7], [11], 3) == [Seen.VOLATILE]
    assert (tables.rows, tables.stable) == (1, 0)
    assert observe(tables, [7], [11], 4) == [Seen.STABLE]
    assert observe(tables, [7], [11], 5) == [Seen.STABLE]
    assert tables.stable == 1


def test_a_page_that_changes_back_is_volatile_first():
    tables = PageTables(1000, 1000)
    for seqnr, (checksum, seen) in enumerate(
        [(5, Seen.NEW), (5, Seen.STABLE), (6, Seen.VOLATILE), (5, Seen.VOLATILE), (5, Seen.STABLE)]
    ):
        assert observe(tables, [3, 4], [checksum, checksum], seqnr) == [seen, seen]
    assert members(tables) == [(1, 3, 5), (1, 4, 5)]


def test_only_stable_pages_that_occur_twice_are_members():
    tables = PageTables(1000, 1000)
    pages = [10, 11, 12, 200]
    observe(tables, pages, [1, 2, 1, 3], 1)
    assert members(tables) == []
    observe(tables, pages, [1, 2, 9, 3], 2)  # page 12 changed: 1 is single among stable pages
    assert members(tables) == []
    observe(tables, pages, [1, 2, 1, 3], 3)
    observe(tables, pages, [1, 2, 1, 3], 4)
    assert members(tables) == [(1, 10, 1), (1, 12, 1)]


def test_pages_known_to_the_store_and_zero_pages_are_members_alone():
    tables = PageTables(1000, 1000)
    for seqnr in (1, 2):
        observe(tables, [10, 11, 12, 13], [50, 60, 70, 80], seqnr)
    assert members(tables, store=[60, 61]) == [(1, 11, 60)]
    assert members(tables, zero=80) == [(1, 13, 80)]
    assert members(tables, store=[1, 50, 4_000_000_000], zero=70) == [(1, 10, 50), (1, 12, 70)]


def test_members_come_by_slot_and_page_whatever_the_order_of_observation():
    tables = PageTables(1000, 1000)
    for seqnr in (1, 2):
        for slot, first in ((9, 5000), (2, 700), (9, 64), (2, 1 << 34)):
            observe(tables, [first, first + 1], [8, 8], seqnr, slot)
    assert members(tables) == [
        (slot, page, 8)
        for slot, page in (
            (2, 700), (2, 701), (2, 1 << 34), (2, (1 << 34) + 1),
            (9, 64), (9, 65), (9, 5000), (9, 5001),
        )
    ]  # fmt: skip


def test_a_checksum_of_zero_is_a_page_like_any_other():
    tables = PageTables(100, 100)
    assert observe(tables, [1], [0], 1) == [Seen.NEW]
    assert observe(tables, [1], [0], 2) == [Seen.STABLE]
    assert tables.rows == 1


def test_pages_missing_from_an_observed_range_are_forgotten_and_others_kept():
    tables = PageTables(1000, 1000)
    pages = list(range(50, 200))
    for seqnr in (1, 2):
        observe(tables, pages, [4] * 150, seqnr)
    left = [page for page in pages if not 60 <= page < 130]
    observe(tables, [70, 129], [4, 4], 3, span=(60, 130))
    assert [page for _, page, _ in members(tables)] == sorted([*left, 70, 129])
    assert (tables.rows, tables.stable) == (82, 82)
    assert observe(tables, [], [], 4, span=(0, 1 << 40)) == []
    assert (tables.rows, tables.stable) == (0, 0)


def test_finish_forgets_what_the_scan_did_not_observe():
    tables = PageTables(1000, 1000)
    for seqnr in (1, 2):
        observe(tables, [1, 2, 100], [4, 4, 4], seqnr)
        assert tables.finish(1, seqnr) == 0
    observe(tables, [2], [4], 3)
    assert tables.finish(1, 3) == 2
    assert (tables.rows, tables.stable) == (1, 1)
    assert tables.finish(1, 4) == 1
    assert (tables.rows, tables.stable) == (0, 0)
    assert tables.finish(77, 4) == 0


def test_of_a_target_that_stands_still_only_what_is_known_and_due_is_to_be_looked_at():
    tables = PageTables(1000, 1000)
    for seqnr in (1, 2):
        observe(tables, [1, 2, 100, 130, 640], [4, 4, 4, 4, 4], seqnr)
        observe(tables, [5], [9], seqnr, slot=2)
    # looked at in second 0, and for all that is known it ran in the same
    assert tables.known(1, 3, now=1, still_since=1) == ([], 5), "it rests for a second"
    assert (tables.finish(1, 3), tables.finish(2, 3)) == (0, 1)
    assert tables.known(1, 4, now=10, still_since=1) == ([(0, 192), (640, 704)], 0)
    assert tables.finish(1, 4) == 5, "and nobody has looked"
    for seqnr in (5, 6):
        tables.observe(1, 0, 3, np.array([1], np.uint64), np.array([4], np.uint32), seqnr, now=20)
    assert tables.known(1, 7, now=900, still_since=15) == ([], 1), "as good as looked at"
    assert tables.known(77, 7, now=900, still_since=15) == ([], 0)


def test_what_changes_in_the_tables_changes_their_version():
    tables = PageTables(1000, 1000)
    versions = [tables.version]

    def changed() -> bool:
        versions.append(tables.version)
        return versions[-1] != versions[-2]

    for seqnr, expected in [(1, True), (2, True), (3, False), (4, False)]:
        observe(tables, [1, 2], [4, 5], seqnr)
        tables.finish(1, seqnr)
        assert changed() is expected, seqnr
    observe(tables, [1, 2], [4, 6], 5)
    assert changed()
    tables.known(1, 6, now=1, still_since=0)
    assert not changed()
    tables.forget_pages(1, np.array([9], np.uint64))
    assert not changed()
    tables.forget_pages(1, np.array([2], np.uint64))
    assert changed()
    tables.forget(1)
    assert changed()


def test_forgetting_a_target_leaves_the_others():
    tables = PageTables(1000, 1000)
    for seqnr in (1, 2):
        for slot in (1, 2):
            observe(tables, [5, 6], [4, 4], seqnr, slot)
    assert tables.forget(1) == 2
    assert members(tables) == [(2, 5, 4), (2, 6, 4)]
    assert tables.forget(1) == 0
    assert observe(tables, [5], [4], 3, slot=1) == [Seen.NEW]


def test_forgotten_pages_are_new_again():
    tables = PageTables(1000, 1000)
    for seqnr in (1, 2):
        observe(tables, [5, 6, 700], [4, 4, 4], seqnr)
    assert tables.forget_pages(1, np.array([700, 5, 9, 5], np.uint64)) == 2
    assert tables.forget_pages(3, np.array([5], np.uint64)) == 0
    assert (tables.rows, tables.stable) == (1, 1)
    assert observe(tables, [5, 6], [4, 4], 3) == [Seen.NEW, Seen.STABLE]


def test_a_full_rmap_table_skips_counts_and_takes_pages_in_again_when_there_is_room():
    tables = PageTables(3, 100)
    pages = [10, 11, 12, 13, 900]
    full = Seen.TABLE_FULL
    assert observe(tables, pages, [1] * 5, 1) == [Seen.NEW] * 3 + [full, full]
    assert (tables.rows, tables.skipped) == (3, 2)
    assert observe(tables, pages, [1] * 5, 2) == [Seen.STABLE] * 3 + [full, full]
    assert (tables.rows, tables.stable, tables.skipped) == (3, 3, 4)
    answer = observe(tables, [10, 12, 13, 900], [1] * 4, 3, span=(0, 1000))
    assert answer == [Seen.STABLE, Seen.STABLE, Seen.NEW, full]
    assert tables.rows == 3


def test_a_full_page_hash_table_skips_stable_pages_until_one_leaves():
    tables = PageTables(100, 2)
    observe(tables, [1, 2, 3], [7, 7, 7], 1)
    full = Seen.TABLE_FULL
    assert observe(tables, [1, 2, 3], [7, 7, 7], 2) == [Seen.STABLE, Seen.STABLE, full]
    assert (tables.rows, tables.stable, tables.skipped) == (3, 2, 1)
    assert members(tables) == [(1, 1, 7), (1, 2, 7)]
    assert observe(tables, [1, 2, 3], [8, 7, 7], 3) == [Seen.VOLATILE, Seen.STABLE, Seen.STABLE]
    assert members(tables) == [(1, 2, 7), (1, 3, 7)]


def test_scattered_pages_do_not_take_more_memory_than_the_table_was_given():
    tables = PageTables(8000, 8000)
    pages = np.arange(0, 100_000 * 64, 64, dtype=np.uint64)  # one page in every block of 64
    sums = np.ones(pages.size, np.uint32)
    answer = tables.observe(1, 0, 100_000 * 64, pages, sums, 1)
    held = int(np.count_nonzero(answer == Seen.NEW))
    assert held == tables.rows == 8000 // 8 + 64
    assert tables.skipped == pages.size - held
    tables.finish(1, 1)
    assert tables.nbytes <= 8000 * 40
    # A page beside one that has a row needs no block of its own.
    pages = np.concatenate(([0, 1], pages[1:])).astype(np.uint64)
    answer = tables.observe(1, 0, 100_000 * 64, pages, np.ones(pages.size, np.uint32), 2)
    assert answer[:2].tolist() == [Seen.STABLE, Seen.NEW]


def test_a_million_dense_pages_weigh_at_most_12_5_bytes_each(capsys):
    npages = 1_000_000
    tables = PageTables(npages, npages)
    rng = np.random.default_rng(1)
    sums = rng.integers(0, 2**32, npages, dtype=np.uint32)
    pages = np.arange(1 << 35, (1 << 35) + npages, dtype=np.uint64)
    for seqnr in (1, 2):
        for at in range(0, npages, 25_000):
            part = slice(at, at + 25_000)
            first = int(pages[at])
            tables.observe(1, first, first + 25_000, pages[part], sums[part], seqnr)
        tables.finish(1, seqnr)
    found = tables.duplicates(NONE)
    assert (tables.rows, tables.stable, tables.skipped) == (npages, npages, 0)
    with capsys.disabled():
        print(f"\n  tables: {tables.nbytes / npages:.3f} bytes per page of {npages:,}")
    assert tables.nbytes <= 12.6 * npages
    _, counts = np.unique(sums, return_counts=True)
    assert len(found) == int(counts[counts > 1].sum())
    tables.forget(1)
    assert (tables.rows, tables.stable) == (0, 0)
    assert tables.nbytes < 1000


def test_memory_is_reused_and_given_back_when_targets_come_and_go():
    tables = PageTables(100_000, 100_000)
    pages = np.arange(0, 20_000, dtype=np.uint64)
    sums = np.arange(1, 20_001, dtype=np.uint32)
    peak = 0
    for slot in range(30):
        for seqnr in (1, 2):
            tables.observe(slot, 0, 20_000, pages, sums, seqnr)
            tables.finish(slot, seqnr)
        assert len(tables.duplicates(NONE)) == (tables.rows if slot else 0)
        peak = max(peak, tables.rows)
        assert tables.nbytes <= 12.6 * peak
        if slot >= 3:
            assert tables.forget(slot - 3) == 20_000
    assert peak == 80_000
    for slot in range(27, 30):
        assert tables.forget(slot) == 20_000
    assert len(tables.duplicates(NONE)) == 0
    assert tables.nbytes < 1000


@pytest.mark.parametrize(
    ("span", "pages", "sums"),
    [
        ((5, 5), [], []),
        ((-1, 5), [], []),
        ((0, 10), [1, 2], [1]),
        ((0, 10), [2, 1], [1, 1]),
        ((0, 10), [2, 2], [1, 1]),
        ((0, 10), [10], [1]),
        ((3, 10), [2], [1]),
    ],
)
def test_what_is_not_a_range_with_ascending_pages_is_refused(span, pages, sums):
    tables = PageTables(10, 10)
    with pytest.raises(ValueError, match="page"):
        observe(tables, pages, sums, span=span)
    assert tables.rows == 0


def test_tables_without_room_are_refused():
    with pytest.raises(ValueError, match="tables of 0"):
        PageTables(0, 10)


def test_the_page_hash_holds_each_checksum_as_often_as_it_was_added_and_not_removed():
    rng = np.random.default_rng(3)
    table, truth = PageHash(), np.empty(0, np.uint32)
    for round_ in range(12):
        many = 150_000 >> (round_ % 5)
        # some occur thousands of times, across the pieces that the table is worked through in
        fresh = rng.choice(rng.integers(1, 2**32, many // 2, dtype=np.uint32) >> (round_ * 2), many)
        table.add(fresh)
        truth = np.concatenate((truth, fresh))
        rng.shuffle(truth)
        gone, truth = truth[: truth.size // 20], truth[truth.size // 20 :]
        table.remove(gone)
        back = gone[: gone.size // 2]
        table.add(back)
        truth = np.concatenate((truth, back))
        assert len(table) == truth.size
        if round_ % 3 == 2:
            values, counts = np.unique(truth, return_counts=True)
            assert table.duplicates(NONE).tolist() == values[counts > 1].tolist()
            assert table.duplicates(np.append(values, 0)).tolist() == values.tolist()
            assert len(table) == truth.size


@pytest.mark.parametrize("kept", [0, 1, 2, 40_000, 70_000])
def test_one_checksum_that_fills_the_page_hash_is_a_duplicate_until_one_is_left(kept):
    table = PageHash()
    table.add(np.full(200_000, 7, np.uint32))
    table.add(np.array([6, 8], np.uint32))
    table.remove(np.full(200_000 - kept, 7, np.uint32))
    assert table.duplicates(NONE).tolist() == [7] * (kept > 1)
    assert table.duplicates(np.array([7], np.uint32)).tolist() == [7] * (kept > 0)
    assert len(table) == kept + 2


@pytest.mark.parametrize("gone", [3, 0xFFFF_FFFF])
def test_a_checksum_that_is_not_there_cannot_be_removed_unnoticed(gone):
    table = PageHash()
    table.add(np.array([1, 2, 5], np.uint32))
    table.remove(np.array([gone], np.uint32))
    with pytest.raises(AssertionError, match="removed that was not there"):
        table.duplicates(NONE)


@pytest.mark.parametrize("count", [1, 2, 500, 60_000])
def test_a_finder_finds_what_is_in_its_set_and_nothing_else(count):
    rng = np.random.default_rng(count)
    # neighbours, which share a place, and both ends of what a checksum may be
    some = rng.integers(1, 2**32 - 1, count, dtype=np.uint32)
    wanted = np.unique(np.concatenate((some, some + 1, [1, 0xFFFF_FFFF]))).astype(np.uint32)
    asked = np.concatenate((wanted, wanted - 1, wanted + 1, [0xFFFF_FFFE, 2])).astype(np.uint32)
    asked = rng.permutation(asked[asked != 0])
    assert np.array_equal(Finder(wanted).found(asked), np.isin(asked, wanted))
