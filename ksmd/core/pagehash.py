"""The page hash table: one sorted 64-bit word, checksum << 32 | rmap row, per stable page.

The 2008 patch kept a hash table of lists and mainline KSM a tree, 64 bytes per page. A sorted
column needs 8, and finds all pages that share a checksum in one pass over neighbours.

Changes are buffered and merged when the table is read. Inserting and deleting are the same
operation: a word is appended, the column sorted (stably: timsort sees two sorted runs and only
merges them), and every word that then occurs twice goes away with its twin. So a change of 1 % of
16 million pages is one pass of merging and one of compaction, both in place, instead of 160,000
searches that miss the cache.

Only the small buffer is sorted from scratch. numpy's AVX-512 sort of 64-bit words is four to five
times slower than its AVX2 sort on some CPUs (Zen 4), so the daemon has numpy do without it there
(kernel/cpu.py); tests/bench/bench_tables.py shows which way a machine goes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ksmd.core.sets import distinct

# Compaction works through the column in pieces that stay in the second-level cache.
_CHUNK = 1 << 16

# The buffer is merged early when it outgrows both of these: a fraction of the table (so that
# filling it costs a fixed number of passes) and a floor (so that small tables do not bother).
_BUFFER_FRACTION = 8
_BUFFER_FLOOR = 1 << 15


def words_of(checksums: NDArray[np.uint32], rows: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """Pack checksums and rmap rows into words."""
    words = checksums.astype(np.uint64)
    words <<= np.uint64(32)
    words |= rows.astype(np.uint64)
    return words


class PageHash:
    """A set of words. ``len()`` is exact at any time, buffered changes included."""

    def __init__(self) -> None:
        self._words: NDArray[np.uint64] = np.empty(0, np.uint64)
        self._pending: list[NDArray[np.uint64]] = []
        self._npending = 0
        self._size = 0

    def __len__(self) -> int:
        return self._size

    @property
    def nbytes(self) -> int:
        """Bytes of the column and of the changes that wait to be merged."""
        return self._words.nbytes + 8 * self._npending

    def add(self, words: NDArray[np.uint64]) -> None:
        """Insert words that are not in the table, each once."""
        self._size += words.size
        self._defer(words)

    def remove(self, words: NDArray[np.uint64]) -> None:
        """Delete words that are in the table, each once."""
        self._size -= words.size
        self._defer(words)

    def remove_rows(self, gone: NDArray[np.bool_]) -> None:
        """Delete the words of every row that is set in ``gone`` (one bool per rmap row).

        One pass over the table without a sort: for whole targets, where :meth:`remove` would sort
        as many words as the table holds.
        """
        self._merge()
        words = self._words
        self._size = _compact(
            words, lambda start, end: ~gone[words[start:end].view(np.uint32)[::2]]
        )
        self._words.resize(self._size, refcheck=False)

    def rows_of_duplicates(self, wanted: NDArray[np.uint32]) -> NDArray[np.uint32]:
        """Return the rows whose checksum occurs twice or more, or is one of ``wanted``.

        ``wanted`` in any order. The rows come in the order of their checksums.
        """
        self._merge()
        words = self._words
        # The high half of each little-endian word, without a copy of the column.
        checksums = words.view(np.uint32)[1::2]
        chosen = np.zeros(words.size, np.bool_)
        if words.size > 1:
            np.equal(checksums[1:], checksums[:-1], out=chosen[1:])
            chosen[:-1] |= chosen[1:]  # numpy buffers overlapping operands: no rippling
        asked = distinct(wanted)
        at = np.searchsorted(words, asked.astype(np.uint64) << 32)
        inside = at < words.size
        at, asked = at[inside], asked[inside]
        # The first word of each checksum; where there is a second, both are chosen already.
        chosen[at[checksums[at] == asked]] = True
        rows: NDArray[np.uint32] = words.view(np.uint32)[::2][chosen]
        return rows

    def _defer(self, words: NDArray[np.uint64]) -> None:
        if not words.size:
            return
        self._pending.append(words)
        self._npending += words.size
        if self._npending > max(_BUFFER_FLOOR, self._words.size // _BUFFER_FRACTION):
            self._merge()

    def _merge(self) -> None:
        if not self._pending:
            return
        changes = _odd_ones(np.concatenate(self._pending))
        self._pending.clear()
        self._npending = 0
        if not changes.size:
            return
        old = self._words.size
        # In place: the column is the largest thing the daemon owns, and nothing here holds a view.
        self._words.resize(old + changes.size, refcheck=False)
        self._words[old:] = changes
        self._words.sort(kind="stable")
        self._words.resize(_cancel_pairs(self._words), refcheck=False)
        assert self._words.size == self._size, "a word was added twice, or removed and not there"


def _odd_ones(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Sort and keep, once, each word that occurs an odd number of times.

    A word's changes alternate between insertion and deletion, so an even number of them is none.
    """
    words.sort()
    starts = np.flatnonzero(np.concatenate(([True], words[1:] != words[:-1])))
    if starts.size == words.size:
        return words
    counts = np.diff(starts, append=words.size)
    odd: NDArray[np.uint64] = words[starts[counts % 2 == 1]]
    return odd


def _cancel_pairs(words: NDArray[np.uint64]) -> int:
    """Take every pair of equal neighbours out of ``words``, in place; return how many stay.

    No word occurs more than twice.
    """

    def keep(start: int, end: int) -> NDArray[np.bool_] | None:
        chunk = words[start:end]
        pairs = np.flatnonzero(chunk[1:] == chunk[:-1])
        if not pairs.size and not twins[start // _CHUNK] and not twins[-(-end // _CHUNK)]:
            return None
        kept = np.ones(chunk.size, np.bool_)
        kept[pairs] = False
        kept[pairs + 1] = False
        kept[0] &= not twins[start // _CHUNK]
        kept[-1] &= not twins[-(-end // _CHUNK)]
        return kept

    # Pairs that lie across two chunks, found before compaction moves either half.
    edges = np.arange(_CHUNK, words.size, _CHUNK)
    twins = [False, *(words[edges] == words[edges - 1]).tolist(), False]
    return _compact(words, keep)


def _compact(
    words: NDArray[np.uint64], keep: Callable[[int, int], NDArray[np.bool_] | None]
) -> int:
    """Move the words to keep to the front, in place; return how many there are.

    ``keep(start, end)`` says which of words[start:end] stay, None for all. It is asked for one
    chunk after the other, before anything at or behind ``start`` has moved.
    """
    kept = 0
    for start in range(0, words.size, _CHUNK):
        end = min(words.size, start + _CHUNK)
        stay = keep(start, end)
        chunk = words[start:end] if stay is None else words[start:end][stay]
        if kept != start or chunk.size != end - start:
            words[kept : kept + chunk.size] = chunk
        kept += chunk.size
    return kept
