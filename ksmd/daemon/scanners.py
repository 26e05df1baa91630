"""Scanners that callers make (KSM_CREATE_SCAN, KSM_SCAN), and sharing one SMA at once.

Each scanner has a cursor of its own and covers what its caller may touch: everything for root, the
regions of its own connection for everybody else. A call walks on from where the last one ended,
reads a number of pages and merges what they have in common with pages that anybody of the same
trust domain scanned before. Several may be at work at once: they take turns page batch by page
batch, and only one plan at a time is carried out.

A page can be merged when it has been read twice and did not change in between, whoever read it.
So a scanner meets everything twice before a call that is allowed enough pages comes to its end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ksmd.core.cursor import Cursor, Piece
from ksmd.core.scope import Ranges, Scope, clip
from ksmd.daemon.allowance import Allowance
from ksmd.daemon.connection import CallError
from ksmd.daemon.pipeline import Pipeline
from ksmd.daemon.scanner import ScanResult
from ksmd.daemon.state import Domain, Target
from ksmd.daemon.windows import MergeResult
from ksmd.model.process import TargetId
from ksmd.model.refusal import Reason
from ksmd.model.vma import Area

MAX_SCANNERS_PER_CONNECTION = 16
#: Times that a call meets the same page: a third visit would find what the second found.
_VISITS = 2
#: Pages merged under one plan, before others get theirs. A plan looks at all candidates, so it is
#: made for more of them, up to the second number, for as long as nobody waits.
_CHUNK_PAGES = 16384
_LONGEST_CHUNK_PAGES = 65536
_BATCH_PAGES = 1024
_PIECE_BYTES = 1 << 30
_ROOT = 0

#: What a scanner covers: ranges by process, None for every target.
Cover = Callable[[], dict[TargetId, Ranges] | None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one call did, in pages. ``settled``: it left nothing that could be merged at once."""

    scanned: int = 0
    merged: int = 0
    settled: bool = False
    refused: Counter[Reason] = field(default_factory=Counter)


@dataclass(slots=True)
class _Scanner:
    connection: int
    cursor: Cursor = field(default_factory=Cursor)
    rest: Piece | None = None
    midway: bool = False


@dataclass(frozen=True, slots=True)
class _Work:
    """One call: who pays, what it covers, and how much it may do."""

    uid: int
    ranges: dict[int, Ranges] | None
    pages_to_scan: int
    max_pages_to_merge: int


