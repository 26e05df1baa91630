"""The scanner's place: every byte once in a full scan, whatever comes and goes meanwhile."""

from __future__ import annotations

import pytest

from ksmd.core.cursor import Cursor, Piece
from ksmd.model.units import PAGE_SIZE
from ksmd.model.vma import Area, Vma


def area(first: int, npages: int) -> Area:
    start, end = first * PAGE_SIZE, (first + npages) * PAGE_SIZE
    return Area(start, end, Vma(start, end, "rw-p", 0, (0, 0), 0, ""))


def take(cursor: Cursor, npages: int = 4) -> tuple[int, int, int] | None:
    piece = cursor.next_piece(npages * PAGE_SIZE)
    if piece is None:
        return None
    return piece.slot, piece.start // PAGE_SIZE, piece.end // PAGE_SIZE


def rest(cursor: Cursor, npages: int = 4) -> list[tuple[int, int, int]]:
    found = []
    while (piece := take(cursor, npages)) is not None:
        found.append(piece)
    return found


def test_a_full_scan_walks_every_target_in_order_and_then_says_so() -> None:
    cursor = Cursor()
    cursor.begin({7: [area(10, 6), area(2, 1)], 3: [area(1, 2)]})
    assert rest(cursor) == [(7, 2, 3), (7, 10, 14), (7, 14, 16), (3, 1, 3)]
    assert cursor.seqnr == 1


def test_the_next_full_scan_starts_again_at_the_first_target() -> None:
    cursor = Cursor()
    cursor.begin({1: [area(0, 2)], 2: [area(0, 1)]})
    assert rest(cursor) == rest(cursor) == [(1, 0, 2), (2, 0, 1)]
    assert cursor.seqnr == 2


def test_without_a_target_there_is_no_piece_and_no_scan_is_counted() -> None:
    cursor = Cursor()
    assert cursor.next_piece(PAGE_SIZE) is None
    cursor.begin({})
    assert cursor.next_piece(PAGE_SIZE) is None
    assert cursor.seqnr == 0


def test_targets_without_areas_still_make_a_full_scan() -> None:
    cursor = Cursor()
    cursor.begin({1: [], 2: [area(4, 0)]})
    assert rest(cursor) == []
    assert cursor.seqnr == 1


def test_a_piece_is_whole_pages_and_at_least_one() -> None:
    cursor = Cursor()
    cursor.begin({1: [area(0, 2)]})
    assert cursor.next_piece(PAGE_SIZE + 100) == Piece(1, 0, PAGE_SIZE)
    with pytest.raises(ValueError, match="at least one page"):
        cursor.next_piece(PAGE_SIZE - 1)


def test_a_vanished_target_is_passed_over_wherever_the_cursor_stands() -> None:
    cursor = Cursor()
    cursor.begin({slot: [area(0, 8)] for slot in (1, 2, 3)})
    assert take(cursor) == (1, 0, 4)
    cursor.forget(1)
    cursor.forget(3)
    assert rest(cursor, 8) == [(2, 0, 8)]
    assert rest(cursor, 8) == [(2, 0, 8)]
    cursor.forget(99)


def test_the_last_target_vanishing_ends_the_scan() -> None:
    cursor = Cursor()
    cursor.begin({1: [area(0, 8)]})
    assert take(cursor) == (1, 0, 4)
    cursor.forget(1)
    assert take(cursor) is None
    assert cursor.seqnr == 1
    assert take(cursor) is None
    assert cursor.seqnr == 1


def test_changed_areas_count_from_where_the_cursor_stands() -> None:
    cursor = Cursor()
    cursor.begin({1: [area(0, 8), area(20, 4)], 2: [area(0, 1)]})
    assert take(cursor) == (1, 0, 4)
    cursor.replace(1, [area(0, 2), area(3, 3), area(10, 1)])
    assert rest(cursor) == [(1, 4, 6), (1, 10, 11), (2, 0, 1)]
    assert rest(cursor) == [(1, 0, 2), (1, 3, 6), (1, 10, 11), (2, 0, 1)]


def test_a_new_target_is_met_at_the_end_of_the_scan_under_way() -> None:
    cursor = Cursor()
    cursor.begin({1: [area(0, 4)], 2: [area(0, 4)]})
    assert take(cursor) == (1, 0, 4)
    cursor.replace(5, [area(1, 1)])
    assert rest(cursor) == [(2, 0, 4), (5, 1, 2)]


def test_a_target_registered_before_the_first_scan_is_scanned() -> None:
    cursor = Cursor()
    cursor.replace(5, [area(1, 1)])
    assert rest(cursor) == [(5, 1, 2)]


def test_a_slot_given_to_another_target_is_scanned_from_its_start() -> None:
    cursor = Cursor()
    cursor.begin({1: [area(0, 8)]})
    assert take(cursor) == (1, 0, 4)
    cursor.forget(1)
    cursor.replace(1, [area(0, 2)])
    assert rest(cursor) == [(1, 0, 2)]


def test_a_scan_that_is_begun_anew_is_not_counted() -> None:
    cursor = Cursor()
    cursor.begin({1: [area(0, 8)]})
    assert take(cursor) == (1, 0, 4)
    cursor.begin({2: [area(0, 4)]})
    assert rest(cursor) == [(2, 0, 4)]
    assert cursor.seqnr == 1
