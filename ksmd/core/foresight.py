"""What a page holds, told from its neighbours: so that equal memory is read once, not twice.

Who merges reads every page twice, once for its checksum and once for the byte compare that decides.
Where processes hold the same arrays, the first is mostly spared: when one of sixteen pages equals,
each time, the page that lies as far away in memory that was read before, those between them most
likely do, too. Their checksums are taken from there, as foretold. Such a checksum is a candidate
like any other, and no more; where the compare finds that it was wrong, the page counts as not read.

How far away is found by landmarks: pages whose checksum is a multiple of some number. So the same
pages are landmarks wherever they lie.

Pure, and kept for one full scan only; what was foretold is known until the next one begins.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ksmd.core.rmap import U32, U64, Bools
from ksmd.core.sets import places_in
from ksmd.core.spans import Spans

#: Every so many pages one is read where the rest may be foretold.
STRIDE = 16
#: One of 128 pages is a landmark: one whose checksum has none of these bits.
_LANDMARK_BITS = np.uint32(127)
#: Landmarks that must lie equally far from their likes, at the least, and of all that have any.
_LEAST_VOTES, _LEAST_SHARE = 3, 0.6
#: Landmarks that are kept apart, until they are put among the others.
_MOST_NEW = 1024
#: Of the pages that were read so many must be what was expected; else a source is given up.
_LEAST_RIGHT = 0.5
#: Of a target's foretold records that were compared one in so many may be wrong, or so many in all.
_MOST_WRONG, _SOME_WRONG = 4, 2


class Source(NamedTuple):
    """Where the likes of a target's pages are: in target ``slot``, ``ahead`` pages further up."""

    slot: int
    ahead: int

    def of(self, pages: U64) -> U64:
        """Give the likes of *pages* (uint64), which may lie anywhere, or nowhere."""
        return (pages.astype(np.int64) + self.ahead).astype(np.uint64)


class _Landmarks:
    """Checksums, ascending and each once, and whose they were first: columns."""

    def __init__(self) -> None:
        self.sums: U32 = np.empty(0, np.uint32)
        self.slots: U32 = np.empty(0, np.uint32)
        self.pages: U64 = np.empty(0, np.uint64)

    @property
    def size(self) -> int:
        return self.sums.size

    @property
    def nbytes(self) -> int:
        return self.sums.nbytes + self.slots.nbytes + self.pages.nbytes

    def find(self, sums: U32) -> tuple[NDArray[np.intp], Bools]:
        return places_in(sums, self.sums)

    def add(self, sums: U32, slots: U32, pages: U64) -> None:
        """Add what is not there; of equal ones the first counts."""
        sums = np.concatenate((self.sums, sums))
        order = np.argsort(sums, kind="stable")
        ordered = sums[order]
        order = order[np.append(True, ordered[1:] != ordered[:-1])[: ordered.size]]
        self.sums = sums[order]
        self.slots = np.concatenate((self.slots, slots))[order]
        self.pages = np.concatenate((self.pages, pages))[order]


