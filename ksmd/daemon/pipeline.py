"""The straight line, as one short function: select, scan, plan, merge, account.

:meth:`Pipeline.full_pass` is what the daemon does, over and over. It is a generator so that the
main loop stays in charge: after each bounded step it gives the seconds to wait before the next.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from ksmd.core.advisor import Advisor
from ksmd.core.budget import step_pages
from ksmd.core.ledger import Ledger
from ksmd.daemon.accounting import Accounting
from ksmd.daemon.exclusive import Exclusive
from ksmd.daemon.merger import Merger
from ksmd.daemon.remerger import Remerger
from ksmd.daemon.scanner import Scanner, ScanResult
from ksmd.daemon.targets import Targets
from ksmd.daemon.unmerger import Unmerger
from ksmd.daemon.windows import MergeResult, Windows
from ksmd.guard.client import Pager
from ksmd.kernel import footprint
from ksmd.remap.engine import Engine
from ksmd.settings.values import Settings

#: Passes after which `scan --until-settled` gives up on memory that keeps changing.
MAX_PASSES = 50
_IDLE_PASSES = 3
#: Pages that are looked at between two looks at sockets, where nobody says: some 16 ms; and the
#: fewest that are looked at before a sleep.
_ASKED_PAGES = 1 << 14
_LEAST_PAGES = 1 << 13


@dataclass(frozen=True, slots=True)
class PassResult:
    """One full scan and what was merged after it, in pages.

    ``exhausted``: whatever has to wait for its turn has had it, and nothing was merged since.
    """

    scan: ScanResult
    merge: MergeResult
    exhausted: bool

    @property
    def settled(self) -> bool:
        """Nothing merged, no page was new, nobody left: another pass would do no more."""
        scan, merge = self.scan, self.merge
        left = merge.changed or merge.postponed or scan.new or scan.gone
        return self.exhausted and not left


@dataclass(frozen=True, slots=True)
class AskedResult:
    """What a scan that somebody asked for did, in pages."""

    scanned: int
    merged: int
    settled: bool
    passes: int


class Pipeline:
    """All that works on targets, wired up."""

    def __init__(self, targets: Targets, engine: Engine, pager: Pager) -> None:
        self.targets = targets
        self.scanner = Scanner(targets)
        self.windows = Windows(targets, engine, pager)
        self.merger = Merger(targets, self.windows)
        self.remerger = Remerger(targets, self.windows)
        self.ledger = Ledger()
        self.accounting = Accounting(targets, pager, self.ledger)
        self.unmerger = Unmerger(targets, self.windows, self.accounting)
        self.last: PassResult | None = None
        self.volatile = 0
        self.merging = Exclusive()
        self._advisor = Advisor()

    @property
    def _settings(self) -> Settings:
        return self.targets.settings

    def full_pass(self, asked: bool, again: bool = False) -> Iterator[float]:
        """Scan everything once and merge what the scan found; sets :attr:`last`.

        *again*: the pass before was asked for by the same caller.
        """
        for _ in self.targets.refreshing(if_changed=again or not asked):
            yield 0.0
        scan = ScanResult()
        batch, page_pause = self._batch(asked)
        least = self._sleep(asked)
        began, slept = time.monotonic(), 0.0
        for npages in self.scanner.full_scan(batch, scan, eager=asked):
            before = time.monotonic()
            yield max(least, npages * page_pause)
            slept += time.monotonic() - before
        if not asked:
            self._advisor.learn(scan.scanned, time.monotonic() - began - slept)
        self.ledger.full_scans += 1
        self.ledger.pages_scanned += scan.scanned
        self.ledger.pages_skipped += sum(scan.refused.values()) + scan.resting
        self.volatile = scan.volatile + scan.new
        merge = MergeResult()
        if self._settings.run == "merge":
            yield from self._merge(asked, merge)
        self.last = PassResult(scan, merge, self._end_turns(asked, merge))
        if asked or merge.windows:
            self.scanner.rest()
            footprint.settle_down()

    def _batch(self, asked: bool) -> tuple[int, float]:
        """Give how many pages the scan that begins now takes before each sleep; of it, each page's.

        What settings say is kept as a rate: a few pages at a time, by a process whose caches are
        cold, cost four times as much.
        """
        scan = self._settings.scan
        if asked:
            return max(scan.pages_to_scan, _ASKED_PAGES), 0.0
        self._advisor.targets({target.slot for target in self.targets})
        pages = scan.pages_to_scan
        if scan.advisor == "scan-time":
            pages = self._advisor.pages(
                scan_secs=scan.target_scan_time,
                sleep_secs=scan.sleep_millisecs / 1000,
                max_cpu=scan.advisor_max_cpu,
                least=scan.advisor_min_pages_to_scan,
                most=scan.advisor_max_pages_to_scan,
            )
        batch = step_pages(max(pages, _LEAST_PAGES), scan.cpu_percent)
        return batch, self._sleep(asked) / pages

    def _sleep(self, asked: bool) -> float:
        """Give the seconds to sleep after a batch; nobody sleeps while somebody waits."""
        return 0.0 if asked else self._settings.scan.sleep_millisecs / 1000

    def _merge(self, asked: bool, merge: MergeResult) -> Iterator[float]:
        limit = self._settings.scan.max_pages_to_merge
        pause, done = self._sleep(asked), 0
        for step in self.merging.holding(self.merger.merge_pass(asked, merge)):
            if isinstance(step, float):
                yield step
            elif merge.changed - done >= limit:
                done = merge.changed
                yield pause
            else:
                yield 0.0
        self.windows.settle_left_over()
        yield from self._recount(resting=not asked)
        before = merge.windows
        for step in self.merging.holding(self.remerger.remerge_pass(asked, merge)):
            yield step if isinstance(step, float) else 0.0
        if merge.windows != before:
            yield from self._recount()

    def _end_turns(self, asked: bool, merge: MergeResult) -> bool:
        """Tell the sieves what came of the pages whose turn it was; whether all have had it."""
        merged: Counter[str] = Counter()
        for slot, npages in merge.per_slot.items():
            if (target := self.targets.by_slot.get(slot)) is not None:
                merged[target.selected.domain] += npages
        now = self.scanner.now()
        patience = 0 if asked else self._settings.window.interval_secs
        for name, domain in self.targets.domains.items():
            domain.sieve.end(merged[name], eager=asked, now=now, patience=patience)
        return all(domain.sieve.exhausted for domain in self.targets.domains.values())

    def _recount(self, *, resting: bool = False) -> Iterator[float]:
        for _ in self.accounting.recount(resting=resting):
            yield 0.0

    @property
    def _parts(self) -> int:
        """In how many parts the largest domain is scanned."""
        return max((d.sieve.parts for d in self.targets.domains.values()), default=1)

    def asked_scan(self, until_settled: bool) -> Iterator[float | AskedResult]:
        """Scan now (KSM_SCAN): until it settles, or twice at the most.

        In the second pass what had changed before this call can be seen unchanged, and windows that
        came at a bad moment are tried again. Where tables are too small for all, a pass is about a
        part of it, and it settles when each part has had its turn.
        """
        scanned = merged = passes = idle = 0
        settled = False
        while passes < (MAX_PASSES * self._parts if until_settled else 2) and not settled:
            yield from self.full_pass(asked=True, again=passes > 0)
            assert self.last is not None
            passes += 1
            scanned += self.last.scan.scanned
            merged += self.last.merge.changed
            # a target that can never be stopped must not keep the caller waiting for ever
            idle = 0 if self.last.merge.changed or self.last.scan.new else idle + 1
            settled = self.last.settled or idle >= _IDLE_PASSES
            # what had changed before this call may stand still now
            settled = settled and (passes > 1 or not self.last.scan.volatile)
            settled = settled and self.last.exhausted
            yield AskedResult(scanned, merged, settled, passes)
