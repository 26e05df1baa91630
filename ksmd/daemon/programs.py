"""What programs ask for: the 2008 interface as methods of org.ksmd.Control.

A program makes an SMA, registers regions of its own memory, drives scanners or shares an SMA at
once, and listens to what happens to it. Here each call meets the books (:mod:`registry`), the
scanners, and what follows for targets; long work goes into turns, so that no caller holds up
another, and everybody but root works within an allowance of the daemon's time.
"""

from __future__ import annotations

import contextlib
import errno
import selectors
from collections.abc import Iterable, Iterator
from typing import Any

from ksmd.core.scope import Ranges
from ksmd.daemon.access import denied
from ksmd.daemon.allowance import SHARE, Allowance
from ksmd.daemon.chronicle import Chronicle
from ksmd.daemon.connection import Call, CallError
from ksmd.daemon.events import Events
from ksmd.daemon.pipeline import Pipeline
from ksmd.daemon.registry import NAME, Process, Region, Registry, Wish
from ksmd.daemon.releases import Releases
from ksmd.daemon.report import named
from ksmd.daemon.scanners import Outcome, Scanners
from ksmd.daemon.state import Target
from ksmd.daemon.tuning import FLAG_RUN
from ksmd.daemon.turns import Turn, Turns
from ksmd.kernel import peer, procfs
from ksmd.kernel.vmaquery import VmaQuery
from ksmd.model.errors import KsmdError
from ksmd.model.process import TargetId
from ksmd.model.refusal import SENTENCES, Reason
from ksmd.model.vma import Vma

#: Calls that wait for their caller's allowance instead of being refused, or that cost nothing.
_PATIENT = frozenset({"Scan", "Share", "RemoveMemoryRegion", "GetApiVersion", "Features"})
#: VMAs of a region that are looked at before it is taken in; scans look at all of them.
_CHECKED_VMAS = 1024
_UINT_MAX = 2**32 - 1


class NothingRegisteredError(KsmdError):
    """There is nothing to scan."""


