"""Which processes are targets now, and what of them may be scanned.

Refreshed at the start of every full scan. A process that has exited, has called execve or has given
its pid to another is dropped with all its entries here, and at any moment by :meth:`Targets.drop`
when a read or a window finds it gone.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from ksmd.core.eligibility import areas
from ksmd.core.inherit import flagged_as_before
from ksmd.core.selection import Selected, select, united
from ksmd.core.tables import PageTables
from ksmd.core.windows import Ground
from ksmd.daemon import pulse
from ksmd.daemon.bequest import ExtentLabel
from ksmd.daemon.state import Domain, Merged, Target, Tell, is_ours
from ksmd.guard.client import Pager
from ksmd.guard.held import KeptExtent
from ksmd.kernel import maps, procfs, risks
from ksmd.kernel.iouring import PinRing
from ksmd.kernel.memfd import ExtentMap
from ksmd.kernel.memory import Memory
from ksmd.kernel.pagemap import PageMap
from ksmd.kernel.thp import LargeFolios
from ksmd.model.errors import KsmdError, PrivilegeError, TargetGoneError
from ksmd.model.process import ProcessInfo, TargetId
from ksmd.model.refusal import Reason, Refusal
from ksmd.model.units import PAGE_SHIFT
from ksmd.model.vmas import Vmas
from ksmd.remap.engine import TargetContexts
from ksmd.remap.store import Extent
from ksmd.settings.values import Settings, TableSizes

log = logging.getLogger(__name__)

#: What is registered of one process, or of all (None): one entry for each process.
Registered = Callable[[TargetId | None], Iterable[Selected]]
#: VmFlags of memory that is registered with a userfaultfd: missing, write-protected, minor.
_FAULT_FLAGS = frozenset({"um", "uw", "ui"})
#: Seconds for which flags are good enough to scan by: at least and at most, and in between so much
#: for each mapping. To read one takes some 6 us: less than a tenth of a percent of one core then.
_REREAD_SECS, _REREAD_MOST, _REREAD_EACH = 60.0, 600.0, 0.01
#: And maps itself, while it is as long as it was.
_MAPS_SECS = 10.0
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


class Targets:
    """All targets by slot, and their domains by name."""

    def __init__(
        self,
        settings: Settings,
        sizes: TableSizes,
        ring: PinRing,
        pager: Pager,
        folios_note: Path | None = None,
    ) -> None:
        """*folios_note*: where to note that a setting is changed; None: none is (LargeFolios)."""
        self.settings = settings
        self.domains: dict[str, Domain] = {}
        self.by_slot: dict[int, Target] = {}
        self.refusals: list[Refusal] = []
        self.ours: set[int] = {os.getpid()}
        self.unguarded = 0  # pages of the store that processes map without a guard
        self._sizes = sizes
        self._ring = ring
        self._pager = pager
        self._folios = LargeFolios(
            folios_note, lambda: folios_note is not None and self.settings.store.large_folios
        )
        if self._folios.recover():
            log.warning("put a setting of huge pages back, which a killed ksmd had changed")
        self._next_slot = 1
        self._seen: frozenset[TargetId] = frozenset()  # selected at the last refresh
        #: Plans that are carried out now, and those that ever were begun: what the store has for
        #: them is in use, whatever was known of the targets' mappings before.
        self.plans_under_way = 0
        self.plans_begun = 0
        #: What callers of the control socket registered, see daemon.registry.
        self.registered: Registered = _nothing_registered
        #: Told of what happens to targets, see daemon.events.
        self.tell: Tell = _tell_nobody

    def __iter__(self) -> Iterator[Target]:
        """Give every target; one that is dropped meanwhile is not met any more."""
        for target in list(self.by_slot.values()):
            if target.slot in self.by_slot:
                yield target

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
        for _ in self.refreshing():
            pass

    def refreshing(self, *, if_changed: bool = False) -> Iterator[None]:
        """Do as :meth:`refresh`, yielding after each target: maps may be long.

        *if_changed*: flags may be a minute old, or older where there are very many. That is enough
        to scan by, not to merge by.
        """
        began = time.monotonic()
        wanted, self.refusals = self._wanted(lasting=if_changed)
        self._seen = frozenset(wanted)
        for target in self:
            if not (target.felt_at >= began or procfs.is_same(target.id)):
                self.drop(target)
            elif target.id not in wanted:
                self._unwanted(target)
        self._drop_unused_domains()
        known = {target.id: target for target in self}
        for process, selected in wanted.items():
            if process in known:
                self.update(known[process], selected)
            else:
                self._add(selected)
        for target in self:
            if not (if_changed and self._unmoved(target)):
                self.read_areas(target, max_age=_flags_last(target) if if_changed else 0.0)
            target.anonymous = procfs.anonymous_pages(target.pid)
            yield

    def _unmoved(self, target: Target) -> bool:
        """Whether maps may be taken to be as it was some seconds ago, to scan by.

        That is while the target has mapped as much as it had, and we have changed nothing there;
        and for longer while it has not run at all.
        Maps of tens of thousands of mappings take longer than all else a pass does when idle.
        """
        now = time.monotonic()
        if target.last_window >= target.maps_read:
            return False
        if now < target.reread_at and pulse.has_stood_still(target, target.flags_spent):
            target.maps_read = target.flags_read = now  # that is as good
            target.memory.may_pin &= target.slot not in self._pager.unsettled
            return True
        if now - target.maps_read > _MAPS_SECS or now - target.flags_read > _flags_last(target):
            return False
        with contextlib.suppress(TargetGoneError):
            target.memory.may_pin &= not self._may_wait(target)
            return procfs.mapped_pages(target.pid) == target.mapped
        return False

    def _wanted(self, *, lasting: bool) -> tuple[dict[TargetId, Selected], list[Refusal]]:
        """What rules and registrations select now, by process, and who is refused as a whole.

        *lasting*: targets that have not run may be what they were some seconds ago.
        """
        chosen, refusals = select(
            self._candidates(lasting), self.settings.targets, ours=self.ours, age_of=_age
        )
        wanted = {selected.process.id: selected for selected in chosen}
        for registered in self.registered(None):
            process = registered.process.id
            wanted[process] = united(wanted.get(process), registered)
        return wanted, refusals

    def stirred(self) -> bool:
        """Whether a pass could find something new: other processes, or one that has grown.

        Much cheaper than a pass: one line of /proc for each process.
        """
        if frozenset(self._wanted(lasting=True)[0]) != self._seen:
            return True
        return any(
            procfs.anonymous_pages(target.pid) > target.anonymous + max(256, target.anonymous >> 6)
            for target in self
        )

    def refresh_one(self, process: TargetId) -> Target | None:
        """Select one process anew and read its maps; None when it is no target (any more)."""
        target = next((target for target in self if target.id == process), None)
        try:
            infos = [procfs.process_info(process.pid)] if procfs.is_same(process) else []
        except TargetGoneError:
            infos = []
        chosen, _ = select(infos, self.settings.targets, ours=self.ours, age_of=_age)
        wanted = chosen[0] if chosen else None
        for registered in self.registered(process) if infos else ():
            wanted = united(wanted, registered)
        if target is not None and not infos:
            self.drop(target)
        elif target is not None and wanted is None:
            self._unwanted(target)
        elif target is not None and wanted is not None:
            self.update(target, wanted)
        elif wanted is not None:
            target = self._add(wanted)
        if target is None or target.slot not in self.by_slot:
            return None
        self.read_areas(target)
        return target if target.slot in self.by_slot else None

    def _unwanted(self, target: Target) -> None:
        """Nothing selects the target any more: it goes when nothing in it is merged."""
        if target.mappings or target.slot in self._pager.unsettled:
            target.selected = replace(target.selected, regions=(), also=())
        else:
            self.drop(target)

    def _drop_unused_domains(self) -> None:
        """Forget trust domains without a target and without a store page; users come and go."""
        used = {target.selected.domain for target in self}
        for name in self.domains.keys() - used:
            if not self.domains[name].store.extents:
                del self.domains[name]

    def _candidates(self, lasting: bool) -> Iterator[ProcessInfo]:
        """Processes to select from: only those named, where every rule names pids."""
        pids: set[int] | None = set()
        for rule in self.settings.targets:
            if rule.match.pid is None:
                pids = None
                break
            assert pids is not None
            pids.update(rule.match.pid)
        known = {target.pid: target for target in self} if lasting else {}
        for pid in procfs.pids() if pids is None else sorted(pids):
            with contextlib.suppress(TargetGoneError):
                yield pulse.info(known[pid]) if pid in known else procfs.process_info(pid)

    def update(self, target: Target, selected: Selected) -> None:
        """Settings may have changed; a merged target keeps its domain until it is unmerged."""
        if target.mappings and selected.domain != target.selected.domain:
            return
        if selected.domain != target.selected.domain:
            self.tables(target).forget(target.slot)
            target.settled = None
            self._domain(selected.domain)
        if (selected.regions, selected.also) != (target.selected.regions, target.selected.also):
            target.flags_read = target.reread_at = -math.inf
        target.selected = selected

    def _domain(self, name: str) -> Domain:
        if name not in self.domains:
            keeper = PagerKeeper(name, self._pager, self._ring)
            self.domains[name] = Domain(name, self._sizes, self._ring, keeper, self._folios)
        return self.domains[name]

    def hold_rings(self) -> None:
        """Have the pager hold the pin rings that there are now."""
        self._pager.hold_rings(self._ring.named)

    # -- what an earlier daemon left ----------------------------------------------------------

    def reserve(self, slot: int) -> None:
        """Use no slot up to *slot*: the pager has seen it, and never sees a number twice."""
        self._next_slot = max(self._next_slot, slot + 1)

    def adopt_extent(self, label: ExtentLabel, place: ExtentMap) -> Extent:
        """Take in an extent whose rings have been adopted."""
        store = self._domain(label.domain).store
        token = self._ring.adopt_pin(label.pins)
        return store.adopt(label.number, place, token)

    def adopt(self, slot: int, selected: Selected, contexts: TargetContexts) -> None:
        """Take in a target under the slot that the pager knows it by. TargetGoneError."""
        pid = selected.process.id.pid
        memory = Memory(pid)
        try:
            target = Target(slot, selected, memory, PageMap(pid), contexts=contexts)
        except KsmdError:
            memory.close()
            raise
        target.tell = self.tell
        self._domain(selected.domain)
        self.by_slot[slot] = target

    # -- new targets --------------------------------------------------------------------------

    def _add(self, selected: Selected) -> Target | None:
        pid = selected.process.id.pid
        try:
            memory = Memory(pid)
        except TargetGoneError:
            return None
        except KsmdError as error:
            # not a privilege: out of file descriptors, which others must not suffer from
            denied = isinstance(error, PrivilegeError)
            reason = Reason.PRIVILEGE if denied else Reason.STORE_FULL
            self.refusals.append(Refusal(reason, str(pid), str(error)))
            return None
        self._domain(selected.domain)
        try:
            target = Target(self._next_slot, selected, memory, PageMap(pid))
        except KsmdError:
            memory.close()
            return None
        target.tell = self.tell
        self._next_slot += 1
        self.by_slot[target.slot] = target
        return target

    def drop(self, target: Target) -> None:
        """Forget a target: its process is gone, or it is none any more and nothing is merged."""
        if self.by_slot.pop(target.slot, None) is None:
            return
        self.tell("target_gone", target)
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

    def read_mappings(self, target: Target, flags: bool = False) -> None:
        """Read what of the target is merged now; what may be scanned stays as it was read last.

        *flags*: with VmFlags, which takes the kernel some milliseconds for a GiB.
        """
        read = maps.smaps if flags else maps.maps
        self._take_mappings(target, read(target.pid, target.memory.tid))

    def recall_mappings(self, target: Target) -> None:
        """Do the same, unless maps is as it was when it was read last."""
        text = procfs.maps_text(target.pid, target.memory.tid)
        known = self._known(text)
        if known != target.known_mappings:
            self._take_mappings(target, maps.disjoint(maps.parse_maps(text)), known)

    def _take_mappings(self, target: Target, vmas: Vmas, known: int = 0) -> None:
        """Note what is merged; *known* is what maps was, 0 where it was not read for that."""
        target.vmas, target.known_mappings = len(vmas), known
        target.mappings = Merged(vmas, self.extents_by_inode())

    def read_areas(self, target: Target, *, max_age: float = 0.0) -> None:
        """Read the target's maps: what may be scanned, what not, and what is merged.

        What maps shows as it was, or in another shape, has the flags that it had, if those are
        no older than *max_age*, in seconds: they do not show in maps, and to give them the kernel
        looks at every page.
        """
        now, extents = time.monotonic(), self.extents_by_inode()
        vmas: Vmas | None = None
        try:
            target.maps_read, target.mapped = now, procfs.mapped_pages(target.pid)
            text = procfs.maps_text(target.pid)
            known = self._known(text)
            if now - target.flags_read < max_age:
                if known == target.known_areas:
                    target.memory.may_pin &= not self._may_wait(target)
                    return
                vmas = flagged_as_before(
                    maps.disjoint(maps.parse_maps(text)),
                    target.flagged,
                    ours=lambda kind: is_ours(kind, extents),
                )
            if vmas is None:
                target.flags_read, target.flags_spent = now, procfs.spent(target.pid)
                target.reread_at = now + _REREAD_MOST
                vmas = maps.smaps(target.pid)
        except TargetGoneError:
            self.drop(target)
            return
        target.recount_at = 0.0 if known != target.known_areas else target.recount_at
        target.known_areas, target.flagged = known, vmas
        self._take_mappings(target, vmas, known)
        others = {kind.flags for kind in vmas.kinds if not is_ours(kind, extents)}
        target.handles_faults = any(flags & _FAULT_FLAGS for flags in others)
        target.memory.may_pin = not (target.handles_faults or self._may_wait(target))
        target.areas, target.refused_ranges = areas(
            vmas, target.selected.regions, also=target.selected.also,
            merged_by_us=lambda kind: is_ours(kind, extents),
        )  # fmt: skip
        target.ground = Ground.of(target.areas)

    def _known(self, maps: bytes) -> int:
        """Give a number that all of maps goes into, and the extents that tell what is ours."""
        return hash((maps, tuple(self.extents_by_inode())))

    def _may_wait(self, target: Target) -> bool:
        """Whether a page that is absent might have to be waited for.

        For the program itself; or for our own pager, which may be dead, and waits for us then.
        """
        return risks.may_answer_faults(target.pid) or target.slot in self._pager.unsettled

    def refused_pages(self) -> Counter[Reason]:
        """Pages (or processes, for refusals of a whole process) per reason, as of the last scan."""
        counts: Counter[Reason] = Counter(refusal.reason for refusal in self.refusals)
        counts[Reason.UNGUARDED] = self.unguarded
        for target in self:
            counts.update(target.refused_ranges.pages())
            if target.left_alone is not None:
                counts[target.left_alone] += 1
        return counts


def _flags_last(target: Target) -> float:
    return min(max(_REREAD_SECS, target.vmas * _REREAD_EACH), _REREAD_MOST)


class PagerKeeper:
    """The store's second holder is the pager."""

    def __init__(self, domain: str, pager: Pager, ring: PinRing) -> None:
        self._domain = domain
        self._pager = pager
        self._ring = ring

    def keep(self, extent: Extent) -> None:
        """Hold an extent before its first use."""
        self._pager.hold_rings(self._ring.named)
        place = extent.map
        length = extent.npages << PAGE_SHIFT
        pins = self._ring.slots(extent.token)
        label = ExtentLabel.of(self._domain, extent, pins, self._pager.key).as_json()
        kept = KeptExtent(place.inode, place.fd_ro, extent.offset(0), length, label)
        try:
            self._pager.keep(kept)
        except KsmdError:
            with contextlib.suppress(KsmdError):  # nor shall another pager be asked to
                self._pager.release(place.inode)
            raise

    def release(self, extent: Extent) -> None:
        """Let an extent go."""
        self._pager.release(extent.map.inode)


def _nothing_registered(_process: TargetId | None) -> Iterable[Selected]:
    return ()


def _tell_nobody(kind: str, target: Target, pages: int = 0, reason: str = "") -> None:
    """Nobody listens."""


def _age(target: TargetId) -> float:
    boottime = time.clock_gettime(time.CLOCK_BOOTTIME)
    return boottime - target.start_time / _TICKS_PER_SECOND
