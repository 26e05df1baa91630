"""What merging would save, found by reading alone: no daemon, no settings of the kernel, no trace.

Nothing is opened for writing, nobody is stopped, and pages are read through /proc/PID/mem only, the
one reader that leaves shared pages shared (process_vm_readv would give a forked process copies of
its own). Pages that fork or kernel KSM shares already are counted and not read: nothing would be
saved there. What is decided with the pages, the planner of the daemon decides.

It is one look: a page that changes all the time counts as one that stays.
"""

from __future__ import annotations

import os
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ksmd.core.checksum import Checksummer, sums64_of
from ksmd.core.eligibility import areas
from ksmd.core.estimate import Estimate, TargetPages, estimate
from ksmd.core.selection import Regions, select
from ksmd.kernel import maps, pageentries, procfs, risks
from ksmd.kernel.memory import PIECE, Memory
from ksmd.kernel.pagemap import PageMap
from ksmd.model.errors import KsmdError, PrivilegeError, TargetGoneError
from ksmd.model.process import ProcessInfo, TargetId
from ksmd.model.refusal import Reason, Refusal
from ksmd.model.units import PAGE_SHIFT, PAGE_SIZE
from ksmd.settings import defaults
from ksmd.settings.values import Settings

#: Told of what is being read, for a progress line.
Progress = Callable[[str], None]
#: Pids, settings that select processes, or None: every process.
What = Sequence[int] | Settings | None

# Pages that one look at the page map takes, so that what it says is fresh when they are read.
_LOOK_PAGES = 1 << 16
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")

Pages = NDArray[np.uint64]


@dataclass(slots=True)
class _Candidate:
    """A process to look at, and what was found: pages by kind, refusals in pages."""

    process: ProcessInfo
    name: str
    domain: str
    regions: Regions
    twins: bool = True  # may another process have the same memory (CLONE_VM)?
    found: TargetPages | None = None
    room: int = 0
    pages: int = 0
    fork_shared: int = 0
    refused_pages: Counter[Reason] = field(default_factory=Counter)
    refused: Refusal | None = None


def run(what: What, progress: Progress = lambda _text: None) -> dict[str, Any]:
    """Estimate *what*; a dictionary that JSON can hold.

    ``processes``: [{pid, name, domain, pages, fork_shared, refused, sentence, detail}], in pages;
    ``domains``: [{domain, processes, and the fields of ksmd.core.estimate.Estimate}];
    ``total``: the sums of those fields that can be added; ``refusals``: {reason: pages}, and for a
    process that is refused as a whole 1; ``seconds``: how long it took.

    A process given by its pid must be there and readable (TargetGoneError, PrivilegeError); of
    others, those that are gone or may not be read are passed over or counted as refused.
    """
    started = time.monotonic()
    candidates, refusals = _choose(what)
    limits = (what if isinstance(what, Settings) else defaults()).limits
    seed = secrets.randbits(64)
    checksummer = Checksummer(PIECE >> PAGE_SHIFT)
    for number, candidate in enumerate(candidates, 1):
        pid, comm = candidate.process.id.pid, candidate.process.comm
        progress(f"process {number} of {len(candidates)}: {pid} {ascii(comm)[1:-1]}")
        try:
            _look(candidate, checksummer, seed, limits.vma_percent)
        except (TargetGoneError, PrivilegeError) as error:
            if isinstance(what, Sequence):
                raise
            candidate.found = None
            gone = isinstance(error, TargetGoneError)
            candidate.refused = Refusal(Reason.GONE if gone else Reason.PRIVILEGE)
    progress("planning")
    domains = _by_domain(candidates, seed)
    return {
        "processes": [_process(candidate) for candidate in candidates],
        "domains": [
            {"domain": domain, "processes": number, **asdict(found)}
            for domain, (number, found) in domains.items()
        ],
        "total": _total([found for _, found in domains.values()]),
        "refusals": _refusals(candidates, refusals),
        "seconds": round(time.monotonic() - started, 3),
    }


# -- which processes -------------------------------------------------------------------------------


