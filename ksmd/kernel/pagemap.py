"""Which pages a process has, and whom they belong to: /proc/PID/pagemap.

Two ways lead there. PAGEMAP_SCAN (an ioctl, Linux 6.7) gives regions of pages of chosen categories:
compact where memory is contiguous, and one entry per huge page. Reading gives eight bytes per page,
on every kernel. Page numbers are addresses >> 12. Frame numbers are zero without CAP_SYS_ADMIN.

What the entries of one of our own merged mappings (private, file-backed) mean: present and FILE is
a page still shared; present and not FILE is a page broken by a write; absent is neither.

Sources: include/uapi/linux/fs.h, fs/proc/task_mmu.c, Documentation/admin-guide/mm/pagemap.rst.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import os
import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ksmd.kernel import procfs
from ksmd.kernel.pageentries import (
    Entries,
    Flags,
    anonymous,
    exclusive,
    huge,
    is_file,
    is_present,
    is_swapped,
    pfn,
)
from ksmd.kernel.taskfile import TaskFile
from ksmd.model.errors import TargetGoneError
from ksmd.model.units import HUGE_PAGE_PAGES, PAGE_SHIFT, PAGE_SIZE

__all__ = [
    "PageMap",
    "Present",
    "exclusive",
    "has_scan",
    "is_file",
    "is_present",
    "is_swapped",
    "pfn",
]

Pages = NDArray[np.uint64]

PAGEMAP_SCAN = 0xC0606610
PAGE_IS_FILE = 1 << 2
PAGE_IS_PRESENT = 1 << 3
PAGE_IS_SWAPPED = 1 << 4
PAGE_IS_PFNZERO = 1 << 5
PAGE_IS_HUGE = 1 << 6

_REGION = np.dtype([("start", np.uint64), ("end", np.uint64), ("categories", np.uint64)])
_REGIONS = 4096
_CHUNK_PAGES = 1 << 16
_NEAR_PAGES = 1024  # an entry costs some 10 ns to read, a read some 20 us from Python
_SHIFT = np.uint64(PAGE_SHIFT)

_room = threading.local()


class _PmScanArg(ctypes.Structure):
    """struct pm_scan_arg."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            "size",
            "flags",
            "start",
            "end",
            "walk_end",
            "vec",
            "vec_len",
            "max_pages",
            "category_inverted",
            "category_mask",
            "category_anyof_mask",
            "return_mask",
        )
    ]


@dataclass(frozen=True, slots=True)
class Present:
    """Pages that a process has.

    ``pages``: page numbers, ascending; ``huge``: for each, whether a 2 MiB entry maps it;
    ``walk_end``: the address up to which the range was looked at, where the next call goes on.
    """

    pages: Pages
    huge: Flags
    walk_end: int


@functools.cache
def has_scan() -> bool:
    """Tell, by trying it on ourselves, whether the kernel has PAGEMAP_SCAN."""
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        argument = _PmScanArg(ctypes.sizeof(_PmScanArg), 0, 0, PAGE_SIZE, 0, 0, 0, 0, 0, 0, 0, 0)
        argument.category_mask = argument.return_mask = PAGE_IS_PRESENT
        fcntl.ioctl(fd, PAGEMAP_SCAN, argument)
    except OSError as error:
        if error.errno in (errno.ENOTTY, errno.EINVAL, errno.EPERM):
            return False
        raise
    finally:
        os.close(fd)
    return True


def _regions() -> NDArray[np.void]:
    """Give room for what one PAGEMAP_SCAN answers: one for all page maps of a thread."""
    if not hasattr(_room, "regions"):
        _room.regions = np.empty(_REGIONS, _REGION)
    regions: NDArray[np.void] = _room.regions
    return regions


def _expand(regions: NDArray[np.void]) -> tuple[Pages, NDArray[np.uint64]]:
    """Turn regions into page numbers and the categories of each page."""
    counts = ((regions["end"] - regions["start"]) >> _SHIFT).astype(np.int64)
    return pages_in(regions["start"] >> _SHIFT, counts), np.repeat(regions["categories"], counts)


