"""Checksums of pages: which pages may be equal, never which pages are.

xxh3_64 seeded with a secret of the trust domain; the tables keep its low 32 bits. A match makes a
candidate and nothing more, so the seed only has to keep outsiders from steering collisions, and a
faster or weaker function would cost time (failed compares), never bytes.

Pages are read into one buffer that is reused, and the slices that xxhash is called with are made
once: that leaves about 0.12 us per page to Python, about a seventh of what the read itself costs.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import repeat

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from ksmd.model.units import PAGE_SIZE

#: Never checksums of a page: the tables use them for "no page here" and "not known". Real ones of
#: these become their neighbours.
NO_CHECKSUM = 0
UNKNOWN_CHECKSUM = 0xFFFF_FFFF

_LOW32 = np.uint64(0xFFFF_FFFF)


def low32(sums: NDArray[np.uint64]) -> NDArray[np.uint32]:
    """Return the 32 bits that the tables keep of each 64-bit checksum."""
    return real((sums & _LOW32).astype(np.uint32))


def real(sums: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Return *sums*, none of which means more to the tables than itself."""
    lowest, highest = np.uint32(NO_CHECKSUM + 1), np.uint32(UNKNOWN_CHECKSUM - 1)
    return np.minimum(np.maximum(sums, lowest), highest)


def sums64_of(view: memoryview, seed: int) -> NDArray[np.uint64]:
    """Return the 64-bit checksum of every page of ``view``.

    For estimates, which have no byte compare behind them. ValueError when ``view`` is not a whole
    number of pages.
    """
    pages = _pages_of(view)
    return _digests(pages, len(pages), seed)


def sums_of(view: memoryview, seed: int) -> NDArray[np.uint32]:
    """Return the 32-bit checksum of every page of ``view``, as :meth:`Checksummer.sums` would.

    ValueError when ``view`` is not a whole number of pages.
    """
    return low32(sums64_of(view, seed))


def zero_sum(seed: int) -> int:
    """Return the 32-bit checksum of a page of zeros."""
    return int(sums_of(memoryview(bytes(PAGE_SIZE)), seed)[0])


class Checksummer:
    """Reads of up to ``npages`` pages land in ``buffer``; ``sums`` tells their checksums.

    The buffer starts on a page boundary and lives as long as this object. A seed is 64 bits,
    unsigned. Not for use by two threads at once.
    """

    def __init__(self, npages: int = 1024) -> None:
        if npages <= 0:
            raise ValueError(f"a buffer of {npages} pages")
        raw = np.zeros((npages + 1) * PAGE_SIZE, np.uint8)
        start = -raw.ctypes.data % PAGE_SIZE
        self.buffer = raw.data[start : start + npages * PAGE_SIZE]
        self.npages = npages
        self._slices = _pages_of(self.buffer)

    def sums(self, n: int, seed: int) -> NDArray[np.uint32]:
        """Return the 32-bit checksums of the first ``n`` pages of the buffer."""
        return low32(self.sums64(n, seed))

    def sums64(self, n: int, seed: int) -> NDArray[np.uint64]:
        """Return the 64-bit checksums of the first ``n`` pages of the buffer."""
        if not 0 <= n <= self.npages:
            raise ValueError(f"{n} pages of a buffer of {self.npages}")
        return _digests(self._slices, n, seed)


def _pages_of(view: memoryview) -> list[memoryview]:
    flat = view.cast("B")
    if flat.nbytes % PAGE_SIZE:
        raise ValueError(f"{flat.nbytes} bytes are not a whole number of pages")
    return [flat[at : at + PAGE_SIZE] for at in range(0, flat.nbytes, PAGE_SIZE)]


def _digests(pages: Iterable[memoryview], n: int, seed: int) -> NDArray[np.uint64]:
    return np.fromiter(map(xxh3_64_intdigest, pages, repeat(seed)), np.uint64, count=n)
