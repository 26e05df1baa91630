"""From pages that may be equal to a plan: what goes to the store, what maps where, what is refused.

Promises. A plan never gives the store a page that fewer than two places will use; a target never
gets more VMAs than its room; a run that costs more memory than it saves is refused by name. Pages
that the planner leaves out are counted under their reason.

All of it is arithmetic on columns: a plan of a million pages takes about a second, and nothing is
decided later. Refusals interact (a run refused for VMAs may leave its store page with one user,
and without that page a third run falls apart), so the planner repeats "lay out, cut into runs,
judge" on what remains until nothing more is refused; the plan it returns is the last round's, in
which every rule was checked on the final layout.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import count as counting

import numpy as np
from numpy.typing import NDArray

from ksmd.core.candidates import StoreIndex, choose_places
from ksmd.core.layout import (
    U32,
    U64,
    Bools,
    Index,
    PlanLimits,
    extents_of,
    lay_out,
    page_keys,
    runs_of,
    spans_of,
)
from ksmd.core.sets import among, distinct
from ksmd.core.tables import Members
from ksmd.model.plan import ExtentPlan, Plan
from ksmd.model.refusal import Reason
from ksmd.model.units import PAGE_SIZE

__all__ = ["PlanLimits", "describe", "make_plan"]

# After so many rounds a target that still has runs refused is left out as a whole: each further
# round then takes at least one target away, so that the planner ends whatever it is given.
_ROUNDS = 8

# A run in the middle of a VMA makes three VMAs of one.
_VMAS_PER_RUN = 2

#: Runs that are shorter than this, in pages and on average, are scattered.
_SHORT_RUN = 32

_OLD = -1  # the "group" of pages whose content the store holds already


def make_plan(
    members: Members,
    *,
    store_checksums: U32,
    store_pages: U64,
    zero_checksum: int,
    vma_room: Mapping[int, int],
    next_extent: int,
    limits: PlanLimits | None = None,
    merged_neighbours: NDArray[np.void] | None = None,
) -> Plan:
    """Plan the merge of ``members``, sorted by (slot, page).

    ``store_checksums`` (uint32 ascending) and ``store_pages`` (uint64, extent << 32 | index) are
    what the store holds; ``vma_room`` is how many VMAs each slot may still gain (a slot that is
    missing: none); new extents are numbered from ``next_extent``; ``merged_neighbours`` (RUN) are
    the runs mapped already, which new runs may continue or share a VMA boundary with.

    In the plan, ``saved_pages`` counts each merged or zero page once and subtracts the new store
    pages; ``cost_bytes`` is the VMAs'. ValueError when the columns are not in order.
    """
    limits = limits or PlanLimits()
    keys = page_keys(members.slots, members.pages)
    if np.any(keys[1:] <= keys[:-1]):
        raise ValueError("members are not sorted by (slot, page)")
    store = StoreIndex(store_checksums, store_pages)
    zero = members.checksums == np.uint32(zero_checksum)
    zeros = spans_of(members.slots[zero], members.pages[zero])
    refused: Counter[Reason] = Counter()
    draft = _Draft(_only(members, ~zero), store, merged_neighbours, refused)
    verdict = draft.settle(vma_room, next_extent, limits)
    extents = _marked(extents_of(draft.layout, draft.new_checksums()), verdict.ranked)
    return Plan(
        extents=extents,
        merges=verdict.ranked,
        zeros=zeros,
        refused=+refused,
        saved_pages=int(zero.sum() + draft.alive.size - draft.layout.pages.size),
        cost_bytes=verdict.vmas * limits.vma_bytes,
    )


def _marked(extents: tuple[ExtentPlan, ...], runs: NDArray[np.void]) -> tuple[ExtentPlan, ...]:
    """Mark the extents of which the *runs* are short."""
    numbers, which = np.unique(runs["extent"], return_inverse=True)
    count = np.bincount(which)
    short = count * _SHORT_RUN > np.bincount(which, weights=runs["npages"])
    scattered = set(numbers[short].tolist())
    return tuple(replace(one, scattered=one.extent in scattered) for one in extents)


def describe(plan: Plan, names: Mapping[int, str]) -> list[str]:
    """Return the plan as lines of at most 100 columns; ``names`` are the targets' by slot."""
    merged = int(plan.merges["npages"].sum(dtype=np.int64))
    zeroed = int(plan.zeros["npages"].sum(dtype=np.int64))
    filled = sum(extent.npages for extent in plan.extents)
    lines = [
        f"merge {merged:,} pages in {plan.merges.size:,} runs, drop {zeroed:,} zero pages",
        f"store {filled:,} new pages in {len(plan.extents):,} extents",
        f"save {_mib(plan.saved_pages * PAGE_SIZE)} at a cost of {_mib(plan.cost_bytes)} of VMAs",
    ]
    for slot in distinct(np.concatenate((plan.merges["target"], plan.zeros["target"]))).tolist():
        runs = plan.merges[plan.merges["target"] == slot]["npages"]
        drops = plan.zeros[plan.zeros["target"] == slot]["npages"]
        longest = int(runs.max()) if runs.size else 0
        name = names.get(slot, f"slot {slot}")
        name = name if len(name) <= 20 else name[:19] + "\N{HORIZONTAL ELLIPSIS}"
        lines.append(
            f"  {name:<20} {int(runs.sum(dtype=np.int64)):>11,} pages"
            f" {runs.size:>9,} runs, longest {longest:>8,},"
            f" {int(drops.sum(dtype=np.int64)):>10,} zero"
        )
    lines.extend(f"refuse {n:,} pages: {why}" for why, n in plan.refused.most_common() if n)
    return lines


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What one round found: per run whether it may stay and why not; the runs by rank; VMAs."""

    starts: Index
    unprofitable: Bools
    over_budget: Bools
    ranked: NDArray[np.void]
    vmas: int

    @property
    def final(self) -> bool:
        return not (self.unprofitable.any() or self.over_budget.any())


class _Draft:
    """The pages still in the plan, as columns, and the layout of the last round."""

    def __init__(
        self,
        members: Members,
        store: StoreIndex,
        merged: NDArray[np.void] | None,
        refused: Counter[Reason],
    ) -> None:
        self._members = members
        self._refused = refused
        self._group, self._place = _sort_out(members, store, merged)
        self._merged = merged
        self.alive: Index = np.arange(len(members))
        self._first: Index = np.empty(0, np.intp)
        self.layout = lay_out(members.slots[:0], members.pages[:0], 0, 1)

    def new_checksums(self) -> U32:
        """Return the checksums of the new store pages, in the order of the layout."""
        return self._members.checksums[self._first]

    def settle(self, vma_room: Mapping[int, int], next_extent: int, limits: PlanLimits) -> _Verdict:
        """Refuse until every rule holds on what is left."""
        for round_ in counting():
            users = self._prune()
            self._first = self._representatives(users)
            runs, starts = self._lay_out(next_extent, limits.extent_pages)
            large = limits.scattered_pages
            if large > limits.extent_pages and runs.size * _SHORT_RUN > self.alive.size:
                runs, starts = self._lay_out(next_extent, large)
            saved = self._credit(users)
            saved = np.add.reduceat(saved, starts) if starts.size else saved
            verdict = _judge(runs, starts, saved, self._merged, vma_room, limits)
            if verdict.final:
                return verdict
            self._refuse(runs, verdict, whole_targets=round_ >= _ROUNDS)
        raise AssertionError("unreachable")

    def _lay_out(self, next_extent: int, extent_pages: int) -> tuple[NDArray[np.void], Index]:
        """Lay out what is left, and cut it into runs: these, and where each starts."""
        slots, pages = self._members.slots, self._members.pages
        first, alive = self._first, self.alive
        self.layout = lay_out(slots[first], pages[first], next_extent, extent_pages)
        return runs_of(slots[alive], pages[alive], self._places(first))

    def _prune(self) -> Index:
        """Take out pages that nobody shares; return the users of every group."""
        group = self._group[self.alive]
        users = np.bincount(group[group != _OLD], minlength=1)
        lonely = (group != _OLD) & (users[group] < 2)
        self._refused[Reason.NO_PROFIT] += int(np.count_nonzero(lonely))
        self.alive = self.alive[~lonely]
        return users

    def _representatives(self, users: Index) -> Index:
        """Return the first page of every group that is left, in the order of (slot, page)."""
        new = self.alive[self._group[self.alive] != _OLD][::-1]
        first = np.full(users.size, -1, np.intp)
        first[self._group[new]] = new  # of several, the last assignment stays: the first page
        return np.sort(first[first >= 0])

    def _places(self, first: Index) -> U64:
        """Return the store page of every page that is left."""
        group = self._group[self.alive]
        of_group = np.zeros(int(group.max(initial=0)) + 1, np.uint64)
        of_group[self._group[first]] = self.layout.places
        return np.where(group == _OLD, self._place[self.alive], of_group[group])

    def _credit(self, users: Index) -> NDArray[np.float64]:
        """Return the bytes that every page saves: a new store page is shared out to its users."""
        group = self._group[self.alive]
        share = np.where(group == _OLD, 0.0, 1.0 / np.maximum(users[group], 1))
        return PAGE_SIZE * (1.0 - share)

    def _refuse(self, runs: NDArray[np.void], verdict: _Verdict, whole_targets: bool) -> None:
        no_profit, budget = verdict.unprofitable, verdict.over_budget
        if whole_targets:
            stuck = runs["target"][no_profit | budget]
            budget = among(runs["target"], stuck) & ~no_profit
        length = runs["npages"].astype(np.intp)
        self._refused[Reason.NO_PROFIT] += int(length[no_profit].sum())
        self._refused[Reason.VMA_BUDGET] += int(length[budget].sum())
        self.alive = self.alive[~np.repeat(no_profit | budget, length)]


def _mib(nbytes: int) -> str:
    return f"{nbytes / (1 << 20):,.1f} MiB"


def _only(members: Members, mask: Bools) -> Members:
    return Members(members.slots[mask], members.pages[mask], members.checksums[mask])


def _sort_out(
    members: Members, store: StoreIndex, merged: NDArray[np.void] | None
) -> tuple[Index, U64]:
    """Return for every page its group (_OLD: in the store already) and, for those, its place."""
    kinds, group = np.unique(members.checksums, return_inverse=True)
    group = group.reshape(-1)
    at = np.searchsorted(store.checksums, kinds)
    known = np.zeros(kinds.size, np.bool_)
    inside = at < store.checksums.size
    known[inside] = store.checksums[at[inside]] == kinds[inside]
    place = np.zeros(len(members), np.uint64)
    old = known[group]
    if old.any():
        mine = _only(members, old)
        place[old] = choose_places(mine.slots, mine.pages, mine.checksums, store, merged)
    return np.where(old, _OLD, group), place


def _judge(
    runs: NDArray[np.void],
    starts: Index,
    saved: NDArray[np.float64],
    merged: NDArray[np.void] | None,
    vma_room: Mapping[int, int],
    limits: PlanLimits,
) -> _Verdict:
    """Rank the runs by what they save and hold them against the budgets."""
    # Among equals, the order of the store: all targets then keep the same pages within budgets.
    by_place = np.argsort(
        (runs["extent"].astype(np.uint64) << np.uint64(32)) | runs["index"], kind="stable"
    )
    order = by_place[np.argsort(-saved[by_place], kind="stable")]
    vmas = _vmas(runs, order, merged)
    unprofitable = saved <= vmas * limits.vma_bytes
    ranked = order[~unprofitable[order]]
    over_budget = np.zeros(runs.size, np.bool_)
    over_budget[ranked] = _over_budget(runs["target"][ranked], vmas[ranked], vma_room)
    return _Verdict(starts, unprofitable, over_budget, runs[order], int(vmas.sum()))


def _vmas(runs: NDArray[np.void], order: Index, merged: NDArray[np.void] | None) -> Index:
    """Return how many VMAs each run adds, if all runs before it in ``order`` are mapped.

    Two, less one for each side on which it touches a mapped run: that boundary is there already.
    That the kernel may join VMAs is not counted on, nor that a run may end where its VMA ends.
    """
    vmas = np.full(runs.size, _VMAS_PER_RUN, np.intp)
    if not runs.size:
        return vmas
    rank = np.empty(runs.size, np.intp)
    rank[order] = np.arange(runs.size)
    begins = page_keys(runs["target"], runs["page"])
    ends = begins + runs["npages"]
    touch = begins[1:] == ends[:-1]
    vmas[1:] -= touch & (rank[:-1] < rank[1:])
    vmas[:-1] -= touch & (rank[1:] < rank[:-1])
    if merged is not None and merged.size:
        old_begins = page_keys(merged["target"], merged["page"])
        vmas -= among(begins, old_begins + merged["npages"])
        vmas -= among(ends, old_begins)
    return vmas


def _over_budget(targets: U32, vmas: Index, vma_room: Mapping[int, int]) -> Bools:
    """Return which runs, taken in the order given, would exceed their target's room."""
    slots, slot = np.unique(targets, return_inverse=True)
    slot = slot.reshape(-1)
    room = np.array([vma_room.get(int(number), 0) for number in slots], np.int64)
    by_slot = np.argsort(slot, kind="stable")
    spent = np.cumsum(vmas[by_slot])
    before = np.concatenate(([0], spent))[np.searchsorted(slot[by_slot], np.arange(slots.size))]
    over = np.empty(targets.size, np.bool_)
    over[by_slot] = spent - before[slot[by_slot]] > room[slot[by_slot]]
    return over
