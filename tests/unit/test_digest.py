"""Digests are HMAC-SHA1 over page heads; the cache is bounded and never lies."""

from __future__ import annotations

import hmac
import os
import random

import numpy as np
import pytest

from ksmd.core.digest import (
    DIGEST_SIZE,
    HEAD_SIZE,
    HEADS_AT_MOST,
    HeadDigest,
    Sha1Cache,
    sampled,
)

PAGE = 4096
KEY = b"secret of one domain"


def heads_of(run: bytes) -> bytes:
    return b"".join(run[at : at + HEAD_SIZE] for at in range(0, len(run), PAGE))


def of_pages(digest: HeadDigest, run: bytes) -> bytes:
    pages = np.frombuffer(run, np.uint8).reshape(-1, PAGE)
    return digest.of_runs(pages, np.array([0]), np.array([len(pages)]))[0]


def test_the_digest_is_hmac_sha1_over_the_heads_of_a_run():
    run = os.urandom(7 * PAGE)
    digest = HeadDigest(KEY)
    assert of_pages(digest, run) == hmac.digest(KEY, heads_of(run), "sha1")
    assert of_pages(digest, run) == digest.of_heads(heads_of(run))
    assert len(of_pages(digest, run)) == DIGEST_SIZE


def test_one_keyed_digest_serves_many_runs():
    digest = HeadDigest(KEY)
    runs = [os.urandom(PAGE) for _ in range(3)]
    assert [of_pages(digest, run) for run in runs] == [
        hmac.digest(KEY, heads_of(run), "sha1") for run in runs
    ]


def test_only_the_first_128_bytes_of_each_page_count():
    run = bytearray(os.urandom(2 * PAGE))
    digest = HeadDigest(KEY)
    before = of_pages(digest, bytes(run))
    run[PAGE + HEAD_SIZE] ^= 1
    assert of_pages(digest, bytes(run)) == before
    run[PAGE + HEAD_SIZE - 1] ^= 1
    assert of_pages(digest, bytes(run)) != before


def test_another_key_gives_another_digest():
    run = os.urandom(PAGE)
    assert of_pages(HeadDigest(b"a"), run) != of_pages(HeadDigest(b"b"), run)


def test_parts_of_heads_and_empty_keys_are_refused():
    with pytest.raises(ValueError, match="page heads"):
        HeadDigest(KEY).of_heads(b"")
    with pytest.raises(ValueError, match="page heads"):
        HeadDigest(KEY).of_heads(bytes(HEAD_SIZE + 1))
    with pytest.raises(ValueError, match="empty key"):
        HeadDigest(b"")


def test_runs_are_cut_out_of_pages_wherever_they_lie():
    pages = np.frombuffer(os.urandom(40 * PAGE), np.uint8).reshape(-1, PAGE)
    digest = HeadDigest(KEY)
    first, npages = np.array([3, 0, 39, 5]), np.array([4, 2, 1, 30])
    alone = [
        of_pages(digest, pages[at : at + count].tobytes())
        for at, count in zip(first, npages, strict=True)
    ]
    assert digest.of_runs(pages, first, npages) == alone
    assert digest.of_runs(pages, first[:0], npages[:0]) == []


def test_of_a_long_run_both_ends_and_pages_between_are_covered():
    run, page = sampled(np.array([2, HEADS_AT_MOST, 512]))
    assert page[run == 0].tolist() == [0, 1]
    assert page[run == 1].tolist() == list(range(HEADS_AT_MOST))
    long = page[run == 2].tolist()
    assert (len(set(long)), long[0], long[-1]) == (HEADS_AT_MOST, 0, 511)


def digest_of(n: int) -> bytes:
    return n.to_bytes(DIGEST_SIZE, "little")


def get(cache: Sha1Cache, page: int, npages: int) -> bytes | None:
    digests, known = cache.find(np.array([page], np.uint64), np.array([npages]))
    return bytes(digests[0]) if known[0] else None


def test_the_cache_returns_what_was_put_for_that_run():
    cache = Sha1Cache(64)
    assert get(cache, 0, 1) is None
    cache.put(0, 1, digest_of(7))
    assert get(cache, 0, 1) == digest_of(7)
    cache.put(0, 1, digest_of(8))
    assert get(cache, 0, 1) == digest_of(8)
    assert len(cache) == 1


def test_a_run_of_another_length_is_a_miss():
    cache = Sha1Cache(64)
    cache.put(5 << 32, 3, digest_of(1))
    assert get(cache, 5 << 32, 2) is None
    assert get(cache, 5 << 32, 3) == digest_of(1)
    assert get(cache, 5 << 32, 0) is None


def test_the_cache_stays_within_its_size_and_only_ever_answers_for_the_page_asked():
    cache = Sha1Cache(100)
    size = cache.nbytes
    rng = random.Random(5)
    truth = {}
    for n in range(5000):
        page = rng.randrange(8) << 32 | rng.randrange(1000)
        truth[page] = (rng.randrange(1, 9), digest_of(n))
        cache.put(page, *truth[page])
        assert get(cache, page, truth[page][0]) == truth[page][1]
    hits = 0
    for page, (npages, digest) in truth.items():
        answer = get(cache, page, npages)
        assert answer in (None, digest)
        hits += answer is not None
    assert 0 < hits <= len(cache) <= 100
    assert cache.nbytes == size


def test_forgetting_an_extent_forgets_its_runs_and_no_others():
    cache = Sha1Cache(4096)
    for extent in (1, 2):
        for index in range(50):
            cache.put(extent << 32 | index, 1, digest_of(index))
    kept = [index for index in range(50) if get(cache, 2 << 32 | index, 1) is not None]
    assert kept
    cache.forget_extent(1)
    assert all(get(cache, 1 << 32 | index, 1) is None for index in range(50))
    assert [i for i in range(50) if get(cache, 2 << 32 | i, 1) is not None] == kept


def test_what_is_no_digest_is_refused():
    with pytest.raises(ValueError, match="19 bytes of digest"):
        Sha1Cache(4).put(0, 1, bytes(19))
    with pytest.raises(ValueError, match="for 0 pages"):
        Sha1Cache(4).put(0, 0, digest_of(0))
    with pytest.raises(ValueError, match="cache of 0 pages"):
        Sha1Cache(0)
