"""A daemon that starts over merged processes: it adopts what an earlier one left with its pager.

The pager lives on when a daemon dies or is told to keep what is merged. It gives back the targets'
contexts, the extents and their pins; everything else is asked of the kernel, so that from its first
answer on the new daemon counts right, unmerges and merges further.

Nothing an earlier daemon said is believed where it can be checked. Extents take part in new merges
only when their content has been found as it was left. Targets whose process is gone are let go.
A window that was under way is over only when a stop has shown that no tracer and no stub of it is
at work any more; until then its ranges stay announced and no extent is given back. Targets that no
rule selects now, or that belong to another trust domain now, are unmerged before anything else.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace

import numpy as np

from ksmd.core.selection import Selected, select
from ksmd.daemon.bequest import STEP_PAGES, ExtentLabel, TargetLabel
from ksmd.daemon.journal import fields
from ksmd.daemon.pipeline import Pipeline
from ksmd.daemon.state import STORE_PATH, Target
from ksmd.daemon.unguarded import is_extent
from ksmd.guard import door, shadow
from ksmd.guard.client import SUCCESSOR, Pager
from ksmd.guard.held import KeptExtent
from ksmd.guard.line import PagerGoneError, PagerRefusedError
from ksmd.kernel import maps, memfd, procfs, userfaultfd
from ksmd.kernel.iouring import PinRing
from ksmd.model.errors import KsmdError, TargetGoneError
from ksmd.model.units import PAGE_SHIFT
from ksmd.model.vma import Vma
from ksmd.remap.engine import TargetContexts
from ksmd.remap.store import Extent

log = logging.getLogger(__name__)

#: How long a dead daemon's last descriptors may take to close.
_PATIENCE_SECS = 10.0
#: How long a window of an earlier daemon may be at work yet; a tracer gives up sooner.
_SETTLE_SECS = 5.0
_PAUSE_SECS = 0.1


def find_pager(name: str, patience: float = _PATIENCE_SECS) -> Pager | None:
    """Take over the pager that stands by for us, or that an earlier daemon left, if any.

    The name of both is the control socket's path. KsmdError when the earlier daemon lives, and has
    done so for *patience* seconds.
    """
    deadline = time.monotonic() + patience
    found: list[Pager] = []
    stood = True
    while stood and time.monotonic() < deadline:
        stood = _dispel(name)
        found += _claim_all(set(door.pagers(name)) - {pager.pid for pager in found}, name, patience)
        # one that was killed before it was ours comes back, with all that it guarded
        stood &= not any(pager.standing for pager in found)
    if not found:
        return None
    # one that holds something, before one that only stands by
    found.sort(key=lambda pager: (bool(pager.ids), pager.standing), reverse=True)
    first, *others = found
    for other in others:
        if other.ids:
            log.error(
                "the pager %d guards %d more targets, until they end", other.pid, len(other.ids)
            )
        other.leave()
    if not first.standing and any(other.standing and not other.ids for other in others):
        log.info("what the pager %d guards goes to the one that stands by itself", first.pid)
        first.standing = True
        first.restart()
    return first


def _dispel(name: str) -> bool:
    """End what a pager that was killed leaves for a moment: it would pass for a guard.

    A pager that stood by itself comes back: to start without it is to leave all that it guarded.
    Give whether there is one, or was a moment ago.
    """
    awaited = False
    for pid in door.left_shadows(name):
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(pid)
            stood = door.left_shadows(name).get(pid)
            if stood is not None:
                shadow.dispel(pidfd)
                awaited |= stood
            os.close(pidfd)
    seen = awaited or bool(door.standing(name))
    if seen and (found := door.open_standing(name, SUCCESSOR)) is not None:
        _, end = found  # to see that it has come so far
        end.close()
    return seen


def _claim_all(pids: set[int], name: str, patience: float) -> Iterator[Pager]:
    for pid in sorted(pids):
        try:
            pager = _claim(pid, name, patience)
        except PagerGoneError as error:
            log.error("the pager %d of an earlier daemon is left alone: %s", pid, error)
            continue
        if pager is not None:
            yield pager


def _claim(pid: int, name: str, patience: float) -> Pager | None:
    deadline = time.monotonic() + patience
    while (end := door.knock(pid)) is not None:
        try:
            return Pager.adopt(end, pid, name)
        except PagerRefusedError as error:
            if time.monotonic() > deadline:
                raise KsmdError(
                    f"the pager {pid} belongs to a daemon that lives: {error}",
                    "stop that one first, or give this one a --socket PATH of its own",
                ) from error
        except PagerGoneError:
            if time.monotonic() > deadline:
                raise
        time.sleep(_PAUSE_SECS)
    return None


class Adoption:
    """What one daemon took over. :meth:`restore` at once, :meth:`steps` as the loop's first job."""

    def __init__(self, pipeline: Pipeline, pager: Pager, ring: PinRing) -> None:
        self._pipeline = pipeline
        self._targets = pipeline.targets
        self._pager = pager
        self._unverified: list[tuple[Extent, ExtentLabel]] = []
        self._unwanted: list[Target] = []
        self._left: set[int] = set()  # inodes of extents that could not be adopted
        self._unpinned: list[Extent] = []
        self._ring = ring

    # -- at once ------------------------------------------------------------------------------

    def restore(self) -> None:
        """Take in extents and targets, and count what is shared."""
        self._ring.adopt(self._pager.rings)
        for kept in self._pager.kept:
            try:
                self._restore_extent(kept)
            except KsmdError as error:
                # who maps it stays guarded, and its memory in place: the pager holds on to it
                log.error("an extent of the store cannot be adopted: %s", error)
                self._left.add(kept.inode)
        if not self._left:
            self._ring.drop_unknown()
        self._targets.hold_rings()
        self._targets.reserve(self._pager.highest)
        for slot in self._pager.ids:
            self._restore_target(slot)
        self._choose()
        for target in self._targets:
            target.broken = sys.maxsize  # what was written before our time is no news
        with contextlib.suppress(PagerGoneError):  # it is replaced, and all is counted anew, soon
            for _ in self._pipeline.accounting.recount():
                pass
        if not (self._targets.by_slot or self._unverified):
            return
        sharing = self._pipeline.accounting.sharing
        log.warning(
            "adopted what an earlier ksmd left: %d targets, %d extents; %d pages share %d",
            len(self._targets.by_slot),
            len(self._unverified),
            sharing.pages_shared + sharing.pages_sharing,
            sharing.pages_shared,
        )

    def _restore_extent(self, kept: KeptExtent) -> None:
        label = ExtentLabel.read(kept.about)
        place = memfd.map_existing(kept.fd, label.npages)
        try:
            extent = self._targets.adopt_extent(label, place)
        except KeyError:
            # pager and daemon died at once, and the service manager kept the rest
            extent = self._targets.adopt_extent(replace(label, pins=[]), place)
            self._unpinned.append(extent)
        self._pipeline.merger.reserve(label.number)
        self._unverified.append((extent, label))
        if kept.length != label.npages << PAGE_SHIFT:  # the daemon died while it told of it
            self._pager.keep(replace(kept, length=label.npages << PAGE_SHIFT))
        try:
            memfd.lock(place)
        except KsmdError as error:
            log.warning("an adopted extent is locked by the pager alone: %s", error)

    def _restore_target(self, slot: int) -> None:
        """Take in a target; one that cannot be stays with the pager, guarded, until its end."""
        guard, track = self._pager.contexts(slot)
        try:
            if userfaultfd.is_dead(guard):
                raise TargetGoneError("its memory is gone")
            selected = self._as_it_was(slot)
            if track < 0:
                raise KsmdError("it has no tracking context")
            self._targets.adopt(slot, selected, TargetContexts(guard, track))
        except KsmdError as error:
            dead = userfaultfd.is_dead(guard)
            os.close(guard)
            if track >= 0:
                os.close(track)
            if dead:
                self._pager.drop(slot)
            else:
                log.error("target %s cannot be adopted: %s", self._pager.about(slot), error)

    def _as_it_was(self, slot: int) -> Selected:
        label = TargetLabel.read(self._pager.about(slot))
        if not procfs.is_same(label.process):
            raise KsmdError("its process is gone, and another one holds its memory")
        process = procfs.process_info(label.pid)
        vmas = list(maps.maps(label.pid))
        if any(vma.inode in self._left for vma in vmas):
            raise KsmdError("it maps an extent that could not be adopted")
        if self._pager.recalled and any(self._is_lost(label.pid, vma) for vma in vmas):
            raise KsmdError(
                "it maps an extent for which the service manager had no room",
                "raise FileDescriptorStoreMax= of ksmd.service",
            )
        return Selected(process, label.name, label.domain, (), label.accept_seccomp_risk)

    def _is_lost(self, pid: int, vma: Vma) -> bool:
        known = self._targets.extents_by_inode()
        return vma.path.startswith(STORE_PATH) and vma.inode not in known and is_extent(pid, vma)

    def _choose(self) -> None:
        """Find what the settings say of each target now, and who is to be unmerged."""
        settings = self._targets.settings
        processes = [target.selected.process for target in self._targets]
        chosen, _ = select(processes, settings.targets, ours=self._targets.ours)
        rules = {selected.process.id: selected for selected in chosen}
        for target in self._targets:
            try:
                self._targets.read_mappings(target)
            except TargetGoneError:
                self._targets.drop(target)
                continue
            domains = {label.domain for extent, label in self._unverified if _maps(target, extent)}
            if domains:
                target.selected = replace(target.selected, domain=min(domains))
            wanted = rules.get(target.id)
            if wanted is not None:
                self._targets.update(target, wanted)
            if wanted is None or not domains <= {wanted.domain} or settings.run == "unmerge":
                self._unwanted.append(target)

    # -- as a job -----------------------------------------------------------------------------

    def steps(self) -> Iterator[float]:
        """End what was under way, unmerge whom no rule selects, verify the extents."""
        yield from self._settle()
        if self._unwanted:
            pids = ", ".join(str(target.pid) for target in self._unwanted)
            log.warning("unmerging what the settings do not select (any more): pids %s", pids)
            yield from self._unmerge(self._unwanted)
        broken = yield from self._verify()
        if broken:
            victims = [t for t in self._targets if any(_maps(t, extent) for extent in broken)]
            yield from self._unmerge(victims)
        self._drop_dead()

    def _drop_dead(self) -> None:
        """Let go of what could not be adopted and has ended meanwhile."""
        for slot in self._pager.ids:
            if slot in self._targets.by_slot:
                continue
            guard, track = self._pager.contexts(slot)
            if userfaultfd.is_dead(guard):
                self._pager.drop(slot)
            for fd in (guard, track):
                if fd >= 0:
                    os.close(fd)

    def _settle(self) -> Iterator[float]:
        """Wait until no tracer and no stub of an earlier window is at work in any target."""
        if unsettled := self._pager.unsettled:
            log.warning("windows were under way in %d targets", len(unsettled))
        deadline = time.monotonic() + _SETTLE_SECS
        while self._pager.unsettled and time.monotonic() < deadline:
            self._pipeline.windows.settle_left_over()
            yield _PAUSE_SECS if self._pager.unsettled else 0.0
        for slot in self._pager.unsettled:
            target = self._targets.by_slot.get(slot)
            log.warning(
                "a window of the earlier ksmd could not be ended in pid %d yet; the next stop will",
                target.pid if target is not None else 0,
            )
        for _ in self._pipeline.accounting.recount():
            yield 0.0

    def _unmerge(self, targets: Sequence[Target]) -> Iterator[float]:
        there = [target for target in targets if target.slot in self._targets.by_slot]
        try:
            for _ in self._pipeline.unmerger.unmerge(there):
                yield 0.0
        except KsmdError as error:
            log.error("%s (%s)", error, error.hint)

    def _verify(self) -> Generator[float, None, list[Extent]]:
        """Compute new checksums and compare digests; give the extents that are not as they were."""
        broken = []
        for extent, label in self._unverified:
            if extent in self._unpinned:
                broken.append(extent)
                log.error(
                    "extent %d of domain %s (%d pages) lost its pins when pager and daemon were"
                    " killed at once: who maps it gets pages of his own",
                    label.number,
                    label.domain,
                    label.npages,
                    extra=fields(domain=label.domain),
                )
                continue
            sound = yield from self._verify_one(extent, label)
            if not sound:
                broken.append(extent)
                log.critical(
                    "extent %d of domain %s (%d pages) does not hold what was put into it: it is"
                    " not used for merges any more, and who maps it gets pages of his own",
                    label.number,
                    label.domain,
                    label.npages,
                    extra=fields(domain=label.domain),
                )
        self._unverified.clear()
        return broken

    def _verify_one(self, extent: Extent, label: ExtentLabel) -> Generator[float, None, bool]:
        digest = label.begin_digest(self._pager.key)
        sums = []
        for first in range(0, label.npages, STEP_PAGES):
            domain = self._targets.domains.get(label.domain)
            if domain is None or domain.store.extents.get(label.number) is not extent:
                return True  # nobody maps it any more, and it was released
            view = extent.view(first, min(STEP_PAGES, label.npages - first))
            digest.update(view)
            sums.append(domain.store.sums(view))
            yield 0.0
        if not digest.matches(label.digest):
            return False
        extent.checksums[:] = np.concatenate(sums)
        extent.good[:] = True
        return True


def _maps(target: Target, extent: Extent) -> bool:
    return any(one is extent for one in target.mappings.extents)
