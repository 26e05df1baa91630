"""Processes that map the store without a guard: found, told of, and given pages of their own.

A guard ends only with the last descriptor of its context, so it takes two deaths: the pager's and
the daemon's; or, for a child, the pager's between reading of the fork and telling us of it. From
then on the memory still reads right, but what the program drops reads as before instead of as
zeros. Nothing can undo what was read so, and nobody can say whether it was; so this is logged as an
error. What can be done is to end it: every page becomes memory of the program's own.

A page that is in the page table keeps its content. A page that is not becomes zeros: it was dropped
while the guard stood and not touched since (the common case), or dropped after, which is zeros too.
That could be wrong only for a page that reclaim took out since the guard fell, when the store was
no longer locked; so this is done as early as possible.

A store mapping of another daemon is guarded or, within a window, about to be: its VMA is registered
or its process traced, and neither lasts. So who is found twice, some time apart, is ours to help. A
process cannot pretend to be one: the file must belong to root, or to the user ksmd runs as, and be
sealed off by its mode.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

from ksmd.core.price import WindowPrice
from ksmd.core.selection import Selected
from ksmd.core.windows import unmerge_records, windows_of
from ksmd.daemon import memory
from ksmd.daemon.prepare import refuse_early
from ksmd.daemon.state import PASSING, STORE_PATH, Target
from ksmd.daemon.targets import Targets
from ksmd.kernel import maps, memfd, procfs
from ksmd.kernel.memory import Memory
from ksmd.kernel.pagemap import PageMap
from ksmd.model.errors import KsmdError, TargetGoneError
from ksmd.model.process import TargetId
from ksmd.model.refusal import Reason
from ksmd.model.units import PAGE_SHIFT
from ksmd.model.vma import Vma
from ksmd.model.vmas import Vmas
from ksmd.model.window import Op, WindowRequest
from ksmd.remap.engine import Engine, Order, RefusedTargetError

log = logging.getLogger(__name__)

#: VmFlags of a VMA that some userfaultfd context watches.
_GUARDED = frozenset({"um", "ui", "uw"})
#: Longer than a stub may be between the mmap and the guard.
_AGAIN_SECS = 0.5
_TRIES = 20
_PAUSE_SECS = 0.1


@dataclass(frozen=True, slots=True)
class Unguarded:
    """A process, and those of its mappings of the store that nobody guards."""

    process: TargetId
    vmas: Vmas

    @property
    def npages(self) -> int:
        """Their pages."""
        return int((self.vmas.ends - self.vmas.starts).sum()) >> PAGE_SHIFT


class Rescue:
    """Looks for such processes and unmerges them."""

    def __init__(self, targets: Targets, engine: Engine) -> None:
        self._targets = targets
        self._engine = engine

    def steps(self) -> Iterator[float]:
        """Look at every process; unmerge those who are found; tell of those who are left."""
        found = yield from self._find(procfs.pids())
        if found:
            yield _AGAIN_SECS
            found = yield from self._find([one.process.pid for one in found])
        self._targets.unguarded = sum(one.npages for one in found)
        for one in found:
            log.error(
                "pid %d maps %d pages of the store that nobody guards (a pager and its daemon"
                " died): what it dropped since then may have read as before instead of as zeros;"
                " its pages are given back now",
                one.process.pid,
                one.npages,
            )
        for one in found:
            try:
                yield from self._unmerge(one)
            except TargetGoneError:
                continue
            except KsmdError as error:
                log.critical("pid %d stays unguarded: %s", one.process.pid, error)
        if found:
            left = yield from self._find([one.process.pid for one in found])
            self._targets.unguarded = sum(one.npages for one in left)

    def _find(self, pids: list[int]) -> Generator[float, None, list[Unguarded]]:
        found = []
        for pid in pids:
            if pid in self._targets.ours:
                continue
            try:
                one = look(pid)
            except KsmdError:
                continue
            if one is not None:
                found.append(one)
            yield 0.0
        return found

    def _unmerge(self, one: Unguarded) -> Iterator[float]:
        memory.check(one.process.pid, one.npages << PAGE_SHIFT)
        refused: RefusedTargetError | None = None
        for _ in range(_TRIES):
            left = look(one.process.pid)
            if left is None or not procfs.is_same(one.process):
                log.warning("pid %d has its pages back", one.process.pid)
                return
            try:
                yield from self._windows(left)
            except RefusedTargetError as error:
                refused = error
                if error.reason not in PASSING:
                    break
            yield _PAUSE_SECS
        if refused is not None:
            raise KsmdError(f"{refused.reason} {refused.detail}")
        raise KsmdError("its mappings could not be replaced")

    def _windows(self, one: Unguarded) -> Iterator[float]:
        window = self._targets.settings.window
        self._refuse_early(one.process)
        price = WindowPrice(Op.UNMERGE)
        for inode in {kind.inode for kind in one.vmas.kinds}:
            records = unmerge_records(one.vmas.of_file(inode), None, window.max_pages)
            for batch in windows_of(
                records, window.max_runs, window.max_pages, price, window.stop_ms
            ):
                request = WindowRequest(one.process, batch, inode, window.deadline_ms)
                done = self._engine.window(Order(request, None))
                if done.refused is Reason.GONE:
                    raise TargetGoneError(f"process {one.process.pid} is gone")
                if done.refused is not None:
                    raise RefusedTargetError(done.refused, done.detail)
                price.learn(batch, done.total_us, done.at_work_us)
                yield 0.0

    def _refuse_early(self, process: TargetId) -> None:
        """Refuse what a window could harm, as for any target."""
        deadline = self._targets.settings.window.deadline_ms
        selected = Selected(procfs.process_info(process.pid), "", "", (), False)
        with Memory(process.pid) as memory, PageMap(process.pid) as pagemap:
            refuse_early(Target(0, selected, memory, pagemap), self._engine, deadline)


def look(pid: int) -> Unguarded | None:
    """Tell what of the store a process maps without a guard, None when nothing. KsmdError."""
    if STORE_PATH.encode() not in procfs.read_process(pid, "maps"):
        return None
    process = procfs.target_id(pid)
    if procfs.status_fields(pid).get("TracerPid", "0") != "0":
        return None
    vmas = Vmas.of(
        vma
        for vma in maps.smaps(pid)
        if vma.path.startswith(STORE_PATH)
        and vma.perms[3] == "p"
        and not vma.flags & _GUARDED
        and is_extent(pid, vma)
    )
    return Unguarded(process, vmas) if len(vmas) else None


def is_extent(pid: int, vma: Vma) -> bool:
    """Tell a store of ksmd from a file that somebody gave the same name."""
    try:
        found = Path(f"/proc/{pid}/map_files/{vma.start:x}-{vma.end:x}").stat()
    except OSError:
        return False
    sealed_off = found.st_uid in (0, os.geteuid()) and stat.S_IMODE(found.st_mode) == 0
    return sealed_off and found.st_size == memfd.FILE_SIZE
