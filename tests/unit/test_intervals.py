"""Intervals: what the examples of the ledger need; the model test is in tests/property."""

from __future__ import annotations

from ksmd.guard.intervals import Intervals


def test_touching_and_overlapping_ranges_become_one() -> None:
    ranges = Intervals([(10, 20), (30, 40), (20, 30), (5, 12)])
    assert list(ranges) == [(5, 40)]
    assert ranges.size == 35


def test_empty_ranges_change_nothing() -> None:
    ranges = Intervals([(10, 20)])
    ranges.add(30, 30)
    ranges.remove(15, 15)
    ranges.remove(18, 12)
    assert list(ranges) == [(10, 20)]
    assert ranges.within(15, 15) == []
    assert ranges.first(15, 15) is None


def test_removing_from_the_middle_splits() -> None:
    ranges = Intervals([(0, 100)])
    ranges.remove(40, 60)
    assert list(ranges) == [(0, 40), (60, 100)]
    assert 39 in ranges
    assert 40 not in ranges
    assert 59 not in ranges
    assert 60 in ranges
    assert 100 not in ranges


def test_removing_across_ranges_keeps_the_outer_parts() -> None:
    ranges = Intervals([(0, 10), (20, 30), (40, 50)])
    ranges.remove(5, 45)
    assert list(ranges) == [(0, 5), (45, 50)]


def test_within_and_first_are_cut_to_the_question() -> None:
    ranges = Intervals([(0, 10), (20, 30), (40, 50)])
    assert ranges.within(5, 45) == [(5, 10), (20, 30), (40, 45)]
    assert ranges.first(12, 45) == (20, 30)
    assert ranges.first(25, 27) == (25, 27)
    assert ranges.first(10, 20) is None
    assert ranges.first(60, 70) is None


def test_a_moved_range_replaces_what_was_at_its_new_place() -> None:
    ranges = Intervals([(0, 10), (100, 140)])
    ranges.move(5, 25, 110)
    assert list(ranges) == [(0, 5), (100, 115), (130, 140)]


def test_a_move_onto_itself_by_overlap_keeps_all_of_the_moved() -> None:
    ranges = Intervals([(0, 10)])
    ranges.move(0, 10, 4)
    assert list(ranges) == [(4, 14)]


def test_a_copy_is_independent() -> None:
    ranges = Intervals([(0, 10)])
    copy = ranges.copy()
    copy.remove(0, 5)
    assert list(ranges) == [(0, 10)]
    assert ranges != copy
    copy.clear()
    assert not copy
    assert ranges


def test_difference_leaves_both_sides_alone() -> None:
    left, right = Intervals([(0, 10), (20, 30)]), Intervals([(5, 25)])
    assert list(left.difference(right)) == [(0, 5), (25, 30)]
    assert left.size == 20
    assert right.size == 20
