"""Turns for what does not fit into the tables: equal runs come together, and everything comes."""

from __future__ import annotations

import numpy as np
import pytest

from ksmd.core.sieve import SCALES, Sieve

RNG = np.random.default_rng(7)


def sums(npages: int) -> np.ndarray:
    return RNG.integers(1, 2**32, npages, dtype=np.uint32)


def pages(start: int, npages: int) -> np.ndarray:
    return np.arange(start, start + npages, dtype=np.uint64)


def turn(sieve: Sieve, held: list[tuple[np.ndarray, np.ndarray]], capacity: int, **end):
    """Scan *held* once: which pages came in, as many as tables of *capacity* hold."""
    sieve.begin()
    chosen, room = [], capacity
    for at, checksums in held:
        mine = sieve.choose(at, checksums)
        over = np.cumsum(mine) > room
        sieve.skip(int(np.count_nonzero(mine & over)))
        chosen.append(mine & ~over)
        room -= int(np.count_nonzero(chosen[-1]))
    sieve.end(end.pop("merged", 0), eager=end.pop("eager", True), now=end.pop("now", 0))
    return chosen


def test_what_fits_comes_in_whole_and_nothing_is_ever_forgotten() -> None:
    sieve = Sieve(1000)
    for _ in range(5):
        (mine,) = turn(sieve, [(pages(0, 1000), sums(1000))], 1000)
        assert mine.all()
        assert (sieve.parts, sieve.exhausted) == (1, True)
        assert not sieve.begin()


@pytest.mark.parametrize("times", [2, 5, 11])
def test_each_round_gives_every_page_its_turn_once(times: int) -> None:
    capacity = 10_000
    npages = capacity * times * 7 // 10
    held = [(pages(512, npages), sums(npages))]
    sieve = Sieve(capacity)
    turn(sieve, held, capacity)
    assert sieve.parts == -(-npages // (capacity * 8 // 10))
    for _ in range(2):  # scales
        had = np.zeros(npages, int)
        for _ in range(sieve.parts):
            assert sieve.begin()
            (mine,) = turn(sieve, held, npages)
            had += mine
        assert (had == 1).all()


def test_a_run_has_its_turn_at_once_wherever_it_lies_and_in_few_pieces() -> None:
    content = sums(20_000)
    one = pages(0, 20_000), content
    other = pages(777_777, 24_000), np.concatenate((sums(3000), content, sums(1000)))
    sieve = Sieve(12_000)
    turn(sieve, [one, other], 12_000)
    both = torn = 0
    for _ in range(sieve.parts):
        mine, theirs = turn(sieve, [one, other], 44_000)
        both += np.count_nonzero(mine & theirs[3000:23_000])
        torn += np.count_nonzero(np.diff(mine.astype(int)))
    assert both > 0.9 * 20_000
    assert torn < 3 * 20_000 / SCALES[0]


def test_single_pages_meet_in_the_end_whatever_lies_before_them() -> None:
    content = sums(8000)
    shuffled = RNG.permutation(8000)
    held = [(pages(0, 8000), content), (pages(10**6, 8000), content[shuffled])]
    sieve = Sieve(5000)
    turn(sieve, held, 5000)
    met = np.zeros(8000, bool)
    while not sieve.exhausted:
        mine, theirs = turn(sieve, held, 16_000)
        back = np.empty(8000, bool)
        back[shuffled] = theirs
        met |= mine & back
    assert met.all()


def test_without_eagerness_a_part_has_two_looks_and_the_tables_are_emptied_between_parts() -> None:
    held = [(pages(0, 3000), sums(3000))]
    sieve = Sieve(1000)
    turn(sieve, held, 1000, eager=False)
    assert sieve.begin()
    (first,) = turn(sieve, held, 3000, eager=False)
    assert not sieve.begin()
    (again,) = turn(sieve, held, 3000, eager=False)
    assert sieve.begin()
    (other,) = turn(sieve, held, 3000, eager=False)
    assert (first == again).all()
    assert not (first & other).any()


def test_a_part_stays_while_something_is_merged_or_somebody_cannot_be_stopped_yet() -> None:
    held = [(pages(0, 3000), sums(3000))]
    sieve = Sieve(1000)
    turn(sieve, held, 1000)
    stays = []
    for now, merged in [(0, 0), (5, 0), (9, 30), (18, 0), (19, 0)]:
        stays.append(not sieve.begin())
        sieve.choose(*held[0])
        sieve.end(merged, eager=False, now=now, patience=10)
    assert stays == [False, True, True, True, True]
    assert sieve.begin()


def test_when_all_fit_again_they_have_to_meet_once_more() -> None:
    held = [(pages(0, 3000), sums(3000))]
    sieve = Sieve(1000)
    turn(sieve, held, 1000)
    few = [(pages(0, 500), held[0][1][:500])]
    turn(sieve, few, 1000, merged=2500)
    assert (sieve.parts, sieve.exhausted) == (1, False)
    (mine,) = turn(sieve, few, 1000)
    assert mine.all()
    assert sieve.exhausted


def test_a_turn_that_was_given_up_counts_for_nothing() -> None:
    held = [(pages(0, 3000), sums(3000))]
    sieve = Sieve(1000)
    turn(sieve, held, 1000)
    assert sieve.begin()
    sieve.choose(*held[0])
    assert not sieve.begin()
    sieve.end(0, eager=True, now=0)
    sieve.end(0, eager=True, now=0)
    assert not sieve.exhausted
