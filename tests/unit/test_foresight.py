"""What is foretold of pages, and from which of their neighbours."""

from __future__ import annotations

import numpy as np
import pytest

from ksmd.core.foresight import STRIDE, Foresight, Source, samples_of

ZERO = 128 * 7
A, B, C = 3, 4, 9


def sums(n: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 1 << 32, n, np.uint32)


def pages(first: int, n: int) -> np.ndarray:
    return np.arange(first, first + n, dtype=np.uint64)


@pytest.fixture
def foresight() -> Foresight:
    return Foresight(ZERO)


def test_equal_memory_far_away_is_found_by_its_landmarks(foresight: Foresight):
    array = sums(2000)
    foresight.learn(A, pages(5000, 2000), array)
    assert foresight.source(A) is None, "it has no likes"
    foresight.learn(B, pages(1 << 33, 1000), array[500:1500])
    source = foresight.source(B)
    assert source == Source(A, 5500 - (1 << 33))
    assert source.of(pages((1 << 33) + 3, 2)).tolist() == [5503, 5504]


def test_the_first_of_several_likes_is_the_source(foresight: Foresight):
    array = sums(2000)
    for slot, first in ((A, 100), (B, 90_000), (C, 7)):
        foresight.learn(slot, pages(first, 2000), array)
    assert foresight.source(C) == Source(A, 93)


def test_the_same_memory_twice_in_one_target_is_a_source_too(foresight: Foresight):
    array = sums(2000)
    foresight.learn(A, pages(100, 2000), array)
    foresight.learn(A, pages(100, 2000), array)
    assert foresight.source(A) is None, "a page says nothing of itself"
    foresight.learn(A, pages(5000, 2000), array)
    assert foresight.source(A) == Source(A, -4900)


def test_pages_in_another_order_have_no_source(foresight: Foresight):
    array = sums(4000)
    foresight.learn(A, pages(0, 4000), array)
    foresight.learn(B, pages(0, 4000), np.random.default_rng(2).permutation(array))
    assert foresight.source(B) is None


def test_few_landmarks_and_zeros_are_no_ground(foresight: Foresight):
    few = np.array([128, 256, *range(1, 60, 2)], np.uint32)
    zeros = np.full(1000, ZERO, np.uint32)
    for slot in (A, B):
        foresight.learn(slot, pages(0, few.size), few)
        foresight.learn(slot, pages(1000, 1000), zeros)
    assert foresight.source(B) is None
    assert foresight.nbytes == 2 * 16, "each once"


def test_what_lies_between_two_right_samples_is_foretold(foresight: Foresight):
    array = sums(2000)
    foresight.learn(A, pages(0, 2000), array)
    foresight.learn(B, pages(0, 2000), array)
    mine = pages(10_000, 5 * STRIDE + 3)
    samples = samples_of(mine.size)
    assert samples.tolist() == [0, 16, 32, 48, 64, 80, 82]
    right = np.array([True, True, False, True, True, True, True])
    told = foresight.foretell(B, mine, samples, right)
    assert np.flatnonzero(told).tolist() == [*range(1, 16), *range(49, 64), *range(65, 80), 81]
    spans = foresight.foretold(B)
    assert spans.starts.tolist() == [10_000, 10_048]
    assert spans.ends.tolist() == [10_017, 10_083]
    assert foresight.source(B) is not None
    assert not len(foresight.foretold(A))


def test_a_source_that_is_mostly_wrong_is_given_up(foresight: Foresight):
    array = sums(2000)
    foresight.learn(A, pages(0, 2000), array)
    foresight.learn(B, pages(0, 2000), array)
    mine = pages(10_000, 3 * STRIDE + 1)
    told = foresight.foretell(B, mine, samples_of(mine.size), np.array([True, False, False, False]))
    assert not told.any()
    assert foresight.source(B) is None
    assert not len(foresight.foretold(B))


def test_a_new_scan_knows_nothing(foresight: Foresight):
    array = sums(2000)
    foresight.learn(A, pages(0, 2000), array)
    foresight.learn(B, pages(0, 2000), array)
    mine = pages(10_000, 33)
    foresight.foretell(B, mine, samples_of(33), np.ones(3, np.bool_))
    foresight.begin()
    assert foresight.source(B) is None
    assert not len(foresight.foretold(B))
    assert not foresight.nbytes


def test_after_a_scan_it_is_known_what_was_foretold_and_nothing_more(foresight: Foresight):
    array = sums(2000)
    foresight.learn(A, pages(0, 2000), array)
    for first in (5_000, 4_980):  # the same pages twice, and in no order
        foresight.learn(B, pages(0, 2000), array)
        foresight.foretell(B, pages(first, 33), samples_of(33), np.ones(3, np.bool_))
    foresight.end()
    assert not foresight.nbytes
    assert foresight.source(B) is None
    spans = foresight.foretold(B)
    assert (spans.starts.tolist(), spans.ends.tolist()) == ([4_980, 5_013], [5_013, 5_033])


@pytest.mark.parametrize("n", [1, 2, STRIDE, STRIDE + 1, 1000])
def test_the_first_and_the_last_page_are_samples(n: int):
    samples = samples_of(n)
    assert samples[0] == 0
    assert samples[-1] == n - 1
    assert (np.diff(samples) > 0).all()
    assert (np.diff(samples) <= STRIDE).all()


def test_some_wrong_guesses_are_forgiven_many_are_not(foresight: Foresight):
    assert foresight.came_true(A, 0, 0)
    assert foresight.came_true(A, 2, 2)
    assert not foresight.came_true(A, 1, 1), "three of three"
    assert foresight.came_true(B, 9, 2)
    assert foresight.came_true(B, 3, 1), "three of twelve"
    assert not foresight.came_true(B, 1, 1)
    foresight.begin()
    assert foresight.came_true(A, 2, 2)
