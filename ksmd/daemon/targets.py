"""Which processes are targets now, and what of them may be scanned.

Refreshed at the start of every full scan. A process that has exited, has called execve or has given
its pid to another is dropped with all its entries here, and at any moment by :meth:`Targets.drop`
when a read or a window finds it gone.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Iterator

from ksmd.core.eligibility import areas
from ksmd.core.selection import Selected, select
from ksmd.core.tables import PageTables
from ksmd.daemon.state import Domain, Mapping, Target
from ksmd.guard.client import KeptExtent, Pager
from ksmd.kernel import procfs
from ksmd.kernel.iouring import PinRing
from ksmd.kernel.memory import Memory
from ksmd.kernel.pagemap import PageMap
from ksmd.model.errors import KsmdError, PrivilegeError, TargetGoneError
from ksmd.model.process import ProcessInfo, TargetId
from ksmd.model.refusal import Reason, Refusal
from ksmd.model.units import PAGE_SHIFT
from ksmd.model.vma import Vma
from ksmd.remap.store import Extent
from ksmd.settings import Settings
from ksmd.settings.models import TableSizes

#: What maps shows of the store, before the domain's name.
_STORE_PATH = "/memfd:ksmd-"
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


class Targets:
    """All targets by slot, and their domains by name."""

    def __init__(self, settings: Settings, sizes: TableSizes, ring: PinRing, pager: Pager) -> None:
        self.settings = settings
        self.domains: dict[str, Domain] = {}
        self.by_slot: dict[int, Target] = {}
        self.refusals: list[Refusal] = []
        self.ours: set[int] = {os.getpid()}
        self._sizes = sizes
        self._ring = ring
        self._pager = pager
        self._next_slot = 1

    def __iter__(self) -> Iterator[Target]:
        return iter(list(self.by_slot.values()))

    def by_pid(self, pid: int) -> Target | None:
        """The target of that pid, if there is one."""
        return next((target for target in self if target.pid == pid), None)

    def domain(self, target: Target) -> Domain:
        """The target's trust domain."""
        return self.domains[target.selected.domain]

    def tables(self, target: Target) -> PageTables:
        """The tables in which the target's pages are."""
        return self.domain(target).tables

    # -- coming and going -------------------------------------------------------------------

    def refresh(self) -> None:
        """Select anew, drop who is gone, and read the maps of everyone."""
        chosen, self.refusals = select(
            self._candidates(), self.settings.targets, ours=self.ours, age_of=_age
        )
        wanted = {selected.process.id: selected for selected in chosen}
        for target in self:
            unwanted = target.id not in wanted and not target.mappings
            if unwanted or not procfs.is_same(target.id):
                self.drop(target)
        known = {target.id: target for target in self}
        for process, selected in wanted.items():
            if process in known:
                self._update(known[process], selected)
            else:
                self._add(selected)
        for target in self:
            self.read_areas(target)

    def _candidates(self) -> Iterator[ProcessInfo]:
        """Processes to select from: only those named, where every rule names pids."""
        pids: set[int] | None = set()
        for rule in self.settings.targets:
            if rule.match.pid is None:
                pids = None
                break
            assert pids is not None
            pids.update(rule.match.pid)
        for pid in procfs.pids() if pids is None else sorted(pids):
            with contextlib.suppress(TargetGoneError):
                yield procfs.process_info(pid)

    def _update(self, target: Target, selected: Selected) -> None:
        """Settings may have changed; a merged target keeps its domain until it is unmerged."""
        if target.mappings and selected.domain != target.selected.domain:
            return
        if selected.domain != target.selected.domain:
            self.tables(target).forget(target.slot)
            self._domain(selected.domain)
        target.selected = selected

    def _domain(self, name: str) -> Domain:
        if name not in self.domains:
            self.domains[name] = Domain(
                name, self._sizes, self._ring, PagerKeeper(self._pager, self._ring)
            )
        return self.domains[name]

    def _add(self, selected: Selected) -> None:
        pid = selected.process.id.pid
        try:
            memory = Memory(pid)
        except TargetGoneError:
            return
        except PrivilegeError as error:
            self.refusals.append(Refusal(Reason.PRIVILEGE, str(pid), str(error)))
            return
        self._domain(selected.domain)
        try:
            target = Target(self._next_slot, selected, memory, PageMap(pid))
        except KsmdError:
            memory.close()
            return
        self._next_slot += 1
        self.by_slot[target.slot] = target

    def drop(self, target: Target) -> None:
        """Forget a target: its process is gone, or it is none any more and nothing is merged."""
        self.by_slot.pop(target.slot, None)
        self.tables(target).forget(target.slot)
        target.memory.close()
        target.pagemap.close()
        if target.contexts is not None:
            self._pager.drop(target.slot)
            os.close(target.contexts.guard)
            os.close(target.contexts.track)
            target.contexts = None

    # -- what may be scanned ------------------------------------------------------------------

    def extents_by_inode(self) -> dict[int, Extent]:
        """Every extent of every domain, by the inode that maps shows."""
        found: dict[int, Extent] = {}
        for domain in self.domains.values():
            found.update(domain.store.by_inode())
        return found

    def read_mappings(self, target: Target) -> None:
        """Read what of the target is merged now; what may be scanned stays as it was read last."""
        extents = self.extents_by_inode()
        vmas = procfs.maps(target.pid, target.memory.tid)
        target.vmas = len(vmas)
        target.mappings = [
            Mapping(vma, extents[vma.inode])
            for vma in vmas
            if vma.inode in extents and vma.path.startswith(_STORE_PATH)
        ]

    def read_areas(self, target: Target) -> None:
        """Read the target's maps: what may be scanned, what not, and what is merged."""
        extents = self.extents_by_inode()

        def ours(vma: Vma) -> bool:
            return vma.inode in extents and vma.path.startswith(_STORE_PATH)

        try:
            vmas = procfs.smaps(target.pid)
        except TargetGoneError:
            self.drop(target)
            return
        target.vmas = len(vmas)
        target.mappings = [Mapping(vma, extents[vma.inode]) for vma in vmas if ours(vma)]
        target.areas, target.refused_ranges = areas(
            vmas, target.selected.regions, merged_by_us=ours
        )

    def refused_pages(self) -> Counter[Reason]:
        """Pages (or processes, for refusals of a whole process) per reason, as of the last scan."""
        counts: Counter[Reason] = Counter(refusal.reason for refusal in self.refusals)
        for target in self:
            for refused in target.refused_ranges:
                counts[refused.reason] += refused.npages
            if target.refused is not None:
                counts[target.refused] += 1
        return counts


class PagerKeeper:
    """The store's second holder is the pager."""

    def __init__(self, pager: Pager, ring: PinRing) -> None:
        self._pager = pager
        self._ring = ring
        self._rings: list[int] = []

    def keep(self, extent: Extent) -> None:
        """Hold an extent before its first use."""
        if self._ring.fds != self._rings:
            self._rings = self._ring.fds
            self._pager.hold_rings(self._rings)
        place = extent.map
        length = extent.npages << PAGE_SHIFT
        self._pager.keep(KeptExtent(place.inode, place.fd_ro, extent.offset(0), length))

    def release(self, extent: Extent) -> None:
        """Let an extent go."""
        self._pager.release(extent.map.inode)


def _age(target: TargetId) -> float:
    boottime = time.clock_gettime(time.CLOCK_BOOTTIME)
    return boottime - target.start_time / _TICKS_PER_SECOND