def _choose(what: What) -> tuple[list[_Candidate], list[Refusal]]:
    if isinstance(what, Settings):
        selected, refusals = select(
            _infos(procfs.pids()), what.targets, ours=(os.getpid(),), age_of=_age
        )
        made = [_Candidate(one.process, one.name, one.domain, one.regions) for one in selected]
        return made, refusals
    if what is None:
        infos = [info for info in _infos(procfs.pids()) if not _passed_over(info)]
        twins = _same_size(infos)
    else:
        infos = [procfs.process_info(pid) for pid in dict.fromkeys(what)]
        twins = {info.id for info in infos}
    return [
        _Candidate(info, info.comm, f"uid:{info.uid}", "anon", info.id in twins) for info in infos
    ], []


def _same_size(infos: Sequence[ProcessInfo]) -> set[TargetId]:
    """Give those of all processes that may share their memory: their size is that of another.

    To compare every process with every other would take minutes where there are thousands. One that
    grows at this moment is missed; its frames are still counted once.
    """
    sizes: dict[int, list[TargetId]] = {}
    for info in infos:
        try:
            size = procfs.task_stat(info.id.pid, info.id.pid).vsize
        except KsmdError:
            continue
        sizes.setdefault(size, []).append(info.id)
    return {one for group in sizes.values() if len(group) > 1 for one in group}


def _passed_over(info: ProcessInfo) -> bool:
    return info.kernel_thread or info.zombie or info.id.pid == os.getpid()


def _infos(pids: Iterable[int]) -> Iterator[ProcessInfo]:
    for pid in pids:
        try:
            yield procfs.process_info(pid)
        except KsmdError:
            continue  # gone since, or not for our eyes


def _age(target: TargetId) -> float:
    boottime = time.clock_gettime(time.CLOCK_BOOTTIME)
    return boottime - target.start_time / _TICKS_PER_SECOND


# -- looking ---------------------------------------------------------------------------------------


