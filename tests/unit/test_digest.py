"""Digests are HMAC-SHA1 over page heads; the cache is bounded and never lies."""

from __future__ import annotations

import hmac
import os
import random

import pytest

from ksmd.core.digest import DIGEST_SIZE, HEAD_SIZE, HeadDigest, Sha1Cache

PAGE = 4096
KEY = b"secret of one domain"


def heads_of(run: bytes) -> bytes:
    return b"".join(run[at : at + HEAD_SIZE] for at in range(0, len(run), PAGE))


def test_the_digest_is_hmac_sha1_over_the_heads_of_a_run():
    run = os.urandom(7 * PAGE)
    digest = HeadDigest(KEY)
    assert digest.of_pages(run) == hmac.digest(KEY, heads_of(run), "sha1")
    assert digest.of_pages(memoryview(run)) == digest.of_heads(heads_of(run))
    assert len(digest.of_pages(run)) == DIGEST_SIZE


def test_one_keyed_digest_serves_many_runs():
    digest = HeadDigest(KEY)
    runs = [os.urandom(PAGE) for _ in range(3)]
    assert [digest.of_pages(run) for run in runs] == [
        hmac.digest(KEY, heads_of(run), "sha1") for run in runs
    ]


def test_only_the_first_128_bytes_of_each_page_count():
    run = bytearray(os.urandom(2 * PAGE))
    digest = HeadDigest(KEY)
    before = digest.of_pages(bytes(run))
    run[PAGE + HEAD_SIZE] ^= 1
    assert digest.of_pages(bytes(run)) == before
    run[PAGE + HEAD_SIZE - 1] ^= 1
    assert digest.of_pages(bytes(run)) != before


def test_another_key_gives_another_digest():
    run = os.urandom(PAGE)
    assert HeadDigest(b"a").of_pages(run) != HeadDigest(b"b").of_pages(run)


def test_parts_of_pages_and_empty_keys_are_refused():
    with pytest.raises(ValueError, match="whole number of pages"):
        HeadDigest(KEY).of_pages(bytes(PAGE - 1))
    with pytest.raises(ValueError, match="page heads"):
        HeadDigest(KEY).of_pages(b"")
    with pytest.raises(ValueError, match="page heads"):
        HeadDigest(KEY).of_heads(bytes(HEAD_SIZE + 1))
    with pytest.raises(ValueError, match="empty key"):
        HeadDigest(b"")


def digest_of(n: int) -> bytes:
    return n.to_bytes(DIGEST_SIZE, "little")


def test_the_cache_returns_what_was_put_for_that_run():
    cache = Sha1Cache(64)
    assert cache.get(0, 1) is None
    cache.put(0, 1, digest_of(7))
    assert cache.get(0, 1) == digest_of(7)
    cache.put(0, 1, digest_of(8))
    assert cache.get(0, 1) == digest_of(8)
    assert len(cache) == 1


def test_a_run_of_another_length_is_a_miss():
    cache = Sha1Cache(64)
    cache.put(5 << 32, 3, digest_of(1))
    assert cache.get(5 << 32, 2) is None
    assert cache.get(5 << 32, 3) == digest_of(1)
    assert cache.get(5 << 32, 0) is None


def test_the_cache_stays_within_its_size_and_only_ever_answers_for_the_page_asked():
    cache = Sha1Cache(100)
    size = cache.nbytes
    rng = random.Random(5)
    truth = {}
    for n in range(5000):
        page = rng.randrange(8) << 32 | rng.randrange(1000)
        truth[page] = (rng.randrange(1, 9), digest_of(n))
        cache.put(page, *truth[page])
        assert cache.get(page, truth[page][0]) == truth[page][1]
    hits = 0
    for page, (npages, digest) in truth.items():
        answer = cache.get(page, npages)
        assert answer in (None, digest)
        hits += answer is not None
    assert 0 < hits <= len(cache) <= 100
    assert cache.nbytes == size


def test_forgetting_an_extent_forgets_its_runs_and_no_others():
    cache = Sha1Cache(4096)
    for extent in (1, 2):
        for index in range(50):
            cache.put(extent << 32 | index, 1, digest_of(index))
    kept = [index for index in range(50) if cache.get(2 << 32 | index, 1) is not None]
    assert kept
    cache.forget_extent(1)
    assert all(cache.get(1 << 32 | index, 1) is None for index in range(50))
    assert [i for i in range(50) if cache.get(2 << 32 | i, 1) is not None] == kept


def test_what_is_no_digest_is_refused():
    with pytest.raises(ValueError, match="19 bytes of digest"):
        Sha1Cache(4).put(0, 1, bytes(19))
    with pytest.raises(ValueError, match="for 0 pages"):
        Sha1Cache(4).put(0, 0, digest_of(0))
    with pytest.raises(ValueError, match="cache of 0 pages"):
        Sha1Cache(0)
