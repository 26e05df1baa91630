"""Where things lie: pages that follow each other, extents, and places in the store.

Everything here works on columns and without a loop over pages. Pages of all targets are compared
by one key, slot << 44 | page number: 2^44 pages are the whole user half of a 57-bit address space.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ksmd.model.plan import ExtentPlan
from ksmd.model.tables import RUN, SPAN

U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]
Bools = NDArray[np.bool_]
Index = NDArray[np.intp]

#: Kernel memory for one more VMA of a target. Measured on Linux 6.18: a merged page by itself
#: splits its VMA in three and costs 540 to 735 bytes of slab (two vm_area_struct of 192 bytes, and
#: for each maple tree nodes and an anon_vma_chain).
VMA_BYTES = 300

_PAGE_BITS = 44
_SLOTS = 1 << (64 - _PAGE_BITS)


@dataclass(frozen=True, slots=True)
class PlanLimits:
    """What bounds a plan: ``extent_pages`` of one extent, and what one more VMA costs.

    ``scattered_pages``: of one extent where runs are short; 0: no more than elsewhere. Windows go
    through an extent in the order of a target's addresses, and tear its mappings there into pieces,
    each of which those of the next extent have to deal with. Nor is a large extent the longer in
    use where its pages are scattered: a small one is given back no sooner.
    """

    extent_pages: int = 8192
    scattered_pages: int = 0
    vma_bytes: int = VMA_BYTES

    def __post_init__(self) -> None:
        if self.extent_pages <= 0:
            raise ValueError("a plan needs extents of at least one page")


@dataclass(frozen=True, slots=True)
class Layout:
    """New store pages in the order in which they are laid out.

    ``extent`` and ``index`` (uint64) say where each goes.
    """

    slots: U32
    pages: U64
    extent: U64
    index: U64

    @property
    def places(self) -> U64:
        """Store pages, extent << 32 | index."""
        return (self.extent << np.uint64(32)) | self.index


def page_keys(slots: U32, pages: U64) -> U64:
    """Return keys that order pages by (slot, page); ValueError for numbers that do not fit."""
    if slots.size and (int(slots.max()) >= _SLOTS or int(pages.max()) >> _PAGE_BITS):
        raise ValueError("a slot or a page number is too large to be one")
    return (slots.astype(np.uint64) << np.uint64(_PAGE_BITS)) | pages


def starts_where(*steady: Bools) -> Index:
    """Return where sequences start, given for each step from one entry to the next what must hold.

    Every array has one entry less than the sequence; an entry that is False starts a new one.
    """
    if not steady:
        raise ValueError("nothing to cut by")
    new = np.ones(steady[0].size + 1, np.bool_)
    np.logical_not(np.logical_and.reduce(steady), out=new[1:])
    return np.flatnonzero(new)


def advances(column: NDArray[np.uint64]) -> Bools:
    """Return for each step whether the column goes up by exactly one."""
    up: Bools = column[1:] - column[:-1] == 1
    return up


def spans_of(slots: U32, pages: U64) -> NDArray[np.void]:
    """Return pages in the order given as SPANs of neighbours."""
    if not pages.size:
        return np.empty(0, SPAN)
    starts = starts_where(slots[1:] == slots[:-1], advances(pages))
    spans = np.empty(starts.size, SPAN)
    spans["target"] = slots[starts]
    spans["npages"] = np.diff(starts, append=pages.size)
    spans["page"] = pages[starts]
    return spans


def runs_of(slots: U32, pages: U64, places: U64) -> tuple[NDArray[np.void], Index]:
    """Return maximal RUNs of pages sorted by (slot, page), and where each starts."""
    if not pages.size:
        return np.empty(0, RUN), np.empty(0, np.intp)
    starts = starts_where(slots[1:] == slots[:-1], advances(pages), advances(places))
    runs = np.empty(starts.size, RUN)
    runs["target"] = slots[starts]
    runs["npages"] = np.diff(starts, append=pages.size)
    runs["page"] = pages[starts]
    runs["extent"] = places[starts] >> np.uint64(32)
    runs["index"] = places[starts] & np.uint64(0xFFFF_FFFF)
    return runs, starts


def lay_out(slots: U32, pages: U64, next_extent: int, extent_pages: int) -> Layout:
    """Give each page (sorted by (slot, page)) a place in a new extent, neighbours side by side."""
    order = np.arange(pages.size, dtype=np.uint64)
    size = np.uint64(extent_pages)
    extent = order // size + np.uint64(next_extent)
    if extent.size and int(extent[-1]) >> 32:
        raise ValueError("extent ids have run out")
    return Layout(slots, pages, extent, order % size)


def extents_of(layout: Layout, checksums: U32) -> tuple[ExtentPlan, ...]:
    """Return the extents of a layout; ``checksums`` has one entry per page of it."""
    if not layout.pages.size:
        return ()
    starts = starts_where(layout.extent[1:] == layout.extent[:-1])
    ends = np.append(starts[1:], layout.extent.size)
    plans = []
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        sources = spans_of(layout.slots[start:end], layout.pages[start:end])
        number = int(layout.extent[start])
        plans.append(ExtentPlan(number, end - start, sources, checksums[start:end]))
    return tuple(plans)
