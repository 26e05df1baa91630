"""What one entry of /proc/PID/pagemap says, eight bytes per page.

Functions take uint64 arrays of entries and give one answer per entry. Frame numbers are zero
without CAP_SYS_ADMIN; what leans on them then answers as carefully as it can.

Source: Documentation/admin-guide/mm/pagemap.rst.
"""

from __future__ import annotations

import functools
import mmap
import os

import numpy as np
from numpy.typing import NDArray

from ksmd.model.units import HUGE_PAGE_PAGES, PAGE_SHIFT, PAGE_SIZE

Entries = NDArray[np.uint64]
Flags = NDArray[np.bool_]

PRESENT = np.uint64(1 << 63)
SWAPPED = np.uint64(1 << 62)
FILE = np.uint64(1 << 61)
EXCLUSIVE = np.uint64(1 << 56)
PFN_MASK = np.uint64((1 << 55) - 1)

KPF_THP = np.uint64(1 << 22)


def is_present(entries: Entries) -> Flags:
    """Bit 63: the page is in memory."""
    bits: Flags = (entries & PRESENT) != 0
    return bits


def is_swapped(entries: Entries) -> Flags:
    """Bit 62: the page is in swap (or the entry is a marker)."""
    bits: Flags = (entries & SWAPPED) != 0
    return bits


def is_file(entries: Entries) -> Flags:
    """Bit 61: the page belongs to a file or to shared memory."""
    bits: Flags = (entries & FILE) != 0
    return bits


def exclusive(entries: Entries) -> Flags:
    """Bit 56: nobody else maps the page. Clear on absent pages and on the zero page."""
    bits: Flags = (entries & EXCLUSIVE) != 0
    return bits


def pfn(entries: Entries) -> NDArray[np.uint64]:
    """Give the frame number of each page, 0 for absent ones and without CAP_SYS_ADMIN."""
    return np.where(is_present(entries), entries & PFN_MASK, np.uint64(0))


@functools.cache
def zero_pfn() -> int:
    """Give the frame of the kernel's zero page, 0 when frames are hidden from us."""
    with mmap.mmap(-1, PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        array = np.frombuffer(memory, np.uint8)
        frame = own_pfn(array.ctypes.data) if not array[0] else 0  # the read maps it
        del array
    return frame


def own_pfn(address: int) -> int:
    """Give the frame behind *address* of our own memory, 0 when absent or hidden."""
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        entry = np.frombuffer(os.pread(fd, 8, (address >> PAGE_SHIFT) * 8), np.uint64)
    finally:
        os.close(fd)
    return int(pfn(entry)[0])


def anonymous(entries: Entries) -> Flags:
    """Present, of no file, and not the zero page (as far as frames are visible)."""
    wanted = is_present(entries) & ~is_file(entries)
    zero = zero_pfn()
    return wanted & (pfn(entries) != zero) if zero else wanted


def huge(entries: Entries) -> Flags:
    """Tell for whole 2 MiB blocks of entries which pages a huge page backs.

    Page map entries do not say it: a block counts when its frames are those of one aligned block
    and the kernel calls it a huge page. A huge page that is mapped by 4 KiB entries counts as well.
    """
    blocks = pfn(entries).reshape(-1, HUGE_PAGE_PAGES)
    first = blocks[:, 0]
    steps = np.arange(HUGE_PAGE_PAGES, dtype=np.uint64)
    whole = (first != 0) & (first % np.uint64(HUGE_PAGE_PAGES) == 0)
    whole &= (blocks == first[:, None] + steps).all(axis=1)
    for block in np.flatnonzero(whole):
        whole[block] = _is_thp(int(first[block]))
    return np.repeat(whole, HUGE_PAGE_PAGES)


def _is_thp(frame: int) -> bool:
    try:
        fd = os.open("/proc/kpageflags", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return True  # 512 aligned neighbours are hardly anything else
    try:
        flags = np.frombuffer(os.pread(fd, 8, frame * 8), np.uint64)
    finally:
        os.close(fd)
    return bool(len(flags) and flags[0] & KPF_THP)
