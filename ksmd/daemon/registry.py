"""What programs registered of their memory: SMAs (shared memory areas) and their regions.

The 2008 interface, with the control socket's connection in the place of the patch's file
descriptor: an SMA is made over a connection and lives as long as that does, or as long as the
process that made it, whichever ends first. A region belongs to an SMA and to one process, and goes
with either. Who calls, and whose memory it is, is the kernel's word (:mod:`ksmd.kernel.peer`); a
process that called execve(2), or that runs as somebody else now, is not the one that registered.

This module keeps the books and checks them. What follows for targets, when something was added or
has gone, is for whoever asked to be told.
"""

from __future__ import annotations

import os
import re
import selectors
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

from ksmd.core.selection import Selected
from ksmd.daemon.access import denied
from ksmd.daemon.connection import Call, CallError
from ksmd.kernel import peer, procfs
from ksmd.model.errors import TargetGoneError
from ksmd.model.process import TargetId
from ksmd.model.units import PAGE_SHIFT, PAGE_SIZE

#: What status calls a process that no rule selects.
NAME = "registered"
MAX_AREAS_PER_CONNECTION = 64
_ADDRESS_LIMIT = 1 << 47
_PID_MAX = 1 << 22  # PID_MAX_LIMIT, include/linux/threads.h
_DOMAIN = re.compile(r"[A-Za-z0-9_.:-]{1,64}")

#: [start, end) in bytes.
Span = tuple[int, int]


@dataclass(eq=False, slots=True)
class Process:
    """A process that owns an SMA or has regions. ``pidfd`` is ours, and watched.

    ``uid``: the user that it must go on to be; 0: whoever, as root named it.
    """

    id: TargetId
    uid: int
    pidfd: int
    token: bytes
    domain: str = ""


@dataclass(frozen=True, slots=True)
class Region:
    """A registered range of one process: the patch's ksm_mem_slot."""

    process: Process
    start: int
    npages: int

    @property
    def end(self) -> int:
        """The first address after it."""
        return self.start + (self.npages << PAGE_SHIFT)


@dataclass(eq=False, slots=True)
class Area:
    """An SMA."""

    number: int
    connection: int
    owner: Process
    regions: list[Region] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Wish:
    """What RegisterMemoryRegion was asked for; None: not said."""

    start: int
    npages: int
    domain: str | None = None
    pid: int | None = None


