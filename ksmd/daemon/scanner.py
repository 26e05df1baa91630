"""The reading half of the pipeline: candidates from pagemap, read, checksum, tables.

Nothing here writes to another process, and nothing un-shares a page: process_vm_readv is used only
on pages that pagemap calls exclusive, and only those are candidates at all.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from ksmd.core import looks
from ksmd.core.cursor import Piece
from ksmd.core.spans import Spans
from ksmd.daemon import pulse
from ksmd.daemon.foretelling import look
from ksmd.daemon.reader import Reader
from ksmd.daemon.state import Target
from ksmd.daemon.targets import Targets
from ksmd.model.errors import KsmdError, TargetGoneError
from ksmd.model.refusal import Reason
from ksmd.model.tables import Seen
from ksmd.model.units import PAGE_SHIFT

_PIECE_BYTES = 1 << 30
#: Seconds for which a target that has settled and stands still is not scanned: others may write
#: to its memory, or end and leave pages to it that fork had shared.
_SETTLED_SECS = 600.0
#: Pages that enter the tables at once: fewer, and the tables' fixed costs show.
_STEP_PAGES = 1 << 14


@dataclass(slots=True)
class ScanResult:
    """One full scan, in pages; ``new``: seen for the first time, and no candidates for that yet.

    ``first``: seen for the first time, candidates or not.
    """

    scanned: int = 0
    first: int = 0
    new: int = 0
    volatile: int = 0
    resting: int = 0  # left out, because nothing had changed there for a while
    gone: int = 0  # targets: a process that called execve may be one again in the next pass
    refused: Counter[Reason] = field(default_factory=Counter)


class Scanner:
    """One full scan after the other over all targets."""

    def __init__(self, targets: Targets) -> None:
        self._targets = targets
        self._reader = Reader()
        self._seqnr = 0
        self._budget = 0  # pages to scan before the next pause
        self._began = time.monotonic()

    @property
    def seqnr(self) -> int:
        """Number of the full scan that is under way, or was the last."""
        return self._seqnr

    def rest(self) -> None:
        """Keep no memory that only reading needs."""
        self._reader.rest()

    def visit(self, target: Target, piece: Piece, budget: int, result: ScanResult) -> int:
        """Scan up to *budget* pages of a piece out of turn: the address to go on from.

        Whatever full scan is under way takes them for its own.
        """
        span = piece.start >> PAGE_SHIFT, piece.end >> PAGE_SHIFT
        at = self._step(target, Spans([span]), span, budget, self._seqnr, result, out_of_turn=True)
        return at << PAGE_SHIFT

    def full_scan(
        self, pages_to_scan: int, result: ScanResult, *, eager: bool = False
    ) -> Iterator[int]:
        """Scan everything once, adding to *result*; stops after every *pages_to_scan* pages.

        Yields how many it has scanned since it stopped last.

        *eager*: nothing rests, and what is seen for the first time is a candidate at once. The
        merge that follows is the second sight: it takes a page only if it equals a store page of
        the same checksum. Else blocks in which nothing has changed since they were looked at last
        rest: for seconds at first, for minutes in the end.
        """
        self._seqnr += 1  # a scan that was given up has used a number too
        seqnr = self._seqnr
        self._budget = pages_to_scan
        for domain in self._targets.domains.values():
            domain.foresight.begin()
            if domain.sieve.begin():
                domain.tables.clear()
                for one in self._targets:
                    one.settled = None
        for slot in [target.slot for target in self._targets]:
            for _ in self._scan_target(slot, seqnr, result, eager):
                if self._budget <= 0:
                    yield pages_to_scan - self._budget
                    self._budget = pages_to_scan
        for domain in self._targets.domains.values():
            domain.foresight.end()
        for target in self._targets:
            self._targets.tables(target).finish(target.slot, seqnr)
        yield pages_to_scan - self._budget

    def _scan_target(
        self, slot: int, seqnr: int, result: ScanResult, eager: bool
    ) -> Iterator[None]:
        """Scan one target, if it has not gone, within what is left of the budget at each step."""
        target = self._targets.by_slot.get(slot)
        if target is None:
            return
        ground, began, before = target.ground, time.monotonic(), _unsettled(result)
        spent = self._see_whether_it_ran(target)
        if not eager and spent and spent == target.spent and self._has_settled(target):
            assert target.settled is not None
            began = target.settled[1]  # all of it was scanned then, and not now
            ranges = self._known_ranges(target, seqnr, result)
        else:
            ranges = self._ranges(slot, ground.spans, seqnr, result, eager)
        for at, end in ranges:
            while at < end and (target := self._targets.by_slot.get(slot)) is not None:
                scanned = result.scanned
                at = self._step(  # noqa: PLW2901
                    target, ground.spans, (at, end), self._budget, seqnr, result, eager
                )
                self._budget -= result.scanned - scanned
                yield
        if (target := self._targets.by_slot.get(slot)) is not None:
            target.spent = spent  # of which all was looked at
            target.settled = (ground, began) if _unsettled(result) == before else None

    def _ranges(
        self, slot: int, areas: Spans, seqnr: int, result: ScanResult, eager: bool
    ) -> Iterator[tuple[int, int]]:
        """Give the page ranges to look at: near areas as one, without what rests."""
        for at, end in areas.groups():
            target = self._targets.by_slot.get(slot)
            if eager or target is None:
                yield at, end
                continue
            tables = self._targets.tables(target)
            ranges, resting = tables.awake(slot, at, end, seqnr, self.now(), target.still_since)
            result.resting += resting
            yield from ranges

    def _known_ranges(
        self, target: Target, seqnr: int, result: ScanResult
    ) -> Iterator[tuple[int, int]]:
        """Do the same for a target that has not run, and all of which was stable."""
        tables, since = self._targets.tables(target), target.still_since
        ranges, resting = tables.known(target.slot, seqnr, self.now(), since or 0)
        result.resting += resting
        return iter(ranges)

    def _see_whether_it_ran(self, target: Target) -> tuple[int, ...]:
        """Note whether a target has run since it was scanned; give what it has spent so far.

        Memory of one that has not is what it was: processes that are idle cost next to nothing.
        """
        try:
            spent = pulse.spent(target)
        except KsmdError:
            return ()
        if not spent or spent != target.spent:
            target.still_since = looks.since_it_ran(target.still_since or 0, self.now())
        return spent

    @staticmethod
    def _has_settled(target: Target) -> bool:
        """Whether all of a target was stable when it was scanned last, and we changed nothing."""
        if target.settled is None:
            return False
        ground, began = target.settled
        recent = target.last_window < began and time.monotonic() < began + _SETTLED_SECS
        return recent and ground is target.ground

    def now(self) -> int:
        """Give seconds since the scanner was made."""
        return int(time.monotonic() - self._began)

    def _step(
        self,
        target: Target,
        areas: Spans,
        span: tuple[int, int],
        budget: int,
        seqnr: int,
        result: ScanResult,
        eager: bool = False,
        out_of_turn: bool = False,
    ) -> int:
        """Scan up to *budget* pages of the *areas* in *span*: the page to go on from.

        What lies between areas is looked at in passing, and neither read nor counted. Pages that
        wait for their turn, while the tables are too small for all, are read and left.
        """
        domain = self._targets.domain(target)
        at, end = span
        try:
            present = target.pagemap.present(
                at << PAGE_SHIFT,
                end << PAGE_SHIFT,
                min(budget, _STEP_PAGES),
                files=not areas.hold(at, end),
            )
            target.huge |= bool(present.huge.any())
            found = present.pages[areas.find(present.pages)[1]]
            pages = found[target.pagemap.exclusive_of(found)]
            result.refused[Reason.FORK_SHARED] += len(found) - len(pages)
            if eager:
                pages, checksums = look(self._reader, domain, target, pages)
            else:
                pages, checksums = self._reader.read(target.memory, pages, domain.seed)
            if not out_of_turn:
                mine = domain.sieve.choose(pages, checksums)
                result.refused[Reason.TABLE_FULL] += int(np.count_nonzero(~mine))
                pages, checksums = pages[mine], checksums[mine]
        except TargetGoneError:
            result.gone += 1
            self._targets.drop(target)
            return end
        walk_end = max(present.walk_end >> PAGE_SHIFT, at + 1)
        second = looks.second_of(target.still_since or 0, self.now())
        seen = domain.tables.observe(
            target.slot, at, walk_end, pages, checksums, seqnr, eager=eager, now=second
        )
        counts = np.bincount(seen, minlength=len(Seen))
        result.scanned += len(found)
        result.first += int(counts[Seen.NEW])
        result.new += 0 if eager else int(counts[Seen.NEW])
        result.volatile += int(counts[Seen.VOLATILE])
        result.refused[Reason.TABLE_FULL] += int(counts[Seen.TABLE_FULL])
        if not out_of_turn:
            domain.sieve.skip(int(counts[Seen.TABLE_FULL]))
        return walk_end


def _unsettled(result: ScanResult) -> tuple[int, ...]:
    """Count what a scan has to see again, or others may have to."""
    left = result.refused[Reason.FORK_SHARED], result.refused[Reason.TABLE_FULL]
    return result.first, result.volatile, result.gone, *left
