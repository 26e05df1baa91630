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
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ksmd.core.selection import Regions
from ksmd.core.spans import Spans
from ksmd.model.refusal import Reason
from ksmd.model.units import PAGE_SHIFT, PAGE_SIZE
from ksmd.model.vma import Kind, Vma
from ksmd.model.vmas import U64, Areas, Bools, Index, Vmas

_NOBODY = np.empty(0, np.intp)

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


class RefusedRanges:
    """All of a target, ascending: ``starts``, ``ends`` (uint64, bytes), and why.

    ``reason``: which of ``reasons`` holds for each. ``which``: the number of its mapping in
    ``vmas``, -1 where nothing is mapped.
    """

    def __init__(
        self,
        places: tuple[U64, U64],
        reason: Index,
        reasons: Sequence[Reason],
        which: Index,
        vmas: Vmas,
    ) -> None:
        self.starts, self.ends = places
        self.reason, self.reasons = reason, tuple(reasons)
        self.which, self.vmas = which, vmas

    @classmethod
    def none(cls) -> RefusedRanges:
        """No range at all."""
        nothing = np.empty(0, np.uint64)
        return cls((nothing, nothing), _NOBODY, (), _NOBODY, Vmas.of(()))

    def __len__(self) -> int:
        return int(self.starts.size)

    def __iter__(self) -> Iterator[RefusedRange]:
        npages = (self.ends - self.starts) >> np.uint64(PAGE_SHIFT)
        behind = iter(self.vmas.only(self.which[self.which >= 0]))
        columns = (self.reason, self.starts, npages, self.which)
        for reason, start, count, which in zip(*(c.tolist() for c in columns), strict=True):
            vma = next(behind) if which >= 0 else None
            yield RefusedRange(self.reasons[reason], start, count, vma)

    def pages(self) -> Counter[Reason]:
        """Count their pages by reason."""
        return self._pages.copy()

    @functools.cached_property
    def _pages(self) -> Counter[Reason]:
        """Count them once: whoever asks for the status asks for those of all targets."""
        npages = (self.ends - self.starts) >> np.uint64(PAGE_SHIFT)
        counts = np.bincount(self.reason, npages, len(self.reasons))
        found: Counter[Reason] = Counter()
        for reason, count in zip(self.reasons, counts.tolist(), strict=True):
            if count:  # a reason may stand there more than once
                found[reason] += int(count)
        return found


def refusal_of(vma: Vma | Kind, *, write_tracked_by_us: bool = False) -> Reason | None:
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
    vmas: Vmas,
    regions: Regions,
    *,
    also: Sequence[tuple[int, int]] = (),
    write_tracked_by_us: Callable[[Kind], bool] = lambda _kind: False,
    merged_by_us: Callable[[Kind], bool] = lambda _kind: False,
) -> tuple[Areas, RefusedRanges]:
    """Cut *regions* out of *vmas*: what may be scanned, and what not.

    "anon": every VMA; "heap": the VMA(s) named [heap], the rest unmentioned; else (start, npages)
    ranges, which may overlap each other. *also*: ranges besides those. VMAs for which
    *merged_by_us* holds are in neither list: they are no candidates any more, and no refusal
    either. Addresses ascend in both lists, and together with our own VMAs they cover the regions
    exactly once. ValueError on a range that is not page-aligned or is empty.
    """
    which, starts, ends = _pieces(vmas, _besides(vmas, regions, also))
    verdicts = [
        Reason.NOT_MAPPED,
        *(refusal_of(kind, write_tracked_by_us=write_tracked_by_us(kind)) for kind in vmas.kinds),
    ]
    ours = np.array([False, *map(merged_by_us, vmas.kinds)])
    refused = np.array([verdict is not None for verdict in verdicts]) & ~ours
    allowed = ~(refused | ours)
    kind = np.append(vmas.kind, np.int32(-1))[which] + 1  # the verdict of -1 is the first
    reasons = [verdict or Reason.OTHER_FLAGS for verdict in verdicts]  # no place for None
    may, not_ = allowed[kind], refused[kind]
    return (
        Areas(starts[may], ends[may], which[may], vmas),
        RefusedRanges((starts[not_], ends[not_]), kind[not_], reasons, which[not_], vmas),
    )


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


def _pieces(vmas: Vmas, regions: Regions) -> tuple[Index, U64, U64]:
    """Give the parts of *regions* that lie in one VMA or in none: its number or -1, start, end."""
    if regions == "anon":
        return np.arange(len(vmas)), vmas.starts, vmas.ends
    if regions == "heap":
        heap = np.flatnonzero(_is_heap(vmas))
        return heap, vmas.starts[heap], vmas.ends[heap]
    low, high = np.array(_union(regions), np.uint64).reshape(-1, 2).T
    place, which, starts, ends = Spans.of(vmas.starts, vmas.ends).cut(low, high)
    # between what is mapped, and before and behind it, lie the gaps of each range
    first = np.append(True, place[1:] != place[:-1])[: len(place)]
    before = np.where(first, low[place], np.append(np.uint64(0), ends)[: len(place)])
    tails = low.copy()
    last = np.append(place[1:] != place[:-1], True)[: len(place)]
    tails[place[last]] = ends[last]
    starts = np.concatenate((starts, before, tails))
    ends = np.concatenate((ends, starts[: len(place)], high))
    which = np.concatenate((which, np.full(len(place) + len(low), -1)))
    order = np.argsort(starts, kind="stable")
    order = order[starts[order] < ends[order]]
    return which[order], starts[order], ends[order]


def _is_heap(vmas: Vmas) -> Bools:
    return vmas.where(lambda kind: kind.path == "[heap]")


def _besides(vmas: Vmas, regions: Regions, also: Sequence[tuple[int, int]]) -> Regions:
    """Add ranges to *regions*; with "heap" as ranges, where the heap lies now."""
    if regions == "anon" or not also:
        return regions
    if regions == "heap":
        heap = vmas.only(_is_heap(vmas))
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