class Programs:
    """Everything that is registered, and everybody who scans or listens."""

    def __init__(self, pipeline: Pipeline, turns: Turns, selector: selectors.BaseSelector) -> None:
        self._pipeline = pipeline
        self._targets = pipeline.targets
        self._turns = turns
        self._releases = Releases(pipeline, turns)
        self.allowance = Allowance()
        self.registry = Registry(
            selector,
            self._targets.ours,
            lambda: self._targets.settings.limits.regions_per_user,
            self._releases.begin,
        )
        self._scanners = Scanners(pipeline, self.allowance)
        self._events = Events()
        self._taking_up: set[TargetId] = set()
        self._targets.registered = self.registry.selected
        self._chronicle = Chronicle(NAME)
        self._targets.tell = self._tell

    def _tell(self, kind: str, target: Target, pages: int = 0, reason: str = "") -> None:
        self._chronicle.note(kind, target, pages)
        self._events.tell(kind, target, pages, reason)

    def closed(self, connection: int) -> None:
        """Forget all that belonged to a connection that has ended."""
        self._events.forget_connection(connection)
        self._scanners.forget_connection(connection)
        self.registry.forget_connection(connection)

    @contextlib.contextmanager
    def admitted(self, method: str, call: Call) -> Iterator[None]:
        """Charge the caller for the time of the block; RateLimited who has none left."""
        uid = call.peer.uid
        if uid != 0 and method not in _PATIENT and (left := self.allowance.left(uid)) <= 0:
            raise CallError(
                "RateLimited",
                message=f"ksmd has worked for user {uid} for as long as it may",
                hint="try again a little later",
                seconds=round(-left / SHARE + 0.1, 1),
            )
        with self.allowance.charged(uid):
            yield

    def dispatch(
        self, method: str, parameters: dict[str, Any], call: Call
    ) -> dict[str, Any] | None:
        """Answer one call; None when the answer comes later."""
        match method:
            case "CreateSharedMemoryArea":
                return {"sma": self.registry.create(call)}
            case "RegisterMemoryRegion":
                return self._register(parameters, call)
            case "RemoveMemoryRegion":
                return self._remove(parameters["sma"], bool(parameters.get("wait")), call)
            case "Share":
                self._share(parameters["sma"], call)
                return None
            case "CreateScan":
                return {"scan": self._scanners.create(call.connection_id)}
            case "Scan":
                return self._scan(parameters, call)
            case "Monitor":
                self._events.listen(call, self.own(call))
                return None
        raise CallError("org.varlink.service.MethodNotImplemented", method=method)

    # -- who sees what ------------------------------------------------------------------------

    def own(self, call: Call) -> TargetId | None:
        """The one process that the caller may ask about; None: all."""
        if call.peer.uid == 0:
            return None
        return peer.caller(call.open_peer(), call.peer.pid)

    def visible(self, call: Call, reader_gid: int, targets: Iterable[Any]) -> list[Any]:
        """Keep, of the status of all targets, what the caller may see."""
        if call.peer.uid == 0 or (reader_gid != 0 and call.in_group(reader_gid)):
            return list(targets)
        only = self.own(call)
        known = {target.pid for target in self._targets if target.id == only}
        return [target for target in targets if target["pid"] in known]

    def check_own(self, call: Call, pid: int) -> None:
        """Refuse a caller who asks about a process that is not its own."""
        only = self.own(call)
        if only is not None and only.pid != pid:
            raise denied(f"only root may ask about another process ({pid})")

    # -- regions ----------------------------------------------------------------------------------

    def _register(self, parameters: dict[str, Any], call: Call) -> dict[str, Any]:
        wish = Wish(
            parameters["addr"],
            parameters["npages"],
            parameters.get("domain"),
            parameters.get("pid"),
        )
        extents = self._targets.extents_by_inode()

        def check(process: Process) -> None:
            _check_mapped(process, wish, extents.keys())

        region = self.registry.add(call, parameters["sma"], wish, check)
        self._take_up(region, call.peer.uid)
        target = self._target(region.process.id)
        domain = target.selected.domain if target is not None else region.process.domain
        return {"domain": domain}

    def _take_up(self, region: Region, uid: int) -> None:
        """Read the process's maps in a turn: once for all regions that come in one go."""
        process = region.process.id
        if process in self._taking_up:
            return
        self._taking_up.add(process)

        def steps() -> Iterator[float]:
            while (pause := self.allowance.wait(uid)) > 0:
                yield pause
            self._taking_up.discard(process)
            with self.allowance.charged(uid):
                self._targets.refresh_one(process)

        self._turns.add(Turn("taking up a region", steps(), lambda _: None, lambda _: None))

    def _remove(self, sma: int, wait: bool, call: Call) -> dict[str, Any] | None:
        processes = {region.process.id for region in self.registry.area(call, sma).regions}
        removed = self.registry.remove(call, sma)
        if not wait:
            return {"regions": removed}

        def steps() -> Iterator[Any]:
            while any(self._releases.under_way(process) for process in processes):
                yield 0.002
            yield {"regions": removed}

        self._answer_later(call, "RemoveMemoryRegion", steps())
        return None

    def _target(self, process: TargetId) -> Any:
        return next((target for target in self._targets if target.id == process), None)

    # -- scanners ---------------------------------------------------------------------------------

    def _scan(self, parameters: dict[str, Any], call: Call) -> dict[str, Any] | None:
        number = parameters["scan"]
        self._scanners.check(call.connection_id, number)
        scan = self._targets.settings.scan
        pages = _count(parameters, "pages_to_scan", scan.pages_to_scan)
        most = _count(parameters, "max_pages_to_merge", scan.max_pages_to_merge)
        if not _count(parameters, "flags", FLAG_RUN) & FLAG_RUN:
            return _scanned(Outcome())  # as in the patch: without the flag nothing is done
        cover = self._cover(call)
        if cover is not None and not cover:
            raise nothing_registered()

        def steps() -> Iterator[Any]:
            yield 0.0
            work = self._scanners.scan(
                number, call.peer.uid, lambda: self._cover(call), pages, most
            )
            for step in work:
                if cover is None and not self._targets.by_slot:
                    raise NothingRegisteredError("no process is a target of ksmd")
                yield _scanned(step) if isinstance(step, Outcome) else step

        self._answer_later(call, "Scan", steps())
        return None

    def _share(self, sma: int, call: Call) -> None:
        ranges = _ranges(self.registry.area(call, sma).regions)
        if not ranges:
            raise nothing_registered()

        def steps() -> Iterator[Any]:
            yield 0.0
            for step in self._scanners.share(call.peer.uid, ranges):
                yield _shared(step) if isinstance(step, Outcome) else step

        self._answer_later(call, "Share", steps())

    def _cover(self, call: Call) -> dict[TargetId, Ranges] | None:
        if call.peer.uid == 0:
            return None
        areas = self.registry.areas_of(call.connection_id)
        return _ranges(region for area in areas for region in area.regions)

    def _answer_later(self, call: Call, name: str, steps: Iterator[Any]) -> None:
        """Work in turns; the generator's one result that is no float is the reply."""

        def fail(error: KsmdError) -> None:
            if isinstance(error, NothingRegisteredError):
                missing = nothing_registered()
                call.error(missing.name, **missing.parameters)
            else:
                code = int(error.exit_code)
                call.error("Failed", message=str(error), hint=error.hint, exit_code=code)

        self._turns.add(Turn(name, steps, call.reply, fail, wanted=lambda: not call.closed))


