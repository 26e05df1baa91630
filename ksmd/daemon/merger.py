"""The changing half of the pipeline: plan, store, digests, stop windows, ledger.

Each step is small enough that the main loop can look at its sockets in between: the generators here
yield after every extent that was filled and every window that was opened.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Generator, Iterator

import numpy as np
from numpy.typing import NDArray

from ksmd.core.focus import focus
from ksmd.core.planner import PlanLimits, make_plan
from ksmd.core.scope import Scope, within
from ksmd.core.windows import Ground, Records, merge_records, zero_records
from ksmd.daemon.confirm import (
    Company,
    SecondLook,
    User,
    confirmed,
    strangers,
    without_lonely,
)
from ksmd.daemon.hugepages import huge_blocks, split_cut
from ksmd.daemon.journal import fields
from ksmd.daemon.state import Domain, Target
from ksmd.daemon.targets import Targets
from ksmd.daemon.windows import Asked, MergeResult, Windows, Work, in_turns, is_asked
from ksmd.kernel import memcg, risks
from ksmd.model.errors import KsmdError, TargetGoneError
from ksmd.model.plan import ExtentPlan, Plan
from ksmd.model.refusal import Reason
from ksmd.model.units import PAGE_SHIFT
from ksmd.remap.store import Extent, Making
from ksmd.settings.values import Settings

log = logging.getLogger(__name__)

#: Processors that a stop needs: the tracer its own, and the threads that stop another.
_PROCESSORS_OF_A_STOP = 2
#: Runs of zero pages in a window: they take no mappings, but a price that is wrong tells by then.
_ZERO_RUNS = 2000
#: Pages that one fault brings in at once: where windows may cut a run that has no huge pages.
_GRAIN = 16
#: Pages of an extent for scattered pages, at the most, and the part of free memory that it may be.
_SCATTERED_PAGES, _SCATTERED_SHARE = 65536, 16


class Merger:
    """Plans and carries out merges."""

    def __init__(self, targets: Targets, windows: Windows) -> None:
        self._targets = targets
        self._windows = windows
        self._next_extent = 1
        self._ahead: Making | None = None

    @property
    def _settings(self) -> Settings:
        return self._targets.settings

    def reserve(self, number: int) -> None:
        """Use no extent number up to *number*: an earlier daemon did."""
        self._next_extent = max(self._next_extent, number + 1)

    # -- planning ---------------------------------------------------------------------------

    def plan(self, domain: Domain, asked: Asked, scope: Scope | None = None) -> Plan:
        """Plan one domain, or what *scope* covers of it.

        Nothing is changed; the plan's extents have numbers but no memory. A plan that nobody asked
        for, and that found nothing to do, is not made again while all that it rests on is the same.
        """
        if not domain.tables.stable:
            return Plan()
        ready = {t.slot for t in self._of(domain) if self._windows.may_stop(t, asked)}
        room = {target.slot: self._vma_room(target) for target in self._of(domain)}
        grounds = (
            domain.tables.version, domain.store.known(), frozenset(ready), tuple(room.items()),
            domain.strangers.current(time.monotonic()), self._settings.window.max_pages,
        )  # fmt: skip
        if not asked and scope is None and domain.idle and domain.idle[0] == grounds:
            return domain.idle[1]
        checksums, pages = domain.store.pages()
        zero = domain.zero
        members = domain.tables.duplicates(checksums, zero)
        members = focus(members, ready, 0 if asked else self._settings.window.max_pages)
        if not asked:
            members = domain.strangers.without(members, time.monotonic())
        if scope is not None:
            members = within(members, scope, checksums, zero)
        plan = make_plan(
            members,
            store_checksums=checksums,
            store_pages=pages,
            zero_checksum=zero,
            vma_room=room,
            next_extent=self._next_extent,
            limits=PlanLimits(scattered_pages=_scattered_pages()),
        )
        if not (asked or scope or len(plan.merges) or len(plan.zeros)):
            domain.idle = grounds, plan
        return plan

    def _of(self, domain: Domain) -> list[Target]:
        return [t for t in self._targets if t.selected.domain == domain.name]

    def _vma_room(self, target: Target) -> int:
        """VMAs that the target may still get: a share of what the program itself leaves free."""
        share = risks.max_map_count() * self._settings.limits.vma_percent // 100
        return max(0, share - target.vmas)

    # -- carrying out -------------------------------------------------------------------------

    def merge_scope(
        self, domain: Domain, asked: Asked, scope: Scope, result: MergeResult
    ) -> Iterator[MergeResult]:
        """Plan and carry out what *scope* covers of one domain, as :meth:`merge_pass` does."""
        plan = self.plan(domain, asked, scope)
        result.refused.update(plan.refused)
        yield from self._carry_out(domain, plan, asked, result)
        yield result

    def merge_pass(self, asked: bool, result: MergeResult) -> Iterator[MergeResult]:
        """Plan every domain and carry the plans out; adds to *result*, gives it after each step."""
        for domain in list(self._targets.domains.values()):
            plan = self.plan(domain, asked)
            result.refused.update(plan.refused)
            yield from self._carry_out(domain, plan, asked, result)
        yield result

    def _carry_out(
        self, domain: Domain, plan: Plan, asked: Asked, result: MergeResult
    ) -> Iterator[MergeResult]:
        self._next_extent += len(plan.extents)
        self._targets.plans_begun += 1
        self._targets.plans_under_way += 1
        try:
            look = SecondLook(self._targets)
            yield from self._merge_extents(domain, plan, look, asked, result)
            yield from self._drop_zeros(domain, plan, look, asked, result)
        finally:
            self._targets.plans_under_way -= 1

    def _merge_extents(
        self, domain: Domain, plan: Plan, look: SecondLook, asked: Asked, result: MergeResult
    ) -> Iterator[MergeResult]:
        """Extent by extent, the most profitable first: filled, then mapped by all its users.

        So the store grows into memory that the extents before have just freed. While windows of
        one extent are at work, in the tracer, the next one is made here.
        """
        new = {planned.extent: planned for planned in plan.extents}
        numbers, first = np.unique(plan.merges["extent"], return_index=True)
        order = numbers[np.argsort(first)].tolist()
        waiting = deque(new[number] for number in order if number in new)
        try:
            for number in order:
                if number in new:
                    yield from self._fill(domain, waiting.popleft(), result)
                    if waiting:
                        self._ahead = Making(domain.store.making(waiting[0], self._copy))
                extent = domain.store.extents.get(number)
                if extent is None:  # there was no room for it, or it was given back meanwhile
                    continue
                runs = plan.merges[plan.merges["extent"] == number]
                users = yield from self._users(domain, extent, runs, asked, result)
                unlike = strangers(runs, users, extent, 2 if number in new else 1)
                domain.strangers.add(unlike, time.monotonic())
                if number in new:
                    users = without_lonely(users, extent, result.refused)
                looked = []
                for user in look.at_all(users, lambda target: is_asked(target, asked)):
                    looked.append(user)
                    yield result
                users = without_lonely(looked, extent, result.refused) if number in new else looked
                yield from self._map(domain, extent, users, number in new, asked, result)
        finally:
            if self._ahead is not None:
                self._ahead.give_up()
                self._ahead = None

    def _map(
        self,
        domain: Domain,
        extent: Extent,
        users: list[User],
        new: bool,
        asked: Asked,
        result: MergeResult,
    ) -> Iterator[MergeResult]:
        """Have an extent mapped by all its users, some at a time.

        First by one of whom something was foretold: where that turns out wrong, and the extent is
        *new*, nobody else is stopped to map pages alone. Whoever has to be prepared yet keeps
        nobody waiting, whose pages may change meanwhile.
        """
        users = sorted(users, key=lambda user: not _is_foretold(domain, user))
        trial = users[0][0] if new and users and _is_foretold(domain, users[0]) else None
        company: Company | None = None  # once somebody has failed
        for turn in in_turns(users, lambda user: user[0] is trial or user[0].contexts is None):
            wanted = turn
            if company is not None:
                wanted = [(t, ground, company.of(r, result.refused)) for t, ground, r in turn]
            works = [
                self._open_windows(domain, target, ground, extent, records, asked, result)
                for target, ground, records in wanted
            ]
            done = yield from self._windows.side_by_side(works, result, self._meanwhile)
            for (target, _, records), carried in zip(turn, done, strict=True):
                # who is refused as a whole is to be known by name, and so is everybody after him
                if new and target.refused is None and sum(map(len, carried)) < len(records):
                    company = company or Company(users, extent)
                    company.lose(records, carried)

    def _meanwhile(self) -> None:
        """While a window is at work: go on with the next extent, if a processor is free for that.

        The tracer needs one, and the threads that are to stop another: with two in all a stop would
        wait for us now and then, and take several milliseconds more.
        """
        if self._ahead is not None and len(os.sched_getaffinity(0)) > _PROCESSORS_OF_A_STOP:
            self._ahead.step()

    def _drop_zeros(
        self, domain: Domain, plan: Plan, look: SecondLook, asked: Asked, result: MergeResult
    ) -> Iterator[MergeResult]:
        # one after the other: together they take no less
        for target in self._of(domain):
            zeros = plan.zeros[plan.zeros["target"] == target.slot]
            if len(zeros):
                records = zero_records(zeros, target.ground, self._settings.window.max_pages)
                records = look.at(target, records, asked=is_asked(target, asked))
                ground = target.ground
                work = self._open_windows(domain, target, ground, None, records, asked, result)
                yield from self._windows.side_by_side([work], result, self._meanwhile)

    def _users(
        self,
        domain: Domain,
        extent: Extent,
        runs: NDArray[np.void],
        asked: Asked,
        result: MergeResult,
    ) -> Generator[MergeResult, None, list[User]]:
        """Give the records of every target that may be stopped, confirmed by digest.

        One after the other: scattered runs take their time.
        """
        users = []
        for target in self._of(domain):
            mine = runs[runs["target"] == target.slot]
            living = target.slot in self._targets.by_slot
            if not (living and len(mine) and self._windows.may_stop(target, asked)):
                continue
            records = merge_records(mine, target.ground, self._settings.window.max_pages)
            records = self._windows.credible(domain, target, records)
            try:
                records = confirmed(domain, target, extent, records, result.refused)
                users.append((target, target.ground, records))
            except TargetGoneError:
                self._targets.drop(target)
            yield result
        return users

    def _open_windows(
        self,
        domain: Domain,
        target: Target,
        ground: Ground,
        extent: Extent | None,
        records: Records,
        asked: Asked,
        result: MergeResult,
    ) -> Work[list[Records]]:
        """Carry *records* out, within what may be; gives those that were."""
        carried: list[Records] = []
        if not len(records) or target.slot not in self._targets.by_slot:
            return carried
        try:
            huge = huge_blocks(target, records) if target.huge else frozenset()
            runs = 0 if extent is not None else _ZERO_RUNS
            grain = 0 if huge else _GRAIN
            for batch in self._windows.cut(target, records, runs, grain):
                if target.slot not in self._targets.by_slot:
                    break
                if not self._windows.may_stop(target, asked):
                    break
                if target.ground is not ground:
                    break  # read anew meanwhile: a range may have been taken back by its program
                if extent is not None and extent.number not in domain.store.extents:
                    break
                batch = self._windows.credible(domain, target, batch)  # noqa: PLW2901
                if not len(batch):
                    continue
                split_cut(target, batch, huge)
                done = yield from self._windows.attempt(target, extent, batch, asked, result)
                if done is not None and done.refused is Reason.MEMORY:
                    break  # and will be a moment later
                if done is not None:
                    carried.append(self._windows.account(domain, target, done, result))
                yield None
        except TargetGoneError:
            self._targets.drop(target)
        finally:
            self._windows.forget(domain, target, carried)
        return carried

    def _fill(
        self, domain: Domain, planned: ExtentPlan, result: MergeResult
    ) -> Iterator[MergeResult]:
        """Finish the next of the plan's new extents: it may be large."""
        making = self._ahead = self._ahead or Making(domain.store.making(planned, self._copy))
        while making.under_way:
            making.step()
            yield result
        self._ahead = None
        try:
            making.finish()
            result.new += planned.npages
        except KsmdError as error:
            log.warning("domain %s: %s", domain.name, error, extra=fields(domain=domain.name))
            result.refused[Reason.STORE_FULL] += planned.npages

    def _copy(self, slot: int, pieces: list[tuple[int, int]], view: memoryview) -> None:
        target = self._targets.by_slot.get(slot)
        if target is None:
            return
        try:
            pages = np.concatenate([np.arange(p, p + n, dtype=np.uint64) for p, n in pieces])
            spans = np.array(pieces, np.uint64) << np.uint64(PAGE_SHIFT)
            if target.pagemap.exclusive_of(pages).all():
                target.memory.gather_exclusive(spans.reshape(-1).data, view)
                return
            at = 0
            for address, length in spans.tolist():  # fork may have shared some since
                target.memory.read_into(address, view[at : at + length])
                at += length
        except TargetGoneError:  # nobody is dropped in the middle of somebody's window
            return


def _is_foretold(domain: Domain, user: User) -> bool:
    target, _, records = user
    return bool(domain.foretold(target, records).any())


def _scattered_pages() -> int:
    """Give how large an extent for scattered pages may be: filling it comes before freeing any."""
    return min(_SCATTERED_PAGES, memcg.available() // _SCATTERED_SHARE >> PAGE_SHIFT)
