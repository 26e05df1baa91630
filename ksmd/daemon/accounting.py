"""The truth about what is merged, asked of the kernel anew after every pass.

No counter is kept by adding and subtracting: maps tells which VMAs show the store, pagemap which of
their pages still do. So writes, drops, munmap, fork and exec of the targets need no bookkeeping,
and a daemon that starts over merged processes counts right at once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ksmd.core.ledger import Ledger, Sharing, count_sharing
from ksmd.daemon.state import Mapping, Target
from ksmd.daemon.targets import Targets
from ksmd.guard.client import Pager
from ksmd.kernel.pagemap import PageMap
from ksmd.model.errors import TargetGoneError
from ksmd.model.units import PAGE_SHIFT

log = logging.getLogger(__name__)


class Accounting:
    """Counts sites, CoW breaks and zero pages, and gives back extents that nobody uses."""

    def __init__(self, targets: Targets, pager: Pager, ledger: Ledger) -> None:
        self._ledger = ledger
        self._targets = targets
        self._pager = pager
        self.sharing: Sharing = count_sharing({})

    def recount(self) -> Iterator[None]:
        """Look at every target; yields after each."""
        for target in self._targets:
            try:
                self._targets.read_mappings(target)
                self._recount(target)
            except TargetGoneError:
                self._targets.drop(target)
            yield
        self.sharing = count_sharing({t.slot: t.sites for t in self._targets})
        self._release_unused()

    def _recount(self, target: Target) -> None:
        shared: list[NDArray[np.uint64]] = []
        broken = 0
        for mapping in target.mappings:
            sites, written = _sites(target.pagemap, mapping)
            shared.append(sites)
            broken += written
        target.sites = np.concatenate(shared) if shared else np.empty(0, np.uint64)
        newly = max(0, broken - target.broken)
        target.cow_breaks += newly
        self._ledger.cow_breaks += newly
        target.broken = broken
        target.zero_pages = self._zero_pages(target)

    def _zero_pages(self, target: Target) -> int:
        """Pages that we made zero and that nothing was written to since."""
        for start, end in list(target.zeros):
            present = target.pagemap.present(start << PAGE_SHIFT, end << PAGE_SHIFT, 0)
            for page in present.pages.tolist():
                target.zeros.remove(page, page + 1)
        mapped = 0
        for area in target.areas:
            for low, high in target.zeros.within(area.start >> PAGE_SHIFT, area.end >> PAGE_SHIFT):
                mapped += high - low
        return mapped

    def _release_unused(self) -> None:
        """An extent goes when no target maps it; children that fork made may map any of them."""
        used = {mapping.extent.map.inode for target in self._targets for mapping in target.mappings}
        for domain in self._targets.domains.values():
            unused = [e for e in domain.store.extents.values() if e.map.inode not in used]
            if not unused or self._pager.stats()["children"]:
                continue
            for extent in unused:
                domain.sha1_cache.forget_extent(extent.number)
                domain.store.release(extent.number)


def _sites(pagemap: PageMap, mapping: Mapping) -> tuple[NDArray[np.uint64], int]:
    """Give the store pages that one of our mappings still shows, and how many were written."""
    vma, extent = mapping.vma, mapping.extent
    shared, broken = pagemap.still_shared(vma.start, vma.end)
    shift = extent.index(vma.offset) - (vma.start >> PAGE_SHIFT)
    index = shared.astype(np.int64) + shift
    index = index[(index >= 0) & (index < extent.npages)]
    return np.uint64(extent.number << 32) | index.astype(np.uint64), len(broken)
