"""Whose turn it is when the tables cannot hold all pages: equal pages have theirs together.

A table that is full skips what does not fit. Were that whatever comes last, a host with much memory
would merge nothing at all: the first targets would fill the table, and nobody would ever meet them.
So the pages of a domain that are too many are cut into parts of which each fits, and the parts take
turns. What decides is content alone, since equal pages lie at different addresses; but page by page
that would tear runs apart, and merged memory costs a mapping for each run. So it is decided by
stretches: a page whose checksum is a multiple of some number opens one, and so does the first of
neighbouring pages; all of a stretch goes with the page that opens it. The same run in two targets
is cut at the same places. Where a run is short, what lies before it decides instead; so after all
parts have had their turn in long stretches they have it in shorter ones, and in the end page by
page.
"""

from __future__ import annotations

import numpy as np

from ksmd.core.rmap import U32, U64, Bools

#: Pages of a stretch, on average, in the rounds that follow each other.
SCALES = (512, 32, 1)
#: The most parts that are cut page by page: blocks of the rmap table hold neighbours, and of more
#: parts each page would take a block of its own.
_MOST_SINGLE = 8
#: How far a part is to fill the tables: parts are not equally large.
_FILL = 0.8
#: Looks after which a page that does not change is a candidate; an eager scan is worth as many.
_LOOKS = 2
_SPREAD = np.uint32(0x9E37_79B1)  # 2**32 / golden ratio: checksums that open stretches are alike


class Sieve:
    """Chooses the pages of one domain whose turn it is, for tables of *capacity* pages."""

    def __init__(self, capacity: int) -> None:
        self._most = max(1, int(capacity * _FILL))
        self.parts = 1
        self._turn = self._looks = 0
        self._seen = self._skipped = 0
        self._idle = 0  # turns since something was merged
        self._moves = self._begun = self._united = False
        self._stays = 0  # until then, in seconds, no other part gets its turn

    # one scan

    def begin(self) -> bool:
        """Begin a scan: whether another part has its turn now, so that tables are to be emptied."""
        moves, self._moves = self._moves, False
        self._begun, self._seen, self._skipped = True, 0, 0
        return moves

    def choose(self, pages: U64, checksums: U32) -> Bools:
        """Tell which of *pages* (uint64, ascending) with their *checksums* (uint32) may come in."""
        self._seen += pages.size
        if self.parts == 1 or not pages.size:
            return np.ones(pages.size, np.bool_)
        scale = self._scales[self._turn // self.parts % len(self._scales)]
        opens = checksums % np.uint32(scale) == 0
        opens[0] = True
        opens[1:] |= pages[1:] != pages[:-1] + np.uint64(1)
        opener = np.maximum.accumulate(np.where(opens, np.arange(pages.size), 0))
        mixed = checksums * _SPREAD >> np.uint32(8)
        part: U32 = mixed % np.uint32(self.parts)
        chosen: Bools = (part == self._turn % self.parts)[opener]
        return chosen

    def skip(self, npages: int) -> None:
        """Take note of pages for which the tables had no room."""
        self._skipped += npages

    def end(self, merged: int, *, eager: bool, now: int, patience: int = 0) -> None:
        """End a scan, after which *merged* pages were merged; nothing, where none was begun.

        *now*, seconds; *patience*: for so long somebody may have to wait until he may be stopped.
        """
        if not self._begun:
            return
        self._begun = False
        wanted = -(-self._seen // self._most)
        self._united = False
        if self.parts == 1:
            if self._skipped and wanted > 1:
                self.parts, self._turn, self._looks, self._idle = wanted, 0, 0, 0
                self._moves = True
            return
        if wanted <= 1:  # all fit in again, and have not been there together yet
            self.parts, self._united = 1, True
            return
        if merged or not self._looks:
            self._stays = now + patience
        self._looks += _LOOKS if eager else 1
        self._idle = -1 if merged else self._idle
        if self._looks < _LOOKS or now < self._stays:
            return
        self._moves, self._looks = True, 0
        self._turn += 1
        self._idle += 1
        if self._turn % self.parts == 0:
            self._turn = self._turn // self.parts % len(self._scales) * wanted
            self.parts = wanted

    # all scans

    @property
    def _scales(self) -> tuple[int, ...]:
        return SCALES if self.parts <= _MOST_SINGLE else SCALES[:-1]

    @property
    def exhausted(self) -> bool:
        """Whether every part has had its turn in every scale since something was merged."""
        if self.parts == 1:
            return not self._united
        return self._idle >= self.parts * len(self._scales)
