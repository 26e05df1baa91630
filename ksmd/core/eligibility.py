"""Which VMAs may be scanned and merged at all, and why each of the others may not.

This is a list of what is allowed, never of what is forbidden: a VMA is eligible when it is plain
private anonymous memory and every one of its VmFlags is known to be harmless. A flag that a later
kernel adds makes a VMA ineligible until someone has thought it through. The flags are those of
show_smap_vma_flags() in fs/proc/task_mmu.c (proc_pid_smaps(5)).

What a merge changes about a VMA decides what is harmless: the pages become a private mapping of a
memfd, made by mmap(2) with the same protection. Huge-page advice is given again, and accounting may
differ without the program noticing; locks, fork and dump advice, seals, keys may not.

Executable memory (rwx, what a JIT writes its code to) is refused. The kernel would map a store page
executable, but the program's own hardening (MemoryDenyWriteExecute, SELinux' execmod) may forbid
that mapping while it allows the anonymous one, and code buffers are rewritten all the time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from ksmd.core.selection import Regions
from ksmd.model.refusal import Reason
from ksmd.model.units import PAGE_SHIFT, PAGE_SIZE
from ksmd.model.vma import Area, Vma

#: Flags that an eligible VMA may have, each with what it means for a merge.
HARMLESS_FLAGS = {
    "rd": "readable; required",
    "wr": "writable; required",
    "mr": "may be made readable: so may a private file mapping",
    "mw": "may be made writable: so may a private file mapping, whatever the file's mode",
    "me": "may be made executable: memfds lie on a mount that allows it",
    "ac": "accounted: a private writable file mapping is, too",
    "nr": "no swap space reserved (MAP_NORESERVE): only accounting",
    "hg": "huge pages advised: the page is small when it is merged, and its mapping is told, too",
    "nh": "huge pages unwanted: the store's are mapped by small entries; its mapping is told, too",
    "sd": "soft-dirty: set on every new VMA, so a remapped page can only count as changed",
}

#: Flags with a reason of their own, the most telling first. MAP_DROPPABLE implies wf and dd.
_REFUSED_FLAGS = (
    ("ht", Reason.HUGETLB),
    ("pf", Reason.PFN_IO),
    ("io", Reason.PFN_IO),
    ("mm", Reason.PFN_IO),
    ("sh", Reason.SHARED_MAPPING),
    ("ms", Reason.SHARED_MAPPING),
    ("gd", Reason.STACK),
    ("ss", Reason.SHADOW_STACK),
    ("dp", Reason.DROPPABLE),
    ("sl", Reason.SEALED),
    ("lo", Reason.LOCKED),
    ("lf", Reason.LOCKED),
    ("wf", Reason.WIPEONFORK),
    ("dc", Reason.DONTFORK),
    ("dd", Reason.DONTDUMP),
    ("um", Reason.USERFAULTFD),
    ("uw", Reason.USERFAULTFD),
    ("ui", Reason.USERFAULTFD),
    ("mg", Reason.KERNEL_KSM),
)


@dataclass(frozen=True, slots=True)
class RefusedRange:
    """A range that may not be scanned; ``vma`` is None where nothing is mapped."""

    reason: Reason
    start: int
    npages: int
    vma: Vma | None


def refusal_of(vma: Vma, *, write_tracked_by_us: bool = False) -> Reason | None:
    """Say why *vma* may not be merged, None when it may.

    *write_tracked_by_us*: the daemon's own userfaultfd context watches the VMA for writes, so that
    ``uw`` is ours. A VMA has one context only, so it cannot be the program's at the same time.
    A VMA whose VmFlags were not read is refused.
    """
    flags = vma.flags - {"uw"} if write_tracked_by_us else vma.flags
    return _refusal(vma.path, flags, vma.perms, bool(vma.inode) or vma.device != (0, 0))


@functools.lru_cache(maxsize=1024)  # a program has few kinds of mappings, however many of them
def _refusal(path: str, flags: frozenset[str], perms: str, has_file: bool) -> Reason | None:
    if (reason := _by_name(path)) is not None:
        return reason
    for flag, reason in _REFUSED_FLAGS:
        if flag in flags:
            return reason
    if perms[3:] != "p":
        return Reason.SHARED_MAPPING
    if has_file or not _anonymous_name(path):
        return Reason.FILE_BACKED
    if perms[:2] != "rw":
        return Reason.NOT_WRITABLE
    if "x" in perms or not flags <= HARMLESS_FLAGS.keys() or not {"rd", "wr"} <= flags:
        return Reason.OTHER_FLAGS
    return None


def detail_of(vma: Vma) -> str:
    """Give the detail behind a refusal of *vma* for OTHER_FLAGS, "" when there is none."""
    if not vma.flags:
        return "VmFlags not read"
    if "x" in vma.perms:
        return "executable and writable (code written at run time)"
    unknown = sorted(vma.flags - HARMLESS_FLAGS.keys())
    return f"VmFlags {' '.join(unknown)}" if unknown else ""


def areas(
    vmas: Iterable[Vma],
    regions: Regions,
    *,
    also: Sequence[tuple[int, int]] = (),
    write_tracked_by_us: Callable[[Vma], bool] = lambda _vma: False,
    merged_by_us: Callable[[Vma], bool] = lambda _vma: False,
) -> tuple[list[Area], list[RefusedRange]]:
    """Cut *regions* out of *vmas* (ascending, as in maps): what may be scanned, and what not.

    "anon": every VMA; "heap": the VMA(s) named [heap], the rest unmentioned; else (start, npages)
    ranges, which may overlap each other. *also*: ranges besides those. VMAs for which
    *merged_by_us* holds are in neither list: they are no candidates any more, and no refusal
    either. Addresses ascend in both lists, and together with our own VMAs they cover the regions
    exactly once. ValueError on a range that is not page-aligned or is empty.
    """
    allowed: list[Area] = []
    refused: list[RefusedRange] = []
    found = list(vmas)
    for start, end, vma in _pieces(found, _besides(found, regions, also)):
        npages = (end - start) >> PAGE_SHIFT
        if vma is None:
            refused.append(RefusedRange(Reason.NOT_MAPPED, start, npages, None))
        elif not merged_by_us(vma):
            reason = refusal_of(vma, write_tracked_by_us=write_tracked_by_us(vma))
            if reason is None:
                allowed.append(Area(start, end, vma))
            else:
                refused.append(RefusedRange(reason, start, npages, vma))
    return allowed, refused


def _anonymous_name(path: str) -> bool:
    return path in {"", "[heap]"} or path.startswith("[anon:")


def _by_name(path: str) -> Reason | None:
    """Refuse what its name gives away, before flags that say the same less clearly."""
    if path.startswith("/secretmem"):
        return Reason.SECRET
    if path.startswith("/anon_hugepage"):
        return Reason.HUGETLB
    if path.startswith("[stack"):
        return Reason.STACK
    if path.startswith("[") and not path.startswith("[anon_shmem:") and not _anonymous_name(path):
        return Reason.SPECIAL_MAPPING
    return None


def _pieces(vmas: list[Vma], regions: Regions) -> Iterator[tuple[int, int, Vma | None]]:
    """Yield (start, end, vma) of every part of *regions* that lies in one VMA or in none."""
    if regions == "anon" or regions == "heap":  # noqa: PLR1714  (narrows the type)
        for vma in vmas:
            if regions == "anon" or vma.path == "[heap]":
                yield vma.start, vma.end, vma
        return
    index = 0
    for start, end in _union(regions):
        at = start
        while index < len(vmas) and vmas[index].end <= at:
            index += 1
        here = index  # a VMA may reach into the next range: do not consume it
        while here < len(vmas) and vmas[here].start < end:
            vma = vmas[here]
            here += 1
            if at == vma.start and vma.end <= end:  # most do
                at = vma.end
                yield vma.start, at, vma
                continue
            if at < vma.start:
                yield at, vma.start, None
            yield max(at, vma.start), min(end, vma.end), vma
            at = min(end, vma.end)
        if at < end:
            yield at, end, None


def _besides(vmas: list[Vma], regions: Regions, also: Sequence[tuple[int, int]]) -> Regions:
    """Add ranges to *regions*; with "heap" as ranges, where the heap lies now."""
    if regions == "anon" or not also:
        return regions
    if regions == "heap":
        heap = [vma for vma in vmas if vma.path == "[heap]"]
        regions = tuple((vma.start, (vma.end - vma.start) >> PAGE_SHIFT) for vma in heap)
    return (*regions, *also)


def _union(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Turn (start, npages) ranges into ascending, disjoint (start, end) ranges."""
    merged: list[tuple[int, int]] = []
    for start, npages in sorted(ranges):
        if start < 0 or start % PAGE_SIZE or npages <= 0:
            raise ValueError(f"not a range of pages: start {start:#x}, npages {npages}")
        end = start + (npages << PAGE_SHIFT)
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged
