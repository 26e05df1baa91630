"""Stop windows, from the pager's being told of them to the accounts of their targets.

Whoever changes a target comes through here: the merger, who maps the store, the remerger and the
unmerger. What a window is to do has been decided before.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import numpy as np

from ksmd.core.ledger import StopTimes
from ksmd.core.price import Aim, WindowPrice, all_prices
from ksmd.core.windows import Records, pages_of, spans, windows_of
from ksmd.daemon import pulse
from ksmd.daemon.prepare import prepare, refuse
from ksmd.daemon.state import PASSING, Domain, Target
from ksmd.daemon.targets import Targets
from ksmd.guard.client import Pager
from ksmd.kernel.memcg import Limit
from ksmd.model.refusal import Reason
from ksmd.model.units import PAGE_SHIFT
from ksmd.model.window import Op, WindowRequest, WindowResult
from ksmd.remap.engine import Engine, Order, RefusedTargetError
from ksmd.remap.store import Extent

#: Operations that map the store.
_MAPPING = frozenset({int(Op.MERGE), int(Op.REMERGE)})
#: Refusals that have to do with the moment of the stop, and how often an asked window tries again.
_MOMENTARY = frozenset({Reason.UNSTOPPABLE, Reason.NO_THREAD, Reason.STALE_STUB})
_RETRIES = 3
#: Targets that have a window each before the main loop looks at its sockets again.
_TOGETHER = 8
#: Bytes that any window takes of its target's memory: the stub, page tables, mappings.
_ASIDE = 1 << 19


@dataclass(slots=True)
class MergeResult:
    """What one merge pass did, in pages; ``postponed``: windows that a later pass should retry.

    ``new``: pages by which the store grew; ``per_slot``: what :attr:`changed` is of each target.
    """

    merged: int = 0
    zeroed: int = 0
    remerged: int = 0
    windows: int = 0
    postponed: int = 0
    new: int = 0
    refused: Counter[Reason] = field(default_factory=Counter)
    per_slot: Counter[int] = field(default_factory=Counter)

    @property
    def changed(self) -> int:
        """Pages that are shared now and were not before."""
        return self.merged + self.zeroed + self.remerged


#: Whose stops need no pauses because somebody waits: everybody's, nobody's, or these slots'.
Asked = bool | frozenset[int]


def is_asked(target: Target, asked: Asked) -> bool:
    """Whether somebody waits for *target*."""
    return asked if isinstance(asked, bool) else target.slot in asked


class Opening(NamedTuple):
    """A window that may be opened now, of records that come from one extent, or from none."""

    target: Target
    records: Records
    extent: Extent | None

    def order(self, deadline_ms: float) -> Order:
        """Say what the tracer is to do."""
        target, extent = self.target, self.extent
        request = WindowRequest(
            target.id,
            self.records,
            extent.map.inode if extent is not None else 0,
            deadline_ms=deadline_ms,
            accept_seccomp_risk=target.selected.accept_seccomp_risk,
        )
        return Order(request, target.contexts, extent.map.fd_ro if extent is not None else -1)


T = TypeVar("T")
#: Work on one target. It gives each window that is to be opened and gets what became of it, and
#: gives None between two windows, when all that was done is accounted for.
Work = Generator[Opening | None, WindowResult | None, T]


def _nothing() -> None:
    """Do nothing meanwhile."""


class Windows:
    """Opens stop windows, one after the other. One for the whole daemon."""

    def __init__(self, targets: Targets, engine: Engine, pager: Pager) -> None:
        self._targets = targets
        self._engine = engine
        self._pager = pager
        self.stops = StopTimes()  # of all targets, those that are gone included
        self._aim = Aim()
        # what a target's first window of its kind is taken to cost
        self._usual = all_prices(self._aim)

    def may_stop(self, target: Target, asked: Asked) -> bool:
        """Whether a stop window of *target* may be opened now."""
        interval = self._targets.settings.window.interval_secs
        return target.may_stop(time.monotonic(), interval, is_asked(target, asked))

    def cut(
        self, target: Target, records: Records, max_runs: int = 0, grain: int = 0
    ) -> Iterator[Records]:
        """Cut *records*, of one kind, into what a window each should do; *max_runs* 0: as set.

        *grain*, in pages: where a record may be cut; 0: nowhere.
        """
        if not len(records):
            return
        window, price = self._targets.settings.window, self._price(target, records)
        runs = max_runs or window.max_runs
        yield from windows_of(records, runs, window.max_pages, price, window.stop_ms, grain)

    def _price(self, target: Target, records: Records) -> WindowPrice:
        op = Op(int(records["op"][0]))
        if op not in target.prices:
            target.prices[op] = self._usual[op].copy()
        return target.prices[op]

    def _learn(self, target: Target, records: Records, done: WindowResult) -> None:
        """Take in what a window took: of its kind, and of its target."""
        usual = self._usual[Op(int(records["op"][0]))]
        usual.learn(records, done.total_us, done.at_work_us)
        self._price(target, records).learn(records, done.total_us, done.at_work_us, usual)
        self._aim.learn(done.total_us, self._targets.settings.window.stop_ms)

    def _deadline_ms(self, target: Target) -> float:
        return target.deadline_ms(self._targets.settings.window.deadline_ms)

    def prepare(self, target: Target) -> bool:
        """Make the target's contexts where it has none yet; whether it has them now."""
        if target.contexts is None:
            prepare(target, self._engine, self._pager, self._deadline_ms(target))
        return target.contexts is not None

    def attempt(
        self,
        target: Target,
        extent: Extent | None,
        records: Records,
        asked: Asked,
        result: MergeResult,
    ) -> Work[WindowResult | None]:
        """Open one stop window, and again where its moment was bad and somebody waits.

        None where there could be none. TargetGoneError.
        """
        if not self._ready(target, asked, result):
            return None
        done = yield from self._open(target, records, extent)
        for _ in range(_RETRIES if is_asked(target, asked) else 0):
            if done.refused not in _MOMENTARY:
                break
            done = yield from self._open(target, records, extent)
        result.windows += 1
        result.postponed += done.refused in _MOMENTARY
        return done

    def _ready(self, target: Target, asked: Asked, result: MergeResult) -> bool:
        """Prepare a target, and again where the moment was bad and somebody waits."""
        for _ in range(1 + (_RETRIES if is_asked(target, asked) else 0)):
            if self.prepare(target) or target.refused not in _MOMENTARY:
                break
        if target.contexts is None:
            result.postponed += target.refused in _MOMENTARY
        return target.contexts is not None

    def open(self, target: Target, records: Records, extent: Extent | None) -> WindowResult:
        """Open one stop window, of one target alone, unless there is no memory for it."""
        if (refused := _without_room(target, records)) is not None:
            return refused
        return self._carry_out([Opening(target, records, extent)])[0]

    def _open(self, target: Target, records: Records, extent: Extent | None) -> Work[WindowResult]:
        """Do the same, beside others."""
        if (refused := _without_room(target, records)) is not None:
            return refused
        done = yield Opening(target, records, extent)
        assert done is not None
        return done

    def side_by_side(
        self,
        works: Sequence[Work[T]],
        result: MergeResult,
        meanwhile: Callable[[], None] = _nothing,
    ) -> Generator[MergeResult, None, list[T]]:
        """Do *works*, each on another target, a window of each at a time; gives what each gives.

        It gives *result* after each round.

        So each step, here, in the pager and in the tracer, is done for all while its code and data
        are at hand: to fetch them anew for each window takes longer than what they do.
        """
        gave: dict[int, T] = {}
        try:
            while len(gave) < len(works):
                told: dict[int, WindowResult | None]
                told = {at: None for at in range(len(works)) if at not in gave}
                while told:
                    openings = _advance(works, told, gave)
                    results = self._carry_out([*openings.values()], meanwhile)
                    told = dict(zip(openings, results, strict=True))
                yield result
        finally:
            for work in works:
                work.close()
        return [gave[at] for at in range(len(works))]

    def _carry_out(
        self, openings: Sequence[Opening], meanwhile: Callable[[], None] = _nothing
    ) -> list[WindowResult]:
        """Open windows: the pager hears of their ranges before the first and after the last."""
        if not openings:
            return []
        left_over = set(self._pager.unsettled)
        announce(self._pager, {one.target.slot: one.records for one in openings})
        orders = [opening.order(self._deadline_ms(opening.target)) for opening in openings]
        results = self._engine.windows(orders, meanwhile)
        # what a window left whose tracer died is settled by the next one that finds no stub at work
        over = [
            opening.target.slot
            for opening, done in zip(openings, results, strict=True)
            if done.refused is None or not (done.lost or opening.target.slot in left_over)
        ]
        self._pager.settle_all(*over)
        for opening, done in zip(openings, results, strict=True):
            self._take_note(opening.target, opening.records, done)
        return results

    def _take_note(self, target: Target, records: Records, done: WindowResult) -> None:
        """Learn from what became of a window."""
        if done.lost:  # a stub that is at work may have guarded what is read next
            target.memory.may_pin = False
        target.last_window, target.recount_at = time.monotonic(), 0.0
        pulse.forget(target)
        if done.refused is Reason.GONE:
            self._targets.drop(target)
        elif done.refused is not None:
            refuse(target, done.refused, done.detail)
        else:
            target.accepted()
            target.stops.add(done.total_us / 1000)
            self.stops.add(done.total_us / 1000)
            self._learn(target, records, done)

    def account(
        self, domain: Domain, target: Target, done: WindowResult, result: MergeResult
    ) -> Records:
        """Enter what a window has done into *result* and the target; what is to be forgotten."""
        none = done.records[:0]
        if done.done is None or (done.refused is not None and done.refused in PASSING):
            return none
        for index, reason in done.reasons.items():
            result.refused[reason] += int(done.records["length"][index]) >> PAGE_SHIFT
        self._compare_foretold(domain, target, done)
        carried = done.records[done.done]
        if not len(carried):
            return none
        op = Op(int(carried["op"][0]))  # a window has records of one kind
        npages = int(carried["length"].sum()) >> PAGE_SHIFT
        result.per_slot[target.slot] += npages
        result.merged += npages if op is Op.MERGE else 0
        result.zeroed += npages if op is Op.ZERO else 0
        result.remerged += npages if op is Op.REMERGE else 0
        if target.slot not in self._targets.by_slot:
            return none
        if op is Op.ZERO:
            target.emptied.append(pages_of(carried))
        self._targets.tell("merged", target, npages)
        return carried

    @staticmethod
    def _compare_foretold(domain: Domain, target: Target, done: WindowResult) -> None:
        """Take note of what could not be carried out: what was foretold wrong is to be read."""
        assert done.done is not None
        if done.reasons:
            domain.unequal(target.slot, pages_of(done.records[~done.done]))
        if not domain.foresight.has_foretold(target.slot):
            return
        changed = [index for index, reason in done.reasons.items() if reason is Reason.CHANGED]
        told = domain.foretold(target, done.records)
        if not domain.foresight.came_true(target.slot, int(told.sum()), int(told[changed].sum())):
            target.foreseeable = False
            domain.doubt_foretold(target)

    @staticmethod
    def credible(domain: Domain, target: Target, records: Records) -> Records:
        """Give those of *records* that do not rest on what is known by now to be foretold badly."""
        if target.foreseeable:
            return records
        return records[~domain.foretold(target, records)]

    def forget(self, domain: Domain, target: Target, carried: list[Records]) -> None:
        """Take what windows have merged out of the tables: at once, which spares most of the work.

        A scan that comes before finds these pages gone by itself.
        """
        if carried and target.slot in self._targets.by_slot:
            domain.tables.forget_pages(target.slot, pages_of(np.concatenate(carried)))

    # -- leaving ------------------------------------------------------------------------------

    def settle_left_over(self) -> None:
        """Settle the windows whose tracer died, in targets where no stub is at work any more."""
        for slot in self._pager.unsettled:
            target = self._targets.by_slot.get(slot)
            if target is None:
                continue
            try:
                self._engine.check(target.id, self._deadline_ms(target))
            except RefusedTargetError as error:
                if error.reason is Reason.GONE:
                    self._targets.drop(target)
            else:
                self._pager.settle_all(slot)

    def forget_contexts(self, target: Target) -> None:
        """Close the contexts of a target in which nothing is merged any more."""
        if target.slot in self._pager.unsettled:
            self.settle_left_over()
        if target.contexts is None or target.slot in self._pager.unsettled:
            return  # or a stub whose tracer died may be about to merge
        self._pager.drop(target.slot)
        with contextlib.suppress(OSError):
            os.close(target.contexts.guard)
            os.close(target.contexts.track)
        target.contexts = None