class Registry:
    """All SMAs. *selector* is the main loop's; *ours* are pids that are never registered.

    *limit* gives the most regions of one user who is not root. *on_gone* is told which spans of a
    process are registered no more, and whether the process has ended.
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        ours: Collection[int],
        limit: Callable[[], int],
        on_gone: Callable[[TargetId, list[Span], bool], None],
    ) -> None:
        self._selector = selector
        self._ours = ours
        self._limit = limit
        self._on_gone = on_gone
        self._areas: dict[int, Area] = {}
        self._processes: dict[TargetId, Process] = {}
        self._next = 1

    def __len__(self) -> int:
        """Give the number of regions."""
        return sum(len(area.regions) for area in self._areas.values())

    # -- what callers do ----------------------------------------------------------------------

    def create(self, call: Call) -> int:
        """Make an SMA for the process that calls; its number."""
        mine = [area for area in self._areas.values() if area.connection == call.connection_id]
        if len(mine) >= MAX_AREAS_PER_CONNECTION:
            raise _limit_reached(f"a connection has at most {MAX_AREAS_PER_CONNECTION} SMAs")
        owner = self._process(call.open_peer(), call.peer.pid, call.peer.uid)
        area = Area(self._next, call.connection_id, owner)
        self._areas[area.number] = area
        self._next += 1
        return area.number

    def add(self, call: Call, number: int, wish: Wish, check: Callable[[Process], None]) -> Region:
        """Register a region. *check* may refuse what it finds mapped there, by CallError."""
        area = self.area(call, number)
        _check_numbers(wish)
        process = self._whose(call, area, wish)
        try:
            domain = self._domain(call, process, wish)
            region = Region(process, wish.start, wish.npages)
            self._check_room(call, region)
            check(process)
        except BaseException:
            self._settle(process)
            raise
        process.domain = domain
        area.regions.append(region)
        return region

    def remove(self, call: Call, number: int) -> int:
        """Forget all regions of an SMA, as the patch does; the SMA stays. How many there were."""
        area = self.area(call, number)
        regions, area.regions = area.regions, []
        self._forget(regions, ended=None)
        return len(regions)

    def area(self, call: Call, number: int) -> Area:
        """Find an SMA of the caller's connection."""
        area = self._areas.get(number)
        if area is None or area.connection != call.connection_id:
            raise CallError(
                "NoSuchArea", sma=number, message=f"this connection has no SMA {number}",
                hint="CreateSharedMemoryArea makes one; it lives as long as its connection",
            )  # fmt: skip
        return area

    def areas_of(self, connection: int) -> list[Area]:
        """Give the SMAs of a connection."""
        return [area for area in self._areas.values() if area.connection == connection]

    # -- what happens by itself ----------------------------------------------------------------

    def forget_connection(self, connection: int) -> None:
        """Forget what a connection that has ended had registered."""
        self._drop([area for area in self._areas.values() if area.connection == connection])

    def selected(self, only: TargetId | None) -> Iterator[Selected]:
        """Give each process that has regions (or *only* that one), as a target of its own right."""
        for process in list(self._processes.values()):
            if only is not None and process.id != only:
                continue
            spans = self.spans(process.id)
            if not spans:
                continue
            try:
                if not self._is_itself(process):
                    self._forget_process(process, ended=False)
                    continue
                info = procfs.process_info(process.id.pid)
            except TargetGoneError:
                continue  # its pidfd tells
            also = tuple((start, (end - start) >> PAGE_SHIFT) for start, end in spans)
            yield Selected(info, NAME, process.domain, (), accept_seccomp_risk=False, also=also)

    def spans(self, process: TargetId) -> list[Span]:
        """Give what is registered of a process, ascending."""
        return sorted(
            (region.start, region.end)
            for area in self._areas.values()
            for region in area.regions
            if region.process.id == process
        )

    def close(self) -> None:
        """Forget everything, telling nobody."""
        self._areas.clear()
        for process in list(self._processes.values()):
            self._let_go(process)

    def _is_itself(self, process: Process) -> bool:
        """Whether it still runs the program that registered, as the same user."""
        if peer.exec_token(process.id.pid) != process.token:
            return False
        same_user = process.uid == 0 or set(peer.user_ids(process.id.pid)) == {process.uid}
        return same_user and procfs.is_same(process.id)

    def _ended(self, key: selectors.SelectorKey, _mask: int) -> None:
        for process in list(self._processes.values()):
            if process.pidfd == key.fileobj:
                self._forget_process(process, ended=True)

    def _forget_process(self, process: Process, ended: bool) -> None:
        if ended:
            self._drop([area for area in self._areas.values() if area.owner is process])
        gone = []
        for area in self._areas.values():
            gone += [region for region in area.regions if region.process is process]
            area.regions = [region for region in area.regions if region.process is not process]
        self._forget(gone, ended=ended)
        if ended:
            self._let_go(process)

    def _drop(self, areas: list[Area]) -> None:
        gone = []
        for area in areas:
            del self._areas[area.number]
            gone += area.regions
        self._forget(gone, ended=None)
        for area in areas:
            self._settle(area.owner)

    def _forget(self, regions: list[Region], ended: bool | None) -> None:
        """Tell what is registered no more; *ended* None: look whether its process has ended."""
        by_process: dict[TargetId, list[Region]] = {}
        for region in regions:
            by_process.setdefault(region.process.id, []).append(region)
        for process_id, gone in by_process.items():
            process = gone[0].process
            over = peer.ended(process.pidfd) if ended is None else ended
            self._on_gone(process_id, [(region.start, region.end) for region in gone], over)
            if not ended:
                self._settle(process)

    # -- processes ------------------------------------------------------------------------------

    def _process(self, pidfd: int, pid: int, uid: int) -> Process:
        """Know the process behind *pidfd*, which is taken over; *uid* is whose it must be."""
        try:
            found = peer.identify(pidfd, pid)
            if uid and set(peer.user_ids(pid)) != {uid}:
                raise denied(
                    f"process {pid} does not run as user {uid} alone, as which it connected",
                    "set-user-ID programs cannot register memory",
                )
            token = peer.exec_token(pid)
        except BaseException:
            os.close(pidfd)
            raise
        known = self._processes.get(found)
        if known is not None and known.token != token:
            self._forget_process(known, ended=False)  # another program: what it held is no more
            known = self._processes.get(found)
        if known is not None:
            os.close(pidfd)
            known.token, known.uid = token, uid or known.uid
            return known
        process = Process(found, uid, pidfd, token)
        self._processes[found] = process
        self._selector.register(pidfd, selectors.EVENT_READ, self._ended)
        return process

    def _whose(self, call: Call, area: Area, wish: Wish) -> Process:
        pid = wish.pid if wish.pid is not None else call.peer.pid
        if pid == call.peer.pid:
            if not self._is_itself(area.owner):
                raise TargetGoneError(f"process {pid} runs another program since it made the SMA")
            return area.owner
        if call.peer.uid != 0:
            raise denied(f"only root may register memory of another process ({pid})")
        if pid in self._ours:
            raise _invalid(f"process {pid} is ksmd's own", "ksmd does not merge its own processes")
        if procfs.process_info(pid).kernel_thread:
            raise _invalid(f"process {pid} is a kernel thread", "it has no memory of its own")
        # root named it, so whatever user it runs as is right
        return self._process(peer.open_process(pid), pid, 0)

    def _settle(self, process: Process) -> None:
        """Let a process go that has no region and owns no SMA any more."""
        for area in self._areas.values():
            if area.owner is process or any(r.process is process for r in area.regions):
                return
        self._let_go(process)

    def _let_go(self, process: Process) -> None:
        if self._processes.pop(process.id, None) is not None:
            self._selector.unregister(process.pidfd)
            os.close(process.pidfd)

    # -- limits -----------------------------------------------------------------------------------

    def _domain(self, call: Call, process: Process, wish: Wish) -> str:
        own = f"uid:{call.peer.uid}"
        if call.peer.uid != 0:
            if wish.domain not in {None, own}:
                raise denied("only root may name a trust domain", f"yours is {own}")
            return process.domain if self.spans(process.id) else own  # root may have named one
        if wish.domain is None:
            return process.domain or f"uid:{procfs.process_info(process.id.pid).uid}"
        if not _DOMAIN.fullmatch(wish.domain):
            raise _invalid(f"{wish.domain[:80]!r} is no name of a trust domain",
                           "use up to 64 of A-Z a-z 0-9 _ . : -")  # fmt: skip
        if self.spans(process.id) and wish.domain != process.domain:
            raise _invalid(
                f"process {process.id.pid} is registered in domain {process.domain} already",
                "all memory of a process is in one trust domain",
            )
        return wish.domain

    def _check_room(self, call: Call, region: Region) -> None:
        for start, end in self.spans(region.process.id):
            if start < region.end and region.start < end:
                raise _invalid(
                    f"{region.start:#x}-{region.end:#x} overlaps the region {start:#x}-{end:#x}",
                    "RemoveMemoryRegion forgets the regions of an SMA",
                )
        if call.peer.uid == 0:
            return
        theirs = [
            area.regions for area in self._areas.values() if area.owner.uid == call.peer.uid
        ]  # fmt: skip
        if sum(map(len, theirs)) >= self._limit():
            raise _limit_reached(f"a user has at most {self._limit()} regions")


def _check_numbers(wish: Wish) -> None:
    if wish.pid is not None and not 0 < wish.pid <= _PID_MAX:
        raise _invalid(f"{_number(wish.pid)} is no process id", "")
    if wish.start < 0 or wish.start % PAGE_SIZE:
        raise _invalid(f"address {_number(wish.start)} is not the start of a page",
                       f"pages have {PAGE_SIZE} bytes")  # fmt: skip
    if wish.npages < 1:
        raise _invalid(f"a region has one page or more, not {_number(wish.npages)}", "")
    if wish.start >= _ADDRESS_LIMIT or wish.npages > (_ADDRESS_LIMIT - wish.start) >> PAGE_SHIFT:
        raise _invalid("the region ends beyond 2^47, the end of user memory", "")


def _number(value: int) -> str:
    return hex(value) if abs(value) < 1 << 64 else "with more than 64 bits"


def _invalid(message: str, hint: str) -> CallError:
    return CallError("InvalidRegion", message=message, hint=hint, reason="")


def _limit_reached(message: str) -> CallError:
    return CallError("LimitReached", message=message, hint="remove some first")