class Foresight:
    """Landmarks of one trust domain in the scan that is under way, and what was foretold in it."""

    def __init__(self, zero: int) -> None:
        """*zero*: the checksum of pages of zeros, which are alike everywhere."""
        self._zero = np.uint32(zero)
        self.begin()

    def begin(self) -> None:
        """Begin a scan: what was known is of the past."""
        self.end()
        self._foretold: dict[int, list[tuple[int, int]]] = {}
        self._spans: dict[int, Spans] = {}  # the same, put together where somebody has asked
        self._records: dict[int, tuple[int, int]] = {}

    def end(self) -> None:
        """End a scan: what was foretold in it is still known, but nothing more will be."""
        self._old, self._new = _Landmarks(), _Landmarks()
        self._sources: dict[int, Source] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the landmarks."""
        return self._old.nbytes + self._new.nbytes

    def source(self, slot: int) -> Source | None:
        """Give where the likes of a target's next pages are thought to be."""
        return self._sources.get(slot)

    def learn(self, slot: int, pages: U64, checksums: U32) -> None:
        """Take in pages of a target that were read: landmarks, and where their likes are."""
        chosen = np.flatnonzero(checksums & _LANDMARK_BITS == 0)
        chosen = chosen[checksums[chosen] != self._zero]
        if not chosen.size:
            return
        pages, checksums = pages[chosen], checksums[chosen]
        if slot not in self._sources:
            self._seek(slot, pages, checksums)
        known = self._old.find(checksums)[1] | self._new.find(checksums)[1]
        slots = np.full(pages.size, slot, np.uint32)
        self._new.add(checksums[~known], slots[~known], pages[~known])
        if self._new.size > _MOST_NEW:  # to put each in its place among all would take too long
            self._old.add(self._new.sums, self._new.slots, self._new.pages)
            self._new = _Landmarks()

    def _seek(self, slot: int, pages: U64, checksums: U32) -> None:
        """Let those landmarks vote that were seen before."""
        found = []
        for landmarks in (self._old, self._new):
            at, known = landmarks.find(checksums)
            ahead = landmarks.pages[at[known]].astype(np.int64) - pages[known].astype(np.int64)
            found.append(np.stack((landmarks.slots[at[known]].astype(np.int64), ahead), axis=1))
        votes = np.concatenate(found)
        votes = votes[(votes[:, 0] != slot) | (votes[:, 1] != 0)]
        if not len(votes):
            return
        votes = votes[np.lexsort(votes.T)]
        first = np.flatnonzero(np.append(True, (votes[1:] != votes[:-1]).any(axis=1)))
        counts = np.diff(first, append=len(votes))
        most = int(np.argmax(counts))
        if counts[most] >= max(_LEAST_VOTES, _LEAST_SHARE * len(votes)):
            self._sources[slot] = Source(*votes[first[most]].tolist())

    def foretell(self, slot: int, pages: U64, samples: NDArray[np.intp], right: Bools) -> Bools:
        """Tell which of *pages* need not be read: those between samples that are as expected.

        *samples*: indexes of pages that were read, ascending, the first and the last among them;
        *right*: which of them were what their source says. Gives up the source where few were.
        """
        if np.count_nonzero(right) < _LEAST_RIGHT * right.size:
            del self._sources[slot]
        good = right[1:] & right[:-1]
        steps = np.zeros(pages.size + 1, np.int8)
        steps[samples[:-1][good] + 1] += 1
        steps[samples[1:][good]] -= 1
        between: Bools = np.cumsum(steps[:-1]) > 0
        ends = np.flatnonzero(np.diff(good, prepend=False, append=False)).reshape(-1, 2)
        low, high = pages[samples[ends[:, 0]]], pages[samples[ends[:, 1]]]
        self._spans.pop(slot, None)
        self._foretold.setdefault(slot, []).extend(
            (int(first), int(last) + 1) for first, last in zip(low, high, strict=True)
        )
        return between

    def has_foretold(self, slot: int) -> bool:
        """Tell whether anything was foretold of a target in this scan."""
        return slot in self._foretold

    def foretold(self, slot: int) -> Spans:
        """Give the pages of a target of which something was foretold in this scan."""
        if slot not in self._spans:
            self._spans[slot] = self._together(slot)
        return self._spans[slot]

    def _together(self, slot: int) -> Spans:
        table = np.array(sorted(self._foretold.get(slot, ())), np.uint64).reshape(-1, 2)
        starts, ends = table[:, 0], np.maximum.accumulate(table[:, 1])
        starts[1:] = np.maximum(starts[1:], ends[:-1])  # what was foretold twice counts once
        kept = starts < ends
        return Spans.of(starts[kept], ends[kept])

    def came_true(self, slot: int, records: int, wrong: int) -> bool:
        """Tell, after so many more *records* of a target were compared, if guesses are worth it."""
        before, wrong_before = self._records.get(slot, (0, 0))
        records, wrong = records + before, wrong + wrong_before
        self._records[slot] = records, wrong
        return wrong <= _SOME_WRONG or wrong * _MOST_WRONG <= records


def samples_of(npages: int) -> NDArray[np.intp]:
    """Give the indexes of the pages to read of *npages*, where the others may be foretold."""
    return np.append(np.arange(0, npages - 1, STRIDE), npages - 1)
