"""The truth about what is merged, asked of the kernel anew after every pass (or every few seconds).

No counter is kept by adding and subtracting: maps tells which VMAs show the store, pagemap which of
their pages still do. So writes, drops, munmap, fork and exec of the targets need no bookkeeping,
and a daemon that starts over merged processes counts right at once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from ksmd.core.ledger import Ledger, Sharing, count_sharing
from ksmd.core.sets import among, distinct
from ksmd.core.spans import NEAR_PAGES, Spans
from ksmd.daemon import pulse
from ksmd.daemon.state import Domain, Merged, Target
from ksmd.daemon.targets import Targets
from ksmd.guard.client import Pager
from ksmd.kernel import procfs
from ksmd.kernel.pagemap import PageMap
from ksmd.model.errors import TargetGoneError
from ksmd.model.tables import SITES
from ksmd.model.units import PAGE_SHIFT
from ksmd.remap.store import Extent

log = logging.getLogger(__name__)

#: A CoW storm: this many merged pages, and one in so many, were written between two counts.
_STORM_PAGES = 256
_STORM_SHARE = 4
#: Seconds for which a target that was the same twice is not counted again: at first, and at most;
#: and one that has not run since.
_SHORT_REST, _LONG_REST, _STILL_REST = 1.0, 8.0, 600.0
#: Seconds after which extents that had to be kept may bring all those that rest to be counted.
_RELEASE_SECS = 10.0
#: To count all takes no more than one part in so many of a core, or a minute lies between.
_COST_SHARE, _COST_REST = 300, 60.0


class Accounting:
    """Counts sites, CoW breaks and zero pages, and gives back extents that nobody uses."""

    def __init__(self, targets: Targets, pager: Pager, ledger: Ledger) -> None:
        self._ledger = ledger
        self._targets = targets
        self._pager = pager
        self.sharing: Sharing = count_sharing({})
        #: Whether extents without a user had to be kept, and another count should try again.
        self.owes_memory = False
        self._release_at = 0.0  # monotonic seconds: before that it need not be tried again

    def recount(
        self, targets: Iterable[Target] | None = None, *, resting: bool = False
    ) -> Iterator[None]:
        """Look at every target, yielding after each; or at *targets*, where only they can differ.

        What the others hold is taken from the last time then. *resting*: so is what of late was the
        same each time, for some seconds, unless maps has changed or a window was opened; and what
        takes long to count.
        """
        quiet, begun = not self._targets.plans_under_way, self._targets.plans_begun
        rested: list[Target] = []
        counted = targets is not None
        for target in self._targets if targets is None else targets:
            if resting and self._rests(target):
                rested.append(target)
            else:
                counted = True
                yield from self._recount(target)
        if rested and time.monotonic() > self._release_at and any(e for _, e in self._unused()):
            for target in rested:  # nothing is released unless all were counted
                yield from self._recount(target)
            rested, counted = [], True
        if counted or self.sharing.per_slot.keys() - self._targets.by_slot.keys():
            self.sharing = count_sharing({t.slot: t.sites for t in self._targets})
        if targets is None and not rested and quiet and begun == self._targets.plans_begun:
            self._release_unused()

    def _rests(self, target: Target) -> bool:
        """Whether a target need not be counted now."""
        now = time.monotonic()
        if now < target.recount_at:
            return True
        fresh = target.recount_at and now < target.counted_at + _STILL_REST
        if not fresh or not pulse.has_stood_still(target, target.count_spent):
            return False
        target.recount_at = now + self._rest(target)  # that is as good as a count
        return True

    def _rest(self, target: Target) -> float:
        """Give the seconds from one count of a target to the next."""
        cost = _COST_SHARE * sum(one.count_secs for one in self._targets)
        return max(target.rest_secs, min(cost, _COST_REST))

    def _recount(self, target: Target) -> Iterator[None]:
        if target.slot not in self._targets.by_slot:
            return
        try:
            self._look(target)
        except TargetGoneError:
            self._targets.drop(target)
        yield

    def _look(self, target: Target) -> None:
        before = target.merged_pages, target.broken, target.zero_pages
        target.count_spent = procfs.spent(target.pid)
        began = time.thread_time()
        self._targets.recall_mappings(target)
        self._count(target)
        target.count_secs = time.thread_time() - began
        same = before == (target.merged_pages, target.broken, target.zero_pages)
        target.rest_secs = min(target.rest_secs * 2 or _SHORT_REST, _LONG_REST) if same else 0.0
        target.counted_at = time.monotonic()
        target.recount_at = target.counted_at + self._rest(target)

    def _count(self, target: Target) -> None:
        target.sites, broken = _sites(target.pagemap, target.mappings)
        newly = max(0, broken - target.broken)
        target.cow_breaks += newly
        if newly >= _STORM_PAGES and newly * _STORM_SHARE >= newly + target.merged_pages:
            self._targets.tell("cow_storm", target, newly)
        self._ledger.cow_breaks += newly
        target.broken = broken
        target.zero_pages = self._zero_pages(target)
        target.anonymous = procfs.anonymous_pages(target.pid)

    def _zero_pages(self, target: Target) -> int:
        """Pages that we made zero and that nothing was written to since."""
        if target.emptied:
            target.zeros = distinct(np.concatenate((target.zeros, *target.emptied)))
            target.emptied.clear()
        if not len(target.zeros):
            return 0
        hold = target.ground.spans.hold
        written = [
            target.pagemap.present(
                start << PAGE_SHIFT, end << PAGE_SHIFT, 0, files=not hold(start, end)
            ).pages
            for start, end in _groups(target.zeros)
        ]
        target.zeros = target.zeros[~among(target.zeros, np.concatenate(written))]
        return int(np.count_nonzero(target.ground.spans.find(target.zeros)[1]))

    def _unused(self) -> Iterator[tuple[Domain, list[Extent]]]:
        """Give the extents of each domain that no target maps, as far as is known."""
        used = {e.map.inode for target in self._targets for e in target.mappings.extents}
        for domain in self._targets.domains.values():
            yield domain, [e for e in domain.store.extents.values() if e.map.inode not in used]

    def _release_unused(self) -> None:
        """An extent goes when no target maps it; children that fork made may map any of them.

        So may, at any moment, a stub that is at work without its tracer. Every target's mappings
        must have been read since the last plan was carried out.
        """
        self.owes_memory = False
        for domain, unused in self._unused():
            if not unused:
                continue
            if self._pager.unsettled or self._pager.living_children():
                self.owes_memory, self._release_at = True, time.monotonic() + _RELEASE_SECS
                continue
            for extent in unused:
                domain.sha1_cache.forget_extent(extent.number)
                try:
                    domain.store.release(extent.number)
                finally:  # its pins may have been the last of a ring
                    self._targets.hold_rings()


def _groups(pages: NDArray[np.uint64]) -> Iterator[tuple[int, int]]:
    """Give (first page, end page) of each group of pages that lie close together."""
    cuts = np.flatnonzero(pages[1:] - pages[:-1] > np.uint64(NEAR_PAGES))
    first, last = pages[np.append(0, cuts + 1)], pages[np.append(cuts, len(pages) - 1)]
    yield from zip(first.tolist(), (last + np.uint64(1)).tolist(), strict=True)


def stretches_of(
    pagemap: PageMap, merged: Merged
) -> Iterator[tuple[NDArray[np.intp], NDArray[np.uint64], NDArray[np.uint64], NDArray[np.bool_]]]:
    """Give the stretches of present pages in our mappings, near ones at once.

    The number of the mapping, first page and end page of each, and whether it shows the store yet;
    else it was written.
    """
    shift = np.uint64(PAGE_SHIFT)
    spans = Spans.of(merged.vmas.starts >> shift, merged.vmas.ends >> shift)
    for start, end in spans.groups():
        first, length, shared = pagemap.sharing(start << PAGE_SHIFT, end << PAGE_SHIFT)
        which, at, low, high = spans.cut(first, first + length.astype(np.uint64))
        yield at, low, high, shared[which]


def _sites(pagemap: PageMap, merged: Merged) -> tuple[NDArray[np.void], int]:
    """Give the store pages that our mappings still show (SITES), and how many were written."""
    shift = np.uint64(PAGE_SHIFT)
    starts = merged.vmas.starts >> shift
    number = merged.of_vmas(lambda extent: extent.number).astype(np.uint64)
    npages = merged.of_vmas(lambda extent: extent.npages)
    # the extent's page index at the first page of each VMA
    index = (merged.vmas.offsets >> shift).astype(np.int64)
    parts: list[NDArray[np.void]] = []
    written = 0
    for at, low, high, ours in stretches_of(pagemap, merged):
        written += int((high - low)[~ours].sum())
        at, low, high = at[ours], low[ours], high[ours]  # noqa: PLW2901
        place = index[at] + (low - starts[at]).astype(np.int64)
        # no further than the extent goes: what lies behind its end reads as nothing of the store
        count = np.minimum((high - low).astype(np.int64), npages[at] - place)
        good = (place >= 0) & (count > 0)
        sites = np.empty(int(np.count_nonzero(good)), SITES)
        sites["first"] = (number[at[good]] << np.uint64(32)) | place[good].astype(np.uint64)
        sites["npages"] = count[good]
        parts.append(sites)
    return np.concatenate(parts) if parts else np.empty(0, SITES), written