def nothing_registered() -> CallError:
    """Make the error for a scan without anything to scan: EAGAIN in the patch."""
    return CallError(
        "NothingRegistered",
        message="nothing is registered that this scan could cover",
        hint="RegisterMemoryRegion registers memory; try again then",
        errno=errno.EAGAIN,
    )


def _ranges(regions: Iterable[Region]) -> dict[TargetId, Ranges]:
    found: dict[TargetId, list[tuple[int, int]]] = {}
    for region in regions:
        found.setdefault(region.process.id, []).append((region.start, region.end))
    return {process: sorted(ranges) for process, ranges in found.items()}


def _count(parameters: dict[str, Any], name: str, default: int) -> int:
    value: int = parameters.get(name, default)
    if not 0 <= value <= _UINT_MAX:
        raise CallError("org.varlink.service.InvalidParameter", parameter=name)
    return value


def _scanned(outcome: Outcome) -> dict[str, Any]:
    return {
        "scanned": outcome.scanned,
        "merged": outcome.merged,
        "settled": outcome.settled,
        "passes": 0,
    }


def _shared(outcome: Outcome) -> dict[str, Any]:
    return {
        "scanned": outcome.scanned,
        "merged": outcome.merged,
        "settled": outcome.settled,
        "refusals": named(outcome.refused),
    }


def _check_mapped(process: Process, wish: Wish, ours: Iterable[int]) -> None:
    """Refuse a region of which some part is mapped by nothing, or by what is never merged."""
    pid, inodes = process.id.pid, set(ours)
    at, end = wish.start, wish.start + (wish.npages << 12)
    with VmaQuery(pid, procfs.live_tid(pid)) as query:
        for _ in range(_CHECKED_VMAS):
            vma = query.covering(at)
            reason = _unfit(vma, inodes)
            if vma is None or reason is not None:
                reason = reason or Reason.NOT_MAPPED
                raise CallError(
                    "InvalidRegion",
                    message=f"{at:#x} cannot be registered: {SENTENCES[reason]}",
                    hint="only private anonymous memory that is mapped can be merged",
                    reason=str(reason),
                )
            at = vma.end
            if at >= end:
                return


def _unfit(vma: Vma | None, ours: set[int]) -> Reason | None:
    if vma is None:
        return Reason.NOT_MAPPED
    if vma.inode in ours:
        return None  # merged already
    if vma.perms[3] == "s":
        return Reason.SHARED_MAPPING
    if vma.inode:
        return Reason.FILE_BACKED
    return None if vma.perms.startswith("rw") else Reason.NOT_WRITABLE
