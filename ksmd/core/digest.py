"""The second sieve before a stop window: HMAC-SHA1 over page heads, as the 2008 patch had it.

The patch kept an HMAC-SHA1, under a random key, of the first 128 bytes of each shared page and
compared it before it compared pages. Here one digest covers a whole run: the heads of its pages,
one after the other; of a long run, the heads of HEADS_AT_MOST pages spread over it. A run whose
digest differs is dropped without stopping its target; one whose digest matches is still compared
byte for byte.

Why a sample: what costs is not the HMAC (3 us) but to fetch a page's head from the target, which
takes the kernel as long as the whole page (0.7 us): to read all heads would read all memory twice.
Two runs of equal checksums that differ do so because one was written meanwhile or freed, and the
digest is there to spare its target a stop for that; what it misses, the stop finds. Digests of the
store's side do not change, so they are cached by store page.
"""

from __future__ import annotations

import hmac

import numpy as np
from numpy.typing import NDArray

#: Bytes of each page that the digest covers (PAGECMP_OFFSET of the 2008 patch).
HEAD_SIZE = 128

#: Heads that one digest covers.
HEADS_AT_MOST = 16

#: Bytes of a digest.
DIGEST_SIZE = 20

# 2^64 divided by the golden ratio: neighbouring extents land far apart in the cache.
_SPREAD = np.uint64(0x9E37_79B9_7F4A_7C15)


def sampled(npages: NDArray[np.int64]) -> tuple[NDArray[np.intp], NDArray[np.int64]]:
    """Return which pages of runs of *npages* their digests cover: the ends, and some between.

    That is, for each head in order: the number of its run, and of its page in the run.
    """
    heads = np.minimum(npages, HEADS_AT_MOST)
    run = np.repeat(np.arange(npages.size), heads)
    number = np.arange(run.size) - np.repeat(np.cumsum(heads) - heads, heads)
    spread = number * (npages[run] - 1) // (HEADS_AT_MOST - 1)
    return run, np.where(npages[run] <= HEADS_AT_MOST, number, spread)


class HeadDigest:
    """Digests of runs under one secret ``key``, the trust domain's."""

    def __init__(self, key: bytes) -> None:
        if not key:
            raise ValueError("an empty key would let anyone compute digests")
        self._key = key

    def of_runs(
        self, pages: NDArray[np.uint8], first: NDArray[np.int64], npages: NDArray[np.int64]
    ) -> list[bytes]:
        """Return the digests of runs of ``pages`` (uint8, a row for each).

        ``first`` and ``npages`` of each run; IndexError where one reaches beyond the pages.
        """
        run, page = sampled(npages)
        heads = memoryview(pages[first[run] + page, :HEAD_SIZE].tobytes())
        return self.of_all_heads(heads, npages)

    def of_all_heads(self, heads: memoryview, npages: NDArray[np.int64]) -> list[bytes]:
        """Return the digests of runs of ``npages``: *heads* are those of their sampled pages."""
        ends = (np.cumsum(np.minimum(npages, HEADS_AT_MOST)) * HEAD_SIZE).tolist()
        return [self.of_heads(heads[at:end]) for at, end in zip([0, *ends], ends, strict=False)]

    def of_heads(self, heads: memoryview | bytes) -> bytes:
        """Return the digest of a run of whose :func:`sampled` pages the heads were read."""
        size = memoryview(heads).nbytes
        if size == 0 or size % HEAD_SIZE:
            raise ValueError(f"{size} bytes are not a whole number of page heads")
        return hmac.digest(self._key, heads, "sha1")


class Sha1Cache:
    """Digests of runs of store pages, at most ``size_pages`` of them, 32 bytes each.

    Direct-mapped: a run replaces what lay in its place, so the cache never grows and never needs
    to be swept. It is keyed by the store page (extent << 32 | index) at which the run begins and
    holds one run for each; a run of another length is a miss.
    """

    def __init__(self, size_pages: int) -> None:
        if size_pages <= 0:
            raise ValueError(f"a cache of {size_pages} pages")
        self._pages: NDArray[np.uint64] = np.zeros(size_pages, np.uint64)
        self._npages: NDArray[np.uint32] = np.zeros(size_pages, np.uint32)  # 0: nothing here
        self._digests: NDArray[np.uint8] = np.zeros((size_pages, DIGEST_SIZE), np.uint8)

    def __len__(self) -> int:
        return int(np.count_nonzero(self._npages))

    @property
    def nbytes(self) -> int:
        """Bytes of the columns."""
        return self._pages.nbytes + self._npages.nbytes + self._digests.nbytes

    def find(
        self, store_pages: NDArray[np.uint64], npages: NDArray[np.int64]
    ) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Look up the runs of ``npages`` from ``store_pages`` on.

        Returns their digests (uint8, 20 of each) and which of them are known; the others' bytes
        mean nothing.
        """
        at = self._places(store_pages)
        known = (self._npages[at] == npages) & (self._pages[at] == store_pages) & (npages > 0)
        return self._digests[at], known

    def put(self, store_page: int, npages: int, digest: bytes) -> None:
        """Remember a digest, in place of whatever shared its entry."""
        if npages <= 0 or len(digest) != DIGEST_SIZE:
            raise ValueError(f"{len(digest)} bytes of digest for {npages} pages")
        (at,) = self._places(np.array([store_page], np.uint64))
        self._pages[at] = store_page
        self._npages[at] = npages
        self._digests[at] = np.frombuffer(digest, np.uint8)

    def forget_extent(self, extent: int) -> None:
        """Forget every run of an extent; to be called before its id is given back."""
        self._npages[(self._pages >> 32) == extent] = 0

    def _places(self, store_pages: NDArray[np.uint64]) -> NDArray[np.intp]:
        """Give the entries of runs: those of one extent lie side by side, and touch few pages."""
        size, number = np.uint64(self._pages.size), store_pages >> np.uint64(32)
        first = (number * _SPREAD >> np.uint64(32)) % size
        places = (first + (store_pages & np.uint64(0xFFFF_FFFF))) % size
        return places.astype(np.intp)