def in_turns(them: Iterable[T], alone: Callable[[T], bool] = lambda _: False) -> Iterator[list[T]]:
    """Give *them*, in their order, so many at a time as may have windows together, some *alone*."""
    turn: list[T] = []
    for one in them:
        if alone(one):
            if turn:
                yield turn
                turn = []
            yield [one]
            continue
        turn.append(one)
        if len(turn) == _TOGETHER:
            yield turn
            turn = []
    if turn:
        yield turn


def _advance(
    works: Sequence[Work[T]], told: dict[int, WindowResult | None], gave: dict[int, T]
) -> dict[int, Opening]:
    """Tell works, by their places, what became of their windows; give what each wants opened now.

    What those give that are over goes into *gave*.
    """
    openings = {}
    for at, done in told.items():
        try:
            opening = works[at].send(done)
        except StopIteration as end:
            gave[at] = end.value
        else:
            if opening is not None:
                openings[at] = opening
    return openings


def _without_room(target: Target, records: Records) -> WindowResult | None:
    """Refuse a window, and its target, for which there is no memory in the target's cgroups."""
    if (full := _full_group(target, records)) is None:
        return None
    refuse(target, Reason.MEMORY, str(full))
    return WindowResult(target.id, records, refused=Reason.MEMORY, detail=str(full))


def _full_group(target: Target, records: Records) -> Limit | None:
    """Give the memory cgroup of the target that has no room for what a window takes."""
    if int(records["op"][0]) != Op.UNMERGE:
        return target.brim.take(target.pid, _ASIDE)
    return target.room.take(target.pid, _ASIDE + int(records["length"].sum()))


def announce(pager: Pager, windows: dict[int, Records]) -> None:
    """Tell the pager of windows, by the slots of their targets, before they are opened.

    Until a window is over, children are filled from the store where it maps the store. Not where
    pages are given back: fork copies that memory anyway, and what the program has dropped of it
    would come back to life in the child.
    """
    ops = {slot: records["op"].item(0) for slot, records in windows.items() if len(records)}
    pager.extend({slot: spans(windows[slot]) for slot, op in ops.items() if op in _MAPPING})
    for slot, op in ops.items():
        if op == Op.UNMERGE:
            pager.begin_unmerge(slot)
