"""Pages that were written since their merge and hold the store's content again go back to it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from ksmd.core.windows import advice_of, columns, windows_of
from ksmd.daemon.merger import Merger, MergeResult
from ksmd.daemon.state import Domain, Target
from ksmd.daemon.targets import Targets
from ksmd.model.errors import TargetGoneError
from ksmd.model.units import PAGE_SHIFT
from ksmd.model.window import Op, Record

#: VmFlags of merged memory, given since, that a mapping made anew would lose: locked, and the like.
_NEVER_AGAIN = frozenset({"lo", "lf", "dc", "dd"})


class Remerger:
    """One window per target and extent; what does not fit into it waits for the next pass."""

    def __init__(self, targets: Targets, merger: Merger) -> None:
        self._targets = targets
        self._merger = merger

    def remerge_pass(self, asked: bool, result: MergeResult) -> Iterator[MergeResult]:
        """Give CoW-broken pages that hold the store's content again back to the store."""
        for target in self._targets:
            if not target.broken or not self._may_stop(target, asked):
                continue
            domain = self._targets.domain(target)
            try:
                found = self._equal_again(domain, target)
            except TargetGoneError:
                self._targets.drop(target)
                continue
            for number, records in found.items():
                extent = domain.store.extents.get(number)
                if extent is None or not self._may_stop(target, asked):
                    break  # given back meanwhile, or stopped just now
                window, price = self._targets.settings.window, target.prices[Op.REMERGE]
                first = next(
                    windows_of(
                        columns(records), window.max_runs, window.max_pages, price, window.stop_ms
                    )
                )
                done = self._merger.open(target, first, extent)
                result.windows += 1
                carried = self._merger.account(domain, target, done, result)
                self._merger.forget(domain, target, [carried])
                yield result

    def _may_stop(self, target: Target, asked: bool) -> bool:
        here = target.slot in self._targets.by_slot and target.contexts is not None
        return here and self._merger.may_stop(target, asked)

    def _equal_again(self, domain: Domain, target: Target) -> dict[int, list[Record]]:
        found: dict[int, list[Record]] = defaultdict(list)
        self._targets.read_mappings(target, flags=True)
        for vma, extent in target.mappings:
            if extent.number not in domain.store.extents or vma.flags & _NEVER_AGAIN:
                continue
            if not vma.perms.startswith("rw-"):
                continue
            said = advice_of(vma.flags)
            _, broken = target.pagemap.still_shared(vma.start, vma.end)
            for page in broken[target.pagemap.exclusive_of(broken)].tolist():
                offset = vma.offset + (page << PAGE_SHIFT) - vma.start
                index = extent.index(offset)
                # never so that we wait for a page: the pager may be dead, and we its only heir
                held = target.memory.read(page << PAGE_SHIFT, 1 << PAGE_SHIFT)
                # as bytes: memoryviews are compared item by item
                if 0 <= index < extent.npages and bytes(extent.view(index, 1)) == held:
                    found[extent.number].append(
                        Record(Op.REMERGE, page << PAGE_SHIFT, 1 << PAGE_SHIFT, offset, said)
                    )
        return found
