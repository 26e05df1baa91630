"""What a merge would save, from a look at the pages alone.

The promise is that the figure is the merge's own. So the pages go through the planner that would
plan their merge, with the same costs, and only what the merge itself would take is counted: pages
that are shared already, by fork or by KSM, are resident once, save nothing and are not mergeable.

64-bit checksums stand in for the byte compare that a merge would make: among 2^24 different pages
the odds of a single false match are 1 in 100,000.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ksmd.core.planner import PlanLimits, make_plan
from ksmd.core.sets import distinct
from ksmd.core.tables import Members
from ksmd.model.plan import Plan
from ksmd.model.units import PAGE_SIZE

# What vma_room says when the caller does not bound it.
_UNBOUNDED = 1 << 40


@dataclass(frozen=True, slots=True)
class TargetPages:
    """The present anonymous pages of one target, as columns, by ascending page number.

    ``pages`` uint64 (address >> 12); ``pfns`` uint64 (0: not told, for want of CAP_SYS_ADMIN);
    ``checksums`` uint64; ``exclusive`` bool (pagemap bit 56: nobody else has the page).
    """

    pages: NDArray[np.uint64]
    pfns: NDArray[np.uint64]
    checksums: NDArray[np.uint64]
    exclusive: NDArray[np.bool_]

    def __post_init__(self) -> None:
        sizes = {self.pages.size, self.pfns.size, self.checksums.size, self.exclusive.size}
        if len(sizes) != 1:
            raise ValueError(f"columns of different lengths: {sorted(sizes)}")


@dataclass(frozen=True, slots=True)
class Estimate:
    """One trust domain. All in pages, but for what is named bytes or share.

    ``pages`` as the targets see them, ``resident_pages`` as memory holds them (distinct frames);
    ``mergeable_pages`` are exclusive. Of these, ``zero_pages`` are zero; ``duplicates_within``
    repeat a page of the same target; ``duplicates_across`` only pages of others. ``saved_pages`` is
    what a merge gives back, ``vma_bytes`` what the kernel then spends on VMAs, ``saved_bytes`` the
    difference. ``share_of_runs_*``: which part of the pages to be mapped lies in runs of at least
    so many.
    """

    pages: int
    resident_pages: int
    mergeable_pages: int
    zero_pages: int
    duplicates_within: int
    duplicates_across: int
    saved_pages: int
    vma_bytes: int
    saved_bytes: int
    share_of_runs_4: float
    share_of_runs_16: float
    share_of_runs_512: float


def estimate(
    targets: Mapping[int, TargetPages],
    *,
    zero_checksum: int,
    vma_room: Mapping[int, int] | None = None,
    limits: PlanLimits | None = None,
) -> Estimate:
    """Estimate the merge of one domain's ``targets`` by slot.

    ``zero_checksum``: the 64-bit checksum of a page of zeros; ``vma_room``: as for
    :func:`ksmd.core.planner.make_plan`, unbounded by default.
    """
    slots, columns = _gather(targets)
    mergeable = _mergeable(columns)
    members, ids = _members(slots, columns, mergeable, zero_checksum)
    zero_id = 1
    room = dict.fromkeys(targets, _UNBOUNDED) if vma_room is None else vma_room
    plan = make_plan(
        members,
        store_checksums=np.empty(0, np.uint32),
        store_pages=np.empty(0, np.uint64),
        zero_checksum=zero_id,
        vma_room=room,
        next_extent=0,
        limits=limits,
    )
    within, across = _duplicates(members.slots, ids, zero_id)
    share_4, share_16, share_512 = _shares(plan, (4, 16, 512))
    return Estimate(
        pages=slots.size,
        resident_pages=_resident(columns.pfns),
        mergeable_pages=int(np.count_nonzero(mergeable)),
        zero_pages=int(np.count_nonzero(ids == zero_id)),
        duplicates_within=within,
        duplicates_across=across,
        saved_pages=plan.saved_pages,
        vma_bytes=plan.cost_bytes,
        saved_bytes=plan.saved_pages * PAGE_SIZE - plan.cost_bytes,
        share_of_runs_4=share_4,
        share_of_runs_16=share_16,
        share_of_runs_512=share_512,
    )


def _gather(targets: Mapping[int, TargetPages]) -> tuple[NDArray[np.uint32], TargetPages]:
    """Put the targets' columns one after the other, by ascending slot."""
    every = [targets[slot] for slot in sorted(targets)]
    if not every:
        none = np.empty(0, np.uint64)
        return np.empty(0, np.uint32), TargetPages(none, none, none, np.empty(0, np.bool_))
    slots = np.repeat(np.array(sorted(targets), np.uint32), [t.pages.size for t in every])
    columns = TargetPages(
        np.concatenate([t.pages for t in every]),
        np.concatenate([t.pfns for t in every]),
        np.concatenate([t.checksums for t in every]),
        np.concatenate([t.exclusive for t in every]),
    )
    return slots, columns


def _mergeable(columns: TargetPages) -> NDArray[np.bool_]:
    """Return which pages are exclusive, each frame once.

    A frame that two targets call their own was freed and reused between the two looks.
    """
    mergeable = columns.exclusive.copy()
    own = np.flatnonzero(columns.exclusive & (columns.pfns != 0))
    _, first = np.unique(columns.pfns[own], return_index=True)
    mergeable[np.delete(own, first)] = False
    return mergeable


def _members(
    slots: NDArray[np.uint32],
    columns: TargetPages,
    mergeable: NDArray[np.bool_],
    zero_checksum: int,
) -> tuple[Members, NDArray[np.uint32]]:
    """Return the pages that occur twice or are zero, with small numbers for their checksums.

    The planner's checksums have 32 bits. Numbering the 64-bit ones keeps them apart; the page of
    zeros is number 1, and 0 is nobody's.
    """
    kinds, which, users = np.unique(
        columns.checksums[mergeable], return_inverse=True, return_counts=True
    )
    zero = kinds == np.uint64(zero_checksum)
    number = np.arange(2, kinds.size + 2, dtype=np.uint32)
    number[zero] = 1
    ids = number[which.reshape(-1)]
    keep = ((users > 1) | zero)[which.reshape(-1)]
    ids = ids[keep]
    return Members(slots[mergeable][keep], columns.pages[mergeable][keep], ids), ids


def _resident(pfns: NDArray[np.uint64]) -> int:
    known = pfns[pfns != 0]
    return int(distinct(known).size + pfns.size - known.size)


def _duplicates(
    slots: NDArray[np.uint32], ids: NDArray[np.uint32], zero_id: int
) -> tuple[int, int]:
    """Return how many pages repeat one of their own target, and how many only another's."""
    data = ids != zero_id
    kinds = distinct(ids[data]).size
    key = (slots[data].astype(np.uint64) << np.uint64(32)) | ids[data]
    kinds_by_target = distinct(key).size
    return int(key.size - kinds_by_target), int(kinds_by_target - kinds)


def _shares(plan: Plan, lengths: tuple[int, ...]) -> list[float]:
    runs = plan.merges["npages"].astype(np.int64)
    total = int(runs.sum())
    return [int(runs[runs >= length].sum()) / total if total else 0.0 for length in lengths]
