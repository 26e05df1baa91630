"""Checksums are xxh3_64 under the domain's seed, and 0 is left free for the tables."""

from __future__ import annotations

import mmap
import os

import numpy as np
import pytest
import xxhash

from ksmd.core.checksum import Checksummer, low32, sums64_of, sums_of, zero_sum

PAGE = 4096
SEED = 0xFEDC_BA98_7654_3210


def expected(page: bytes, seed: int) -> int:
    return max(xxhash.xxh3_64_intdigest(page, seed) & 0xFFFF_FFFF, 1)


def test_sums_are_those_of_the_pages_read_into_the_buffer():
    summer = Checksummer(npages=8)
    data = os.urandom(5 * PAGE)
    summer.buffer[: len(data)] = data
    sums = summer.sums(5, SEED)
    assert sums.dtype == np.uint32
    assert sums.tolist() == [expected(data[i * PAGE : (i + 1) * PAGE], SEED) for i in range(5)]


def test_the_buffer_can_be_read_into_again():
    summer = Checksummer(npages=2)
    before = summer.sums(2, SEED).tolist()
    assert before == [zero_sum(SEED), zero_sum(SEED)]
    summer.buffer[PAGE] = 1
    assert summer.sums(2, SEED)[0] == zero_sum(SEED)
    assert summer.sums(2, SEED)[1] == expected(b"\1" + bytes(PAGE - 1), SEED)


def test_the_buffer_is_writable_bytes_on_a_page_boundary():
    for npages in (1, 7, 1024):
        buffer = Checksummer(npages).buffer
        assert not buffer.readonly
        assert (buffer.nbytes, buffer.itemsize) == (npages * PAGE, 1)
        assert np.frombuffer(buffer, np.uint8).ctypes.data % PAGE == 0


def test_zero_is_the_checksum_of_a_zero_page_and_depends_on_the_seed():
    zeros = {zero_sum(seed) for seed in range(8)}
    assert len(zeros) == 8
    assert zero_sum(3) == expected(bytes(PAGE), 3)


def test_another_seed_gives_other_checksums():
    page = memoryview(os.urandom(PAGE))
    assert sums64_of(page, 1)[0] != sums64_of(page, 2)[0]


def test_checksums_that_mean_more_to_the_tables_become_their_neighbours():
    sums = np.array([0, 1, 5 << 32, (5 << 32) | 9, 2**64 - 1], np.uint64)
    assert low32(sums).tolist() == [1, 1, 1, 9, 2**32 - 2]


def test_sums_of_a_mapping_equal_those_of_the_buffer():
    data = os.urandom(3 * PAGE) + bytes(PAGE)
    summer = Checksummer(npages=4)
    summer.buffer[:] = data
    with mmap.mmap(-1, len(data)) as mapping:
        mapping[:] = data
        with memoryview(mapping) as view:
            assert sums_of(view, SEED).tolist() == summer.sums(4, SEED).tolist()
            wide = sums64_of(view, SEED)
    assert wide.tolist() == [
        xxhash.xxh3_64_intdigest(data[at : at + PAGE], SEED) for at in range(0, len(data), PAGE)
    ]
    assert wide.tolist() == summer.sums64(4, SEED).tolist()


def test_no_pages_have_no_checksums():
    assert Checksummer(1).sums(0, SEED).size == 0
    assert sums_of(memoryview(b""), 1).size == 0


@pytest.mark.parametrize("n", [-1, 5])
def test_more_pages_than_the_buffer_holds_are_refused(n):
    with pytest.raises(ValueError, match="pages of a buffer of 4"):
        Checksummer(4).sums(n, SEED)


def test_half_a_page_is_refused():
    with pytest.raises(ValueError, match="whole number of pages"):
        sums_of(memoryview(bytes(PAGE + 1)), 1)
    with pytest.raises(ValueError, match="buffer of 0 pages"):
        Checksummer(0)