def _look(candidate: _Candidate, checksummer: Checksummer, seed: int, vma_percent: int) -> None:
    """Read the candidate's pages; raise TargetGoneError or PrivilegeError."""
    pid = candidate.process.id.pid
    candidate.refused = _refusal(candidate.process, candidate.twins)
    if candidate.refused is not None:
        return
    with Memory(pid) as memory, PageMap(pid) as pagemap:
        if not procfs.is_same(candidate.process.id):
            raise TargetGoneError(f"process {pid} is gone")
        vmas = maps.smaps(pid)
        allowed, refused = areas(vmas, candidate.regions)
        for one in refused:
            if one.reason is not Reason.NOT_MAPPED:
                candidate.refused_pages[one.reason] += one.npages
        candidate.room = max(0, risks.max_map_count() * vma_percent // 100 - len(vmas))
        parts = [_empty()]
        for area in allowed:
            parts += _area(area.start, area.end, memory, pagemap, checksummer, seed)
    found = TargetPages(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    candidate.found = found
    candidate.pages = found.pages.size
    candidate.fork_shared = int(np.count_nonzero(~found.exclusive))
    candidate.refused_pages[Reason.FORK_SHARED] += candidate.fork_shared


def _refusal(process: ProcessInfo, twins: bool) -> Refusal | None:
    """Say why the daemon would leave the process alone, as far as looking can tell."""
    pid = process.id.pid
    if process.kernel_thread:
        return Refusal(Reason.KERNEL_THREAD)
    if process.zombie:
        return Refusal(Reason.ZOMBIE)
    if pid == os.getpid():
        return Refusal(Reason.OURSELVES)
    if not risks.is_x86_64_elf(pid):
        return Refusal(Reason.ARCHITECTURE)
    if twins and (other := risks.shares_memory(pid)) is not None:
        return Refusal(Reason.SHARED_MM, detail=f"process {other}")
    if signs := risks.pin_risks(pid):
        return Refusal(Reason.PINNED_PROCESS, detail="; ".join(signs))
    return None


_Columns = tuple[Pages, Pages, Pages, NDArray[np.bool_]]


def _empty() -> _Columns:
    none = np.empty(0, np.uint64)
    return none, none, none, np.empty(0, np.bool_)


def _area(
    start: int, end: int, memory: Memory, pagemap: PageMap, checksummer: Checksummer, seed: int
) -> Iterator[_Columns]:
    """Yield the columns of TargetPages for [start, end), look by look."""
    while start < end:
        present = pagemap.present(start, end, _LOOK_PAGES)
        if present.pages.size:
            yield _columns(present.pages, memory, pagemap, checksummer, seed)
        start = max(present.walk_end, start + PAGE_SIZE)


def _columns(
    pages: Pages, memory: Memory, pagemap: PageMap, checksummer: Checksummer, seed: int
) -> _Columns:
    entries = np.concatenate(
        [
            pagemap.entries(int(pages[first]), end - first)
            for first, end in _stretches(pages, pages.size)
        ]
    )
    exclusive = pageentries.is_present(entries) & pageentries.exclusive(entries)
    checksums = np.zeros(pages.size, np.uint64)
    own = np.flatnonzero(exclusive)
    kept = np.ones(pages.size, np.bool_)
    for first, end in _stretches(pages[own], checksummer.npages):
        got = _read(int(pages[own[first]]), end - first, memory, checksummer)
        checksums[own[first : first + got]] = checksummer.sums64(got, seed)
        kept[own[first + got : end]] = False  # gone since
    return pages[kept], pageentries.pfn(entries)[kept], checksums[kept], exclusive[kept]


def _read(page: int, npages: int, memory: Memory, checksummer: Checksummer) -> int:
    """Read *npages* from *page* into the buffer; the number of whole pages that came."""
    view = checksummer.buffer[: npages << PAGE_SHIFT]
    return memory.read_into(page << PAGE_SHIFT, view) >> PAGE_SHIFT


def _stretches(pages: Pages, longest: int) -> Iterator[tuple[int, int]]:
    """Cut ascending page numbers into neighbours: (first index, end index), at most *longest*."""
    if not pages.size:
        return
    cuts = (np.flatnonzero(np.diff(pages) != 1) + 1).tolist()
    for first, end in zip([0, *cuts], [*cuts, pages.size], strict=True):
        for at in range(first, end, longest):
            yield at, min(at + longest, end)


# -- figures ---------------------------------------------------------------------------------------


def _by_domain(candidates: Sequence[_Candidate], seed: int) -> dict[str, tuple[int, Estimate]]:
    """Estimate each domain that has pages: its number of processes and its figures."""
    zero = int(sums64_of(memoryview(bytes(PAGE_SIZE)), seed)[0])
    slots: dict[str, dict[int, _Candidate]] = {}
    for slot, candidate in enumerate(candidates, 1):
        if candidate.found is not None:
            slots.setdefault(candidate.domain, {})[slot] = candidate
    return {
        domain: (
            len(members),
            estimate(
                {slot: one.found for slot, one in members.items() if one.found is not None},
                zero_checksum=zero,
                vma_room={slot: one.room for slot, one in members.items()},
            ),
        )
        for domain, members in sorted(slots.items())
    }


def _total(estimates: Sequence[Estimate]) -> dict[str, int]:
    """Add up what can be added: counts, not shares."""
    names = [one.name for one in fields(Estimate) if not one.name.startswith("share_")]
    return {name: sum(getattr(one, name) for one in estimates) for name in names}


def _process(candidate: _Candidate) -> dict[str, Any]:
    refused = candidate.refused
    return {
        "pid": candidate.process.id.pid,
        "name": candidate.name,
        "domain": candidate.domain,
        "pages": candidate.pages,
        "fork_shared": candidate.fork_shared,
        "refused": refused.reason.value if refused else "",
        "sentence": refused.sentence if refused else "",
        "detail": refused.detail if refused else "",
    }


def _refusals(candidates: Sequence[_Candidate], others: Sequence[Refusal]) -> dict[str, int]:
    counts: Counter[Reason] = Counter(refusal.reason for refusal in others)
    for candidate in candidates:
        counts.update(candidate.refused_pages)
        if candidate.refused is not None:
            counts[candidate.refused.reason] += 1
    return {reason.value: number for reason, number in counts.most_common() if number}
