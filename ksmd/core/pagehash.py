"""The page hash table: the checksum of every stable page, sorted; 4 bytes a page.

The 2008 patch kept a hash table of lists and mainline KSM a tree, 64 bytes per page. Of what they
tell, a plan needs one thing: which checksums occur twice. A sorted column shows that in one pass
over neighbours. Whose they are is not kept here: the rmap table has every page's checksum, and is
looked through for those that were found (:class:`Finder`), which takes one pass more, but only
where there is something to merge.

Changes are buffered and merged when the table is read. What was added is appended and the column
sorted (stably: timsort sees two sorted runs and only merges them). What was removed is then looked
up and left out in one pass of compaction. Both are in place, and go through the column in order,
in pieces that stay in the second-level cache: 160,000 searches of all of it would miss the cache
each time, for a change of 1 % of 16 million pages.

Only the small buffer is sorted from scratch. numpy's AVX-512 sort is several times slower than its
AVX2 sort on some CPUs (Zen 4), so the daemon has numpy do without it there (kernel/cpu.py);
tests/bench/bench_tables.py shows which way a machine goes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ksmd.core.rmap import U32, Bools, Index
from ksmd.core.sets import among_ordered, distinct

# Checksums that are gone through at a time: they stay in the second-level cache.
_CHUNK = 1 << 16

# The buffer is merged early when it outgrows both of these: a fraction of the table (so that
# filling it costs a fixed number of passes) and a floor (so that small tables do not bother).
_BUFFER_FRACTION = 4
_BUFFER_FLOOR = 1 << 15

# A finder has this many places for each checksum, within these bounds: the more, the fewer share
# one. The upper bound is 64 MiB, while it lives, for a table of 16 million pages or more.
_PLACES = 8
_LEAST_PLACES, _MOST_PLACES = 1 << 10, 1 << 24

_NOT_THERE = "a checksum was removed that was not there"


class PageHash:
    """Checksums, each as often as it was added. ``len()`` is exact, buffered changes included."""

    def __init__(self) -> None:
        self._sums: U32 = np.empty(0, np.uint32)
        self._added: list[U32] = []
        self._removed: list[U32] = []
        self._npending = 0
        self._size = 0

    def __len__(self) -> int:
        return self._size

    @property
    def nbytes(self) -> int:
        """Bytes of the column and of the changes that wait to be merged."""
        return self._sums.nbytes + 4 * self._npending

    def add(self, checksums: U32) -> None:
        """Insert checksums."""
        self._size += checksums.size
        self._defer(self._added, checksums)

    def remove(self, checksums: U32) -> None:
        """Delete checksums, each as often as it is given; so often it must be there."""
        self._size -= checksums.size
        self._defer(self._removed, checksums)

    def duplicates(self, wanted: U32) -> U32:
        """Return, ascending and each once, what occurs twice or more, or is among ``wanted``.

        ``wanted`` in any order; of it, what does not occur is left out.
        """
        self._merge()
        sums = self._sums
        if not sums.size:
            return sums
        # the second of each sequence of equal ones, third and later ones left out
        again = sums[1:] == sums[:-1]
        again[1:] &= ~again[:-1]
        twice = sums[1:][again]
        asked = distinct(wanted)
        return distinct(np.concatenate((twice, asked[among_ordered(asked, sums)])))

    def _defer(self, where: list[U32], checksums: U32) -> None:
        if not checksums.size:
            return
        where.append(checksums)
        self._npending += checksums.size
        if self._npending > max(_BUFFER_FLOOR, self._sums.size // _BUFFER_FRACTION):
            self._merge()

    def _merge(self) -> None:
        if not self._npending:
            return
        added, removed = _sorted(self._added), _sorted(self._removed)
        self._added, self._removed, self._npending = [], [], 0
        # In place: the column is the largest thing the daemon owns, and nothing here holds a view.
        if added.size:
            old = self._sums.size
            self._sums.resize(old + added.size, refcheck=False)
            self._sums[old:] = added
            self._sums.sort(kind="stable")
        if removed.size:
            self._sums.resize(_leave_out(self._sums, removed), refcheck=False)


#: No checksum but the highest can be taken for it, and that is looked up then.
_CROWDED = np.uint32(0xFFFF_FFFF)


class Finder:
    """Finds the checksums of a set among many others: one look at each of those, mostly.

    The upper bits of a checksum say where in a table it would be; the table holds it. Where two of
    the set would be in one place a mark stands for them, and whoever meets it is looked up.
    """

    def __init__(self, checksums: U32) -> None:
        """*checksums* ascend, each once, none is 0."""
        bits = int(_PLACES * checksums.size).bit_length()
        size = min(max(1 << bits, _LEAST_PLACES), _MOST_PLACES)
        self._shift = np.uint32(33 - size.bit_length())
        self._table = np.zeros(size, np.uint32)
        places = checksums >> self._shift
        self._table[places] = checksums
        shared = places[1:] == places[:-1]
        self._table[places[1:][shared]] = _CROWDED
        self._crowded = checksums[self._table[places] == _CROWDED]

    def found(self, checksums: U32) -> Bools:
        """Tell which of *checksums* are in the set; of 0 it tells nothing."""
        there = self._table.take(checksums >> self._shift)
        found: Bools = there == checksums
        if self._crowded.size:
            unclear = np.flatnonzero(there == _CROWDED)
            found[unclear] = among_ordered(checksums[unclear], self._crowded)
        return found


def _sorted(parts: list[U32]) -> U32:
    if not parts:
        return np.empty(0, np.uint32)
    together = np.concatenate(parts)
    together.sort()
    return together


def _leave_out(sums: U32, gone: U32) -> int:
    """Take *gone* out of ``sums``, both ascending, in place; return how many are left.

    A sequence of equal ones may lie in several chunks: what is to go of it and is not in the chunk
    that it begins in is left for those that follow.
    """
    kept = 0
    rest, values = np.empty(0, np.intp), gone[:0]
    for start, mine in _chunks(sums, gone):
        chunk, here = sums[start : start + _CHUNK], 0
        if mine.size or rest.size:
            values = np.concatenate((values, mine))
            places = np.concatenate((rest, np.searchsorted(chunk, mine) + _nth_of_equals(mine)))
            here = int(np.searchsorted(places, chunk.size))
            assert np.array_equal(chunk[places[:here]], values[:here]), _NOT_THERE
            stay = np.ones(chunk.size, np.bool_)
            stay[places[:here]] = False
            rest, values = places[here:] - chunk.size, values[here:]
            chunk = chunk[stay]
        if kept != start or here:
            sums[kept : kept + chunk.size] = chunk
        kept += chunk.size
    assert kept == sums.size - gone.size, _NOT_THERE
    return kept


def _chunks(sums: U32, gone: U32) -> Iterator[tuple[int, U32]]:
    """Cut ``sums`` into chunks: where each starts, and what of *gone* is met first in it."""
    lasts = sums[_CHUNK - 1 : -1 : _CHUNK]  # of all chunks but the last
    cuts = [0, *np.searchsorted(gone, lasts, side="right").tolist(), gone.size]
    for number, start in enumerate(range(0, sums.size, _CHUNK)):
        yield start, gone[cuts[number] : cuts[number + 1]]


def _nth_of_equals(ordered: U32) -> Index:
    """Tell of each how many equal ones come before it."""
    number = np.arange(ordered.size)
    first = np.zeros(ordered.size, np.intp)
    np.multiply(number[1:], ordered[1:] != ordered[:-1], out=first[1:])
    return number - np.maximum.accumulate(first)
