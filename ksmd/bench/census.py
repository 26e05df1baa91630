"""What the victims' memory really holds: frames, contents, page tables. Asked of the kernel.

Nothing here trusts a contender's own counters, and reading changes nothing: contents are read
through /proc/PID/mem, and frames are looked at before contents, because a read of an absent page
maps the zero page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ksmd.bench.victims import Victim
from ksmd.core.checksum import Checksummer
from ksmd.kernel import maps, pageentries, procfs
from ksmd.kernel.memory import Memory
from ksmd.kernel.pagemap import PageMap
from ksmd.model.units import PAGE_SHIFT

_SEED = 20080401  # any: contents are compared within one run
_KIB = 1024
_USER_END = 1 << 47  # the vsyscall page lies beyond


@dataclass(frozen=True, slots=True)
class Kernel:
    """Kernel memory that belongs to the victims: VMAs, and page tables in bytes."""

    vmas: int
    page_tables: int


def entries(victims: Sequence[Victim]) -> NDArray[np.uint64]:
    """Give the pagemap entry of every page of the victims."""
    parts = []
    for victim in victims:
        with PageMap(victim.pid) as pagemap:
            parts += [
                pagemap.entries(part.start >> PAGE_SHIFT, part.npages) for part in victim.ranges
            ]
    return np.concatenate(parts)


def frames(found: NDArray[np.uint64]) -> int:
    """Count the distinct frames behind pagemap entries, the zero page left out."""
    numbers = np.unique(pageentries.pfn(found))
    return int(np.count_nonzero((numbers != 0) & (numbers != pageentries.zero_pfn())))


def file_frames(found: NDArray[np.uint64]) -> int:
    """Count the distinct frames of files (and so of a store) behind pagemap entries."""
    return frames(found[pageentries.is_file(found)])


def contents(victims: Sequence[Victim]) -> NDArray[np.uint64]:
    """Give a 64-bit checksum of every page of the victims."""
    checksummer = Checksummer()
    sums = []
    for victim in victims:
        with Memory(victim.pid) as memory:
            for part in victim.ranges:
                for at in range(0, part.npages, checksummer.npages):
                    n = min(checksummer.npages, part.npages - at)
                    view = checksummer.buffer[: n << PAGE_SHIFT]
                    memory.read_into(part.start + (at << PAGE_SHIFT), view)
                    sums.append(checksummer.sums64(n, _SEED).copy())
    found: NDArray[np.uint64] = np.concatenate(sums)
    return found


def zero_content() -> int:
    """Give the checksum of a page of zeros."""
    return int(Checksummer(1).sums64(1, _SEED)[0])


def possible(sums: NDArray[np.uint64], zero: int) -> int:
    """Count the pages that could be saved: all but one of each content, and all of zeros."""
    kinds, counts = np.unique(sums, return_counts=True)
    saved = int((counts - 1).sum())
    return saved + int(zero in kinds)


def kernel_memory(victims: Sequence[Victim]) -> Kernel:
    """Count the VMAs and page tables of the victims."""
    vmas = sum(len(maps.maps(victim.pid)) for victim in victims)
    tables = sum(_kib(victim.pid, "VmPTE") for victim in victims)
    return Kernel(vmas, tables)


def _kib(pid: int, field: str) -> int:
    return int(procfs.status_fields(pid).get(field, "0 kB").split()[0]) * _KIB


def anonymous_pages(pids: Sequence[int]) -> int:
    """Count the anonymous pages of some processes, cheaply."""
    return sum(_kib(pid, "RssAnon") for pid in pids) >> PAGE_SHIFT


def shared_memory_pages(pid: int) -> int:
    """Count the pages of memfds and the like that a process maps."""
    return _kib(pid, "RssShmem") >> PAGE_SHIFT


def resident_without_store(pids: Sequence[int]) -> int:
    """Bytes of memory behind the private mappings of some processes: what they share counts once.

    So memfds are left out; a library counts in full, whoever else has it loaded.
    """
    parts = []
    for pid in pids:
        with PageMap(pid) as pagemap:
            for vma in maps.maps(pid):
                if vma.perms.endswith("p") and vma.end <= _USER_END:
                    first, npages = vma.start >> PAGE_SHIFT, (vma.end - vma.start) >> PAGE_SHIFT
                    parts.append(pagemap.entries(first, npages))
    return frames(np.concatenate(parts)) << PAGE_SHIFT


def descendants(pid: int) -> list[int]:
    """A process, its children, theirs, and so on."""
    return [pid, *(one for child in procfs.children(pid) for one in descendants(child))]


def huge_bytes(victims: Sequence[Victim]) -> int:
    """Bytes of the victims that huge page entries map, of their own or of a store."""
    total = 0
    for victim in victims:
        for line in Path(f"/proc/{victim.pid}/smaps_rollup").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in {"AnonHugePages", "ShmemPmdMapped"}:
                total += int(rest.split()[0]) * _KIB
    return total
