"""Regions that are registered no more: given back at once, in turns beside the main work.

A program that closes its SMA has a right to its memory as it was. So what it had registered is
struck off at once (nothing new is merged there), and unmerged in urgent turns: what waits in line
for the main work, and scans that others asked for, come after it. A target that cannot be stopped
now, or memory that is short, makes it wait and try again for as long as the process lives.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator

import numpy as np

from ksmd.daemon.journal import fields
from ksmd.daemon.pipeline import Pipeline
from ksmd.daemon.registry import Span
from ksmd.daemon.state import Target
from ksmd.daemon.turns import Turn, Turns
from ksmd.daemon.unmerger import UnmergeResult
from ksmd.guard.intervals import Intervals
from ksmd.model.errors import KsmdError, TargetGoneError
from ksmd.model.process import TargetId
from ksmd.model.units import PAGE_SHIFT, PAGE_SIZE

log = logging.getLogger(__name__)

_QUICK_TRIES = 20
_FIRST_PAUSE_SECS = 0.03
_LONGEST_PAUSE_SECS = 10.0


class Releases:
    """Gives back what ``Registry.on_gone`` tells of."""

    def __init__(self, pipeline: Pipeline, turns: Turns) -> None:
        self._pipeline = pipeline
        self._turns = turns
        self._under_way: Counter[TargetId] = Counter()

    def under_way(self, process: TargetId) -> bool:
        """Whether memory of that process is yet to be given back."""
        return self._under_way[process] > 0

    def begin(self, process: TargetId, spans: list[Span], ended: bool) -> None:
        """Take up *spans* of a process that are registered no more."""
        steps = self._ended(process) if ended else self._give_back(process, Intervals(spans))
        turn = Turn(
            f"giving back memory of process {process.pid}",
            self._counted(process, steps),
            on_result=lambda _: None,
            on_error=lambda _: None,  # we are leaving, and unmerge everything
        )
        self._turns.add(turn, urgent=True)
        self._under_way[process] += 1

    def _counted(self, process: TargetId, steps: Iterator[float]) -> Iterator[float]:
        try:
            yield from steps
        finally:
            self._under_way[process] -= 1
            if not self._under_way[process]:
                del self._under_way[process]

    def _ended(self, process: TargetId) -> Iterator[float]:
        """Its memory has gone by itself; what is left is ours.

        Its pidfd said so. To /proc it may be there for as long as nobody waits for it.
        """
        targets = self._pipeline.targets
        for target in targets:
            if target.id == process:
                targets.drop(target)
        yield from self._recount()

    def _give_back(self, process: TargetId, spans: Intervals) -> Iterator[float]:
        tries, pause = 0, _FIRST_PAUSE_SECS
        while True:
            target = self._pipeline.targets.refresh_one(process)
            if target is None:
                break
            left = _unwanted(target, spans)
            self._forget_checksums(target, left)
            try:
                result = UnmergeResult()
                for result in self._pipeline.unmerger.unmerge_part(target, left):  # noqa: B007
                    yield 0.0
                if not result.left:
                    break
                why = f"{result.left} pages are left: {result.reason}"
            except TargetGoneError:
                self._pipeline.targets.drop(target)
                break
            except KsmdError as error:
                why = str(error)
            tries += 1
            if tries == _QUICK_TRIES:
                log.warning(
                    "pid %d: its memory cannot be given back yet: %s",
                    process.pid,
                    why,
                    extra=fields(target_pid=process.pid, domain=target.selected.domain),
                )
            yield pause
            if tries >= _QUICK_TRIES:
                pause = min(pause * 2, _LONGEST_PAUSE_SECS)
        self._pipeline.targets.refresh_one(process)  # drops it where nothing selects it any more
        yield from self._recount()

    def _recount(self) -> Iterator[float]:
        for _ in self._pipeline.accounting.recount():
            yield 0.0

    def _forget_checksums(self, target: Target, spans: Intervals) -> None:
        """Plan nothing for pages that may not be merged any more."""
        tables = self._pipeline.targets.tables(target)
        nothing = np.empty(0, np.uint64), np.empty(0, np.uint32)
        seqnr = self._pipeline.scanner.seqnr
        for start, end in spans:
            tables.observe(target.slot, start >> PAGE_SHIFT, end >> PAGE_SHIFT, *nothing, seqnr)


def _unwanted(target: Target, spans: Intervals) -> Intervals:
    """What of *spans* neither a rule nor another region covers."""
    selected = target.selected
    if selected.regions == "anon":
        return Intervals()
    left = spans.copy()
    explicit = selected.also
    if selected.regions == "heap":
        for area in target.areas:
            if area.vma.path == "[heap]":
                left.remove(area.start, area.end)
    else:
        explicit = (*explicit, *selected.regions)
    for start, npages in explicit:
        left.remove(start, start + npages * PAGE_SIZE)
    return left
