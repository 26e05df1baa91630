"""Pages that were written since their merge and hold the store's content again go back to it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import numpy as np

from ksmd.core.windows import advice_of, columns
from ksmd.daemon.accounting import stretches_of
from ksmd.daemon.state import Domain, Target
from ksmd.daemon.targets import Targets
from ksmd.daemon.windows import MergeResult, Windows, Work, in_turns
from ksmd.kernel.pagemap import pages_in
from ksmd.model.errors import TargetGoneError
from ksmd.model.units import PAGE_SHIFT, PAGE_SIZE
from ksmd.model.window import Op, Record
from ksmd.remap.store import Extent

#: VmFlags of merged memory, given since, that a mapping made anew would lose: locked, and the like.
_NEVER_AGAIN = frozenset({"lo", "lf", "dc", "dd"})


class Remerger:
    """One window per target and extent; what does not fit into it waits for the next pass."""

    def __init__(self, targets: Targets, windows: Windows) -> None:
        self._targets = targets
        self._windows = windows

    def remerge_pass(self, asked: bool, result: MergeResult) -> Iterator[MergeResult]:
        """Give CoW-broken pages that hold the store's content again back to the store."""
        broken = [target for target in self._targets if target.broken]
        for turn in in_turns(broken):
            works = [self._remerge(target, asked, result) for target in turn]
            yield from self._windows.side_by_side(works, result)

    def _remerge(self, target: Target, asked: bool, result: MergeResult) -> Work[None]:
        """Give back what one target has, a window for each extent at the most."""
        if not self._may_stop(target, asked):
            return
        domain = self._targets.domain(target)
        try:
            for number, records in self._equal_again(domain, target).items():
                extent = domain.store.extents.get(number)
                if extent is None or not self._may_stop(target, asked):
                    break  # given back meanwhile, or stopped just now
                first = next(self._windows.cut(target, columns(records)))
                done = yield from self._windows.attempt(target, extent, first, asked, result)
                if done is not None:
                    carried = self._windows.account(domain, target, done, result)
                    self._windows.forget(domain, target, [carried])
                yield None
        except TargetGoneError:
            self._targets.drop(target)

    def _may_stop(self, target: Target, asked: bool) -> bool:
        here = target.slot in self._targets.by_slot and target.contexts is not None
        return here and self._windows.may_stop(target, asked)

    def _equal_again(self, domain: Domain, target: Target) -> dict[int, list[Record]]:
        self._targets.recall_mappings(target)
        if not self._found(domain, target):
            return {}
        # flags do not show in maps; with them the kernel looks at every page
        self._targets.read_mappings(target, flags=True)
        return self._found(domain, target)

    def _found(self, domain: Domain, target: Target) -> dict[int, list[Record]]:
        """Give what equals the store again, by extent, as far as is known of the mappings."""
        found: dict[int, list[Record]] = defaultdict(list)
        merged = target.mappings
        vmas, number = merged.vmas, merged.of_vmas(lambda extent: extent.number)
        fit = vmas.where(
            lambda kind: kind.perms.startswith("rw-") and not kind.flags & _NEVER_AGAIN
        )
        for at, low, high, ours in stretches_of(target.pagemap, merged):
            broken = ~ours & fit[at]
            counts = (high - low)[broken].astype(np.int64)
            pages, which = pages_in(low[broken], counts), np.repeat(at[broken], counts)
            own = target.pagemap.exclusive_of(pages)
            for page, mapping in zip(pages[own].tolist(), which[own].tolist(), strict=True):
                extent = domain.store.extents.get(int(number[mapping]))
                start = page << PAGE_SHIFT
                offset = int(vmas.offsets[mapping]) + start - int(vmas.starts[mapping])
                if extent is not None and _equals(target, start, extent, extent.index(offset)):
                    said = advice_of(vmas.kinds[vmas.kind[mapping]].flags)
                    record = Record(Op.REMERGE, start, PAGE_SIZE, offset, said)
                    found[extent.number].append(record)
        return found


def _equals(target: Target, start: int, extent: Extent, index: int) -> bool:
    if not 0 <= index < extent.npages:
        return False
    # never so that we wait for a page: the pager may be dead, and we its only heir
    held = target.memory.read(start, PAGE_SIZE)
    return bytes(extent.view(index, 1)) == held  # memoryviews are compared item by item
