"""Give merged pages back: each becomes anonymous memory of its own again, with its content.

Before anything is changed the memory that this takes is compared with what is available, on the
host and in the memory cgroups of each target. A target that cannot be stopped now is tried again a
few times; what is left keeps its guard.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ksmd.core.spans import Spans
from ksmd.core.windows import unmerge_records
from ksmd.daemon import memory
from ksmd.daemon.accounting import Accounting
from ksmd.daemon.journal import fields
from ksmd.daemon.prepare import refuse
from ksmd.daemon.state import Target
from ksmd.daemon.targets import Targets
from ksmd.daemon.windows import Windows
from ksmd.guard.intervals import Intervals
from ksmd.kernel import libc, memcg
from ksmd.model.errors import TargetGoneError
from ksmd.model.refusal import Reason
from ksmd.model.units import PAGE_SHIFT, PAGE_SIZE

log = logging.getLogger(__name__)

_TRIES = 20
_PAUSE_SECS = 0.1


@dataclass(slots=True)
class UnmergeResult:
    """Pages given back, pages left, and why."""

    pages: int = 0
    left: int = 0
    reason: Reason | None = None
    detail: str = ""


class Unmerger:
    """Unmerges targets window by window."""

    def __init__(
        self,
        targets: Targets,
        windows: Windows,
        accounting: Accounting,
    ) -> None:
        self._targets = targets
        self._windows = windows
        self._accounting = accounting

    def check_memory(self, targets: Sequence[Target]) -> None:
        """Raise NotEnoughMemoryError, with figures, where the pages would not fit.

        Of several targets those that fit into their memory cgroups are given back.
        """
        needed = sum(target.merged_pages for target in targets) * PAGE_SIZE
        if len(targets) == 1:
            memory.check(targets[0].pid, needed)
        else:
            memory.check_host(needed)

    def unmerge(self, targets: Sequence[Target]) -> Iterator[UnmergeResult]:
        """Unmerge *targets*; gives the running result after every window."""
        yield from self._recount()
        self.check_memory(targets)
        result = UnmergeResult()
        for target in targets:
            _refuse_what_does_not_fit(target)
            for attempt in range(_TRIES):
                if target.slot not in self._targets.by_slot or not target.mappings:
                    break
                if target.refused is Reason.MEMORY:
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
        libc.trim_heap()
        yield result

    def unmerge_part(self, target: Target, spans: Intervals) -> Iterator[UnmergeResult]:
        """Try once to unmerge what of one target lies in *spans* (bytes); gives the result so far.

        NotEnoughMemoryError before anything is changed. The result's ``left`` is what is merged in
        *spans* still, when the last result comes.
        """
        self._targets.read_mappings(target)
        needed = _merged_bytes(target, spans)
        memory.check(target.pid, needed)
        result = UnmergeResult()
        if needed:
            yield from self._once(target, result, spans)
            if target.slot not in self._targets.by_slot:
                return
            self._targets.read_mappings(target)
        result.left = _merged_bytes(target, spans) >> PAGE_SHIFT
        if result.left:
            result.reason, result.detail = target.refused, target.detail
        if not target.mappings:
            self._windows.forget_contexts(target)
        yield result

    def _recount(self) -> Iterator[UnmergeResult]:
        for _ in self._accounting.recount():
            yield UnmergeResult()

    def _settle(self, target: Target, result: UnmergeResult) -> None:
        left = target.mappings.nbytes >> PAGE_SHIFT
        if left:
            result.left += left
            result.reason = target.refused or Reason.WINDOW_FAILED
            result.detail = target.detail
            log.warning(
                "pid %d keeps %d merged pages: %s %s",
                target.pid,
                left,
                result.reason,
                result.detail,
                extra=fields(
                    target_pid=target.pid,
                    domain=target.selected.domain,
                    reason=str(result.reason),
                ),
            )
        else:
            self._windows.forget_contexts(target)

    def _once(
        self, target: Target, result: UnmergeResult, spans: Intervals | None = None
    ) -> Iterator[UnmergeResult]:
        if not self._windows.prepare(target):
            return
        self._targets.read_mappings(target, flags=True)
        where = None if spans is None else _pages(spans)
        for extent, vmas in target.mappings.by_extent():
            records = unmerge_records(vmas, where, self._targets.settings.window.max_pages)
            for batch in self._windows.cut(target, records):
                if target.contexts is None:
                    return  # given back by somebody else, between two windows
                done = self._windows.open(target, batch, extent)
                if done.refused is not None or done.done is None:
                    return
                pages = int(done.records["length"][done.done].sum()) >> PAGE_SHIFT
                result.pages += pages
                if pages:
                    self._targets.tell("unmerged", target, pages)
                yield result


def _refuse_what_does_not_fit(target: Target) -> None:
    """Refuse a target of which not all may come back, as far as its memory cgroups go.

    A part of it would leave the group with no room at all.
    """
    lacking = memcg.lacking({target.pid: target.merged_pages * PAGE_SIZE})
    if lacking:
        refuse(target, Reason.MEMORY, str(lacking[0][0]))
    elif target.refused is Reason.MEMORY:
        target.accepted()


def _merged_bytes(target: Target, spans: Intervals) -> int:
    merged = target.mappings.vmas
    low, high = merged.starts >> np.uint64(PAGE_SHIFT), merged.ends >> np.uint64(PAGE_SHIFT)
    _, _, first, end = _pages(spans).cut(low, high)
    return int((end - first).sum()) << PAGE_SHIFT


def _pages(spans: Intervals) -> Spans:
    return Spans((low >> PAGE_SHIFT, high >> PAGE_SHIFT) for low, high in spans)
