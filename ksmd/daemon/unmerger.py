"""Give merged pages back: each becomes anonymous memory of its own again, with its content.

Before anything is changed the memory that this takes is compared with what is available. A target
that cannot be stopped now is tried again a few times; what is left keeps its guard.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ksmd.daemon.accounting import Accounting
from ksmd.daemon.merger import Merger
from ksmd.daemon.prepare import prepare
from ksmd.daemon.state import Target
from ksmd.daemon.targets import Targets
from ksmd.guard.client import Pager
from ksmd.kernel import risks
from ksmd.model.errors import KsmdError, TargetGoneError
from ksmd.model.refusal import Reason
from ksmd.model.units import PAGE_SHIFT, PAGE_SIZE
from ksmd.model.window import Op, Record
from ksmd.remap.engine import Engine
from ksmd.remap.store import MEMORY_RESERVE, Extent

log = logging.getLogger(__name__)

_TRIES = 20
_PAUSE_SECS = 0.1


class NotEnoughMemoryError(KsmdError):
    """Unmerging would take more memory than is available."""


@dataclass(slots=True)
class UnmergeResult:
    """Pages given back, pages left, and why."""

    pages: int = 0
    left: int = 0
    reason: Reason | None = None


class Unmerger:
    """Unmerges targets window by window."""

    def __init__(
        self,
        targets: Targets,
        merger: Merger,
        accounting: Accounting,
        engine: Engine,
        pager: Pager,
    ) -> None:
        self._targets = targets
        self._merger = merger
        self._accounting = accounting
        self._engine = engine
        self._pager = pager

    def check_memory(self, targets: Sequence[Target]) -> None:
        """Raise NotEnoughMemoryError, with figures, where the pages would not fit."""
        needed = sum(len(target.sites) for target in targets) * PAGE_SIZE
        available = risks.mem_available() - MEMORY_RESERVE
        if needed > available:
            raise NotEnoughMemoryError(
                f"unmerging takes {needed >> 20} MiB and only {max(0, available) >> 20} MiB are"
                " available",
                "free memory, unmerge single targets (--pid), or stop with on_stop: keep",
            )

    def unmerge(self, targets: Sequence[Target]) -> Iterator[UnmergeResult]:
        """Unmerge *targets*; gives the running result after every window."""
        yield from self._recount()
        self.check_memory(targets)
        result = UnmergeResult()
        for target in targets:
            for attempt in range(_TRIES):
                if target.slot not in self._targets.by_slot or not target.mappings:
                    break
                if attempt:
                    time.sleep(_PAUSE_SECS)
                try:
                    yield from self._once(target, result)
                    if target.slot in self._targets.by_slot:
                        self._targets.read_mappings(target)
                except TargetGoneError:
                    self._targets.drop(target)
            if target.slot in self._targets.by_slot:
                self._settle(target, result)
        yield from self._recount()
        yield result

    def _recount(self) -> Iterator[UnmergeResult]:
        for _ in self._accounting.recount():
            yield UnmergeResult()

    def _settle(self, target: Target, result: UnmergeResult) -> None:
        left = sum(m.vma.end - m.vma.start for m in target.mappings) >> PAGE_SHIFT
        if left:
            result.left += left
            result.reason = target.refused or Reason.WINDOW_FAILED
            log.warning("pid %d keeps %d merged pages: %s", target.pid, left, result.reason)
        else:
            self._merger.forget_contexts(target)

    def _once(self, target: Target, result: UnmergeResult) -> Iterator[UnmergeResult]:
        if target.contexts is None:
            prepare(target, self._engine, self._pager, self._targets.settings.window.deadline_ms)
        if target.contexts is None:
            return
        limit = self._targets.settings.window.max_pages << PAGE_SHIFT
        runs = self._targets.settings.window.max_runs
        by_extent: dict[int, tuple[Extent, list[Record]]] = defaultdict()
        for mapping in target.mappings:
            extent, vma = mapping.extent, mapping.vma
            records = by_extent.setdefault(extent.number, (extent, []))[1]
            for start in range(vma.start, vma.end, limit):
                length = min(limit, vma.end - start)
                records.append(Record(Op.UNMERGE, start, length, vma.offset + start - vma.start))
        for extent, records in by_extent.values():
            for batch in _batches(records, runs, limit):
                done = self._merger.open(target, batch, extent)
                if done.refused is not None:
                    return
                kept = [o for o in done.outcomes if o.reason is None]
                result.pages += sum(o.record.length for o in kept) >> PAGE_SHIFT
                yield result


def _batches(records: Sequence[Record], max_runs: int, max_bytes: int) -> Iterator[list[Record]]:
    batch: list[Record] = []
    total = 0
    for record in records:
        if batch and (len(batch) == max_runs or total + record.length > max_bytes):
            yield batch
            batch, total = [], 0
        batch.append(record)
        total += record.length
    if batch:
        yield batch