def pages_in(first: Pages, counts: NDArray[np.int64]) -> Pages:
    """Give all page numbers of ranges, by their first pages and their lengths."""
    before = np.cumsum(counts) - counts
    pages = np.arange(int(counts.sum()), dtype=np.uint64)
    pages += np.repeat(first - before.astype(np.uint64), counts)
    return pages


class PageMap(TaskFile):
    """The page map of *pid*; close it, or use it as a context manager.

    It is tied to the memory it was opened on, as :class:`ksmd.kernel.memory.Memory` is: after exit
    or execve TargetGoneError is raised.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(pid, "pagemap")

    # ------------------------------------------------------------ entries

    def entries(self, first_page: int, npages: int) -> Entries:
        """Read the raw entries of *npages* pages (uint64[npages]; 0 where nothing is mapped)."""
        result = np.zeros(npages, np.uint64)
        view, offset, done = result.data.cast("B"), first_page * 8, 0
        while done < len(view):
            try:
                got = os.preadv(self._fd, [view[done : done + _CHUNK_PAGES * 8]], offset + done)
            except OSError as error:
                raise procfs.translate(error, f"process {self.pid}") from error
            if got == 0:
                raise TargetGoneError(f"process {self.pid} has exited or called execve")
            done += got
        return result

    def exclusive_of(self, pages: Pages) -> Flags:
        """Tell for each page (ascending) whether it is anonymous, present, and nobody else's.

        One read for all pages that lie close together.
        """
        result = np.zeros(len(pages), np.bool_)
        if not len(pages):
            return result
        cuts = (np.flatnonzero(np.diff(pages) > _NEAR_PAGES) + 1).tolist()
        for low, high in zip([0, *cuts], [*cuts, len(pages)], strict=True):
            chunk = pages[low:high]
            start = int(chunk[0])
            entries = self.entries(start, int(chunk[-1]) - start + 1)
            entries = entries[(chunk - chunk[0]).astype(np.intp)]
            result[low:high] = exclusive(entries) & is_present(entries) & ~is_file(entries)
        return result

    # ------------------------------------------------------------ what is there

    def present(self, start: int, end: int, max_pages: int, *, files: bool = True) -> Present:
        """Give the anonymous pages in memory in [start, end), stopping after about *max_pages*.

        The zero page, pages of files and swapped pages are left out: there is nothing in them to
        merge, or reading them would change something. Where no page of a file can lie (*files*),
        none is looked for, which is the most of the work: the kernel has to look at each page.
        """
        if not has_scan():
            return self._present_by_entries(start, end, max_pages)
        others = PAGE_IS_PFNZERO | (PAGE_IS_FILE if files else 0)
        found, walk_end = self._scan(
            start,
            end,
            max_pages,
            mask=PAGE_IS_PRESENT | others,
            inverted=others,
            returned=PAGE_IS_HUGE,
        )
        pages, categories = _expand(found)
        return Present(pages, (categories & np.uint64(PAGE_IS_HUGE)) != 0, walk_end)

    def huge(self, start: int, end: int) -> list[int]:
        """Give the addresses of the anonymous huge pages in [start, end), ascending."""
        if not has_scan():
            found = self._present_by_entries(start, end, (end - start) >> PAGE_SHIFT)
            pages = found.pages[found.huge]
        else:
            others = PAGE_IS_FILE | PAGE_IS_PFNZERO
            mask = PAGE_IS_PRESENT | PAGE_IS_HUGE | others
            regions, _ = self._scan(start, end, 0, mask=mask, inverted=others, returned=0)
            pages, _ = _expand(regions)
        first: list[int] = pages[pages % HUGE_PAGE_PAGES == 0].tolist()
        return [page << PAGE_SHIFT for page in first]

    def still_shared(self, start: int, end: int) -> tuple[Pages, Pages]:
        """Give (shared, broken) page numbers of [start, end), which is one of our merged mappings.

        Shared: the store's page is mapped. Broken: a write has put a page of its own there. Pages
        that are absent, in swap, or the zero page are neither.
        """
        first, npages, shared = self.sharing(start, end)
        pages, shared = pages_in(first, npages), np.repeat(shared, npages)
        return pages[shared], pages[~shared]

    def sharing(self, start: int, end: int) -> tuple[Pages, NDArray[np.int64], Flags]:
        """Tell the same in ranges, ascending: first pages, lengths in pages, and which are shared.

        [start, end) may hold other mappings, too: the caller knows which are ours.
        """
        if not has_scan():
            return self._sharing_by_entries(start, end)
        found, _ = self._scan(
            start,
            end,
            0,
            mask=PAGE_IS_PRESENT | PAGE_IS_PFNZERO,
            inverted=PAGE_IS_PFNZERO,
            returned=PAGE_IS_FILE,
        )
        npages = ((found["end"] - found["start"]) >> _SHIFT).astype(np.int64)
        return found["start"] >> _SHIFT, npages, (found["categories"] & PAGE_IS_FILE) != 0

    # ------------------------------------------------------------ PAGEMAP_SCAN

    def _ioctl(self, argument: _PmScanArg) -> int:
        try:
            return int(fcntl.ioctl(self._fd, PAGEMAP_SCAN, argument))
        except OSError as error:
            raise procfs.translate(error, f"process {self.pid}") from error

    def _scan(
        self, start: int, end: int, max_pages: int, *, mask: int, inverted: int, returned: int
    ) -> tuple[NDArray[np.void], int]:
        """Scan until *end* or *max_pages* (0: no limit): regions, and where the walk stopped."""
        vector = _regions()
        parts: list[NDArray[np.void]] = []
        position, pages = start, 0
        while position < end and (not max_pages or pages < max_pages):
            limit = max_pages - pages if max_pages else 0
            argument = _PmScanArg(
                ctypes.sizeof(_PmScanArg),
                0,
                position,
                end,
                0,
                vector.ctypes.data,
                len(vector),
                limit,
                inverted,
                mask,
                0,
                returned,
            )
            count = self._ioctl(argument)
            if not count:
                position = end
                break
            found = vector[:count].copy()
            parts.append(found)
            pages += int((found["end"] - found["start"]).sum()) >> PAGE_SHIFT
            # Beyond 512 regions the kernel walks in rounds, and the last round may leave walk_end
            # where the one before had stopped (fs/proc/task_mmu.c): the regions know better.
            position = max(int(argument.walk_end), int(found["end"][-1]))
        if not parts:
            self.entries(start >> PAGE_SHIFT, 1)  # empty, or gone?
            return np.empty(0, _REGION), position
        return np.concatenate(parts), position

    # ------------------------------------------------------------ without PAGEMAP_SCAN

    def _present_by_entries(self, start: int, end: int, max_pages: int) -> Present:
        pages, backed = [np.empty(0, np.uint64)], [np.empty(0, np.bool_)]
        total, first, last = 0, start >> PAGE_SHIFT, end >> PAGE_SHIFT
        while first < last and total < max_pages:
            # whole huge pages, so that one is never judged by a part of it
            begin = first & ~(HUGE_PAGE_PAGES - 1)
            stop = min(begin + _CHUNK_PAGES, (last + HUGE_PAGE_PAGES - 1) & ~(HUGE_PAGE_PAGES - 1))
            entries = self.entries(begin, stop - begin)
            wanted = anonymous(entries)
            wanted[: first - begin] = False
            wanted[last - begin :] = False
            index = np.flatnonzero(wanted)[: max_pages - total]
            pages.append(index.astype(np.uint64) + np.uint64(begin))
            backed.append(huge(entries)[index])
            total += len(index)
            first = int(pages[-1][-1]) + 1 if total >= max_pages else min(stop, last)
        return Present(np.concatenate(pages), np.concatenate(backed), first << PAGE_SHIFT)

    def _sharing_by_entries(self, start: int, end: int) -> tuple[Pages, NDArray[np.int64], Flags]:
        first = start >> PAGE_SHIFT
        entries = self.entries(first, (end - start) >> PAGE_SHIFT)
        shared = is_present(entries) & is_file(entries)
        index = np.flatnonzero(shared | anonymous(entries))
        fresh = np.ones(len(index), np.bool_)
        fresh[1:] = (np.diff(index) != 1) | (shared[index[1:]] != shared[index[:-1]])
        starts = np.flatnonzero(fresh)
        npages = np.diff(np.append(starts, len(index))).astype(np.int64)
        return index[starts].astype(np.uint64) + np.uint64(first), npages, shared[index[starts]]
