"""What a scanner covers, and how many pages of it may be merged."""

from __future__ import annotations

import numpy as np

from ksmd.core.eligibility import areas
from ksmd.core.scope import Scope, clip, within
from ksmd.core.tables import Members
from ksmd.model.vma import Area, Vma
from ksmd.model.vmas import Vmas

PAGE = 4096
ZERO = 1


def members(*rows: tuple[int, int, int]) -> Members:
    """Make members of (slot, page, checksum), sorted as the tables give them."""
    table = np.array(sorted(rows), np.uint64).reshape(-1, 3)
    return Members(table[:, 0].astype(np.uint32), table[:, 1], table[:, 2].astype(np.uint32))


def rows(found: Members) -> list[tuple[int, int]]:
    return list(zip(found.slots.tolist(), found.pages.tolist(), strict=True))


def cut(found: Members, scope: Scope, store: tuple[int, ...] = ()) -> list[tuple[int, int]]:
    return rows(within(found, scope, np.array(sorted(store), np.uint32), ZERO))


def everything(limit: int) -> Scope:
    return Scope(None, limit)


def only(slot: int, first: int, end: int, limit: int = 1 << 30) -> Scope:
    return Scope({slot: [(first * PAGE, end * PAGE)]}, limit)


def area(start: int, end: int) -> Area:
    vma = Vma(start * PAGE, end * PAGE, "rw-p", 0, (0, 0), 0, "")
    return Area(start * PAGE, end * PAGE, vma)


def test_of_two_equal_pages_the_second_counts():
    found = members((1, 10, 7), (1, 11, 7), (2, 5, 7))
    assert cut(found, everything(1)) == [(1, 10), (1, 11)]
    assert cut(found, everything(2)) == rows(found)


def test_a_page_that_is_in_the_store_counts_from_the_first():
    found = members((1, 10, 7), (1, 11, 7))
    assert cut(found, everything(1), store=(7,)) == [(1, 10)]


def test_a_page_of_zeros_needs_no_other_and_counts():
    found = members((1, 10, ZERO), (1, 11, ZERO), (1, 12, ZERO))
    assert cut(found, everything(2)) == [(1, 10), (1, 11)]


def test_what_is_not_covered_comes_along_only_as_a_partner():
    found = members((1, 10, 7), (1, 90, 8), (2, 5, 7), (2, 6, 8), (2, 7, 9), (3, 1, 9))
    assert cut(found, only(1, 0, 50)) == [(1, 10), (2, 5)]


def test_partners_elsewhere_do_not_count_against_the_limit():
    found = members((1, 10, 7), (1, 11, 8), (2, 5, 7), (2, 6, 8), (3, 5, 7))
    assert cut(found, only(1, 0, 50, limit=1)) == [(1, 10), (2, 5), (3, 5)]


def test_nothing_is_merged_when_nothing_may_be():
    found = members((1, 10, 7), (2, 5, 7), (1, 11, ZERO))
    assert cut(found, only(1, 0, 50, limit=0)) == []
    assert cut(found, Scope({}, 100)) == []
    assert cut(members(), everything(5)) == []


def test_a_scope_covers_the_targets_that_it_has_ranges_of():
    scope = Scope({1: [(0, PAGE)], 2: []}, 1)
    assert [scope.covers(slot) for slot in (1, 2, 3)] == [True, False, False]
    assert everything(1).covers(3)


def test_areas_are_cut_to_ranges():
    here = [area(0, 10), area(20, 30), area(40, 50)]
    ranges = [(5 * PAGE, 25 * PAGE), (28 * PAGE, 29 * PAGE), (60 * PAGE, 70 * PAGE)]
    found = [(a.start // PAGE, a.end // PAGE) for a in clip(here, ranges)]
    assert found == [(5, 10), (20, 25), (28, 29)]
    assert [piece.vma for piece in clip(here, [(21 * PAGE, 22 * PAGE)])] == [here[1].vma]


def vma(start: int, end: int, path: str = "") -> Vma:
    flags = frozenset({"rd", "wr", "mr", "mw", "me", "ac"})
    return Vma(start * PAGE, end * PAGE, "rw-p", 0, (0, 0), 0, path, flags)


def test_registered_ranges_are_covered_besides_what_a_rule_selects():
    vmas = [vma(10, 20), vma(30, 40, "[heap]"), vma(50, 60)]
    also = ((12 * PAGE, 2), (35 * PAGE, 20))

    def covered(regions) -> list[tuple[int, int]]:
        allowed, _ = areas(Vmas.of(vmas), regions, also=also)
        return [(a.start // PAGE, a.end // PAGE) for a in allowed]

    assert covered(()) == [(12, 14), (35, 40), (50, 55)]
    assert covered("heap") == [(12, 14), (30, 40), (50, 55)]
    assert covered("anon") == [(10, 20), (30, 40), (50, 60)]
    assert covered(((13 * PAGE, 3),)) == [(12, 16), (35, 40), (50, 55)]