class Scanners:
    """All scanners, by number."""

    def __init__(self, pipeline: Pipeline, allowance: Allowance) -> None:
        self._pipeline = pipeline
        self._targets = pipeline.targets
        self._allowance = allowance
        self._scanners: dict[int, _Scanner] = {}
        self._next = 1

    def create(self, connection: int) -> int:
        """Make a scanner that belongs to a connection; its number."""
        mine = [s for s in self._scanners.values() if s.connection == connection]
        if len(mine) >= MAX_SCANNERS_PER_CONNECTION:
            most = MAX_SCANNERS_PER_CONNECTION
            raise CallError("LimitReached", message=f"a connection has at most {most} scanners",
                            hint="use those there are")  # fmt: skip
        number, self._next = self._next, self._next + 1
        self._scanners[number] = _Scanner(connection)
        return number

    def forget_connection(self, connection: int) -> None:
        """Forget the scanners of a connection that has ended."""
        for number in [n for n, s in self._scanners.items() if s.connection == connection]:
            del self._scanners[number]

    def check(self, connection: int, number: int) -> None:
        """Raise NoSuchScan unless the connection has that scanner."""
        scanner = self._scanners.get(number)
        if scanner is None or scanner.connection != connection:
            raise CallError(
                "NoSuchScan", scan=number, message=f"this connection has no scanner {number}",
                hint="CreateScan makes one; it lives as long as its connection",
            )  # fmt: skip

    # -- the two calls ---------------------------------------------------------------------------

    def scan(
        self, number: int, uid: int, cover: Cover, pages: int, most: int
    ) -> Iterator[float | Outcome]:
        """Walk on with a scanner over *pages* pages, and merge at most *most* of them."""
        scanner = self._scanners[number]
        with self._allowance.charged(uid):
            ranges = self._begin(cover())
        work = _Work(uid, ranges, pages, most)
        found = ScanResult()
        yield from self._allowance.pacing(uid, self._walk(scanner, work, found))
        yield from self._merge(work, found)

    def share(self, uid: int, ranges: dict[TargetId, Ranges]) -> Iterator[float | Outcome]:
        """Read all of *ranges* until each page was seen unchanged, and merge what can be merged."""
        everything = 1 << 62
        with self._allowance.charged(uid):
            begun = self._begin(ranges)
        work = _Work(uid, begun, everything, everything)
        found = ScanResult()
        steps = self._walk(_Scanner(0), work, found)
        yield from self._allowance.pacing(uid, steps)
        yield from self._merge(work, found)

    def _begin(self, cover: dict[TargetId, Ranges] | None) -> dict[int, Ranges] | None:
        """Read the maps of what is covered; its ranges by slot."""
        if cover is None:
            self._targets.refresh()
            return None
        found = {}
        for process, ranges in cover.items():
            target = self._targets.refresh_one(process)
            if target is not None:
                found[target.slot] = ranges
        return found

    # -- reading ---------------------------------------------------------------------------------

    def _walk(self, scanner: _Scanner, work: _Work, found: ScanResult) -> Iterator[float]:
        """Move the cursor on; yields after every batch."""
        areas = self._areas(work)
        self._aim(scanner, areas)
        rounds = _VISITS + scanner.midway
        while found.scanned < work.pages_to_scan and any(areas.values()):
            piece = scanner.rest or scanner.cursor.next_piece(_PIECE_BYTES)
            scanner.rest = None
            scanner.midway = piece is not None
            if piece is None:
                rounds -= 1
                if not rounds:
                    break
                continue
            target = self._targets.by_slot.get(piece.slot)
            if target is None:
                scanner.cursor.forget(piece.slot)
                areas.pop(piece.slot, None)
                continue
            budget = min(_BATCH_PAGES, work.pages_to_scan - found.scanned)
            at = self._pipeline.scanner.visit(target, piece, budget, found)
            if at < piece.end:
                scanner.rest = Piece(piece.slot, at, piece.end)
            yield 0.0
        self._pipeline.ledger.pages_scanned += found.scanned

    def _areas(self, work: _Work) -> dict[int, list[Area]]:
        if work.ranges is None:
            return {target.slot: list(target.areas) for target in self._targets}
        by_slot = self._targets.by_slot
        return {
            slot: list(clip(by_slot[slot].areas, ranges))
            for slot, ranges in work.ranges.items()
            if slot in by_slot
        }

    def _aim(self, scanner: _Scanner, areas: dict[int, list[Area]]) -> None:
        """Give the cursor today's areas, without moving it."""
        scanner.cursor.retain(areas)
        for slot, those in areas.items():
            scanner.cursor.replace(slot, those)
        rest = scanner.rest
        if rest is not None:
            those = areas.get(rest.slot, [])
            inside = next(clip(those, [(rest.start, rest.end)]), None)
            scanner.rest = Piece(rest.slot, inside.start, inside.end) if inside else None

    # -- merging ---------------------------------------------------------------------------------

    def _merge(self, work: _Work, found: ScanResult) -> Iterator[float | Outcome]:
        """Merge what was scanned, plan by plan, so that others come in between."""
        left, postponed, chunk = work.max_pages_to_merge, 0, _CHUNK_PAGES
        refused: Counter[Reason] = Counter()
        for domain in self._domains(work):
            while left > 0 and self._targets.settings.run == "merge":
                result = MergeResult()
                scope = Scope(work.ranges, min(left, chunk))
                steps = self._pipeline.merger.merge_scope(
                    domain, self._asked(domain, work.uid), scope, result
                )
                paid = self._allowance.charging(work.uid, steps)
                for step in self._pipeline.merging.holding(paid):
                    yield step if isinstance(step, float) else 0.0
                refused.update(result.refused)
                left -= (done := _joined(result, scope))
                postponed += result.postponed
                if not done:
                    break
                waited_for = self._pipeline.merging.waiting > 0
                chunk = _CHUNK_PAGES if waited_for else min(2 * chunk, _LONGEST_CHUNK_PAGES)
                count = self._pipeline.accounting.recount(self._touched(result))
                for _ in self._allowance.charging(work.uid, count):
                    yield 0.0
                while (pause := self._allowance.wait(work.uid)) > 0:
                    yield pause
        settled = left > 0 and not postponed and self._targets.settings.run == "merge"
        merged = work.max_pages_to_merge - left
        yield Outcome(found.scanned, merged, settled, refused + found.refused)

    def _domains(self, work: _Work) -> list[Domain]:
        names = {
            target.selected.domain
            for target in self._targets
            if work.ranges is None or work.ranges.get(target.slot)
        }
        return [self._targets.domains[name] for name in sorted(names)]

    def _asked(self, domain: Domain, uid: int) -> bool | frozenset[int]:
        """Whose stops need no pauses: those of the caller's own processes, all of them for root."""
        if uid == _ROOT:
            return True
        return frozenset(
            target.slot
            for target in self._targets
            if target.selected.domain == domain.name and target.selected.process.uid == uid
        )

    def _touched(self, result: MergeResult) -> list[Target]:
        return [target for target in self._targets if target.slot in result.per_slot]


def _joined(result: MergeResult, scope: Scope) -> int:
    """Count the covered pages that share a page with another now, or are zero pages.

    Of pages that went into the store anew one each does not count, and an uncovered one if it can.
    """
    covered = sum(pages for slot, pages in result.per_slot.items() if scope.covers(slot))
    return max(0, min(covered, result.changed - result.new))
