"""From runs to stop windows: batches of records of one target and one extent, none too long.

Records are columns (dtype RECORD), since a pass may have a hundred thousand of them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from operator import or_
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ksmd.core.price import WindowPrice
from ksmd.core.sets import distinct
from ksmd.core.spans import Spans
from ksmd.model.tables import RECORD
from ksmd.model.units import HUGE_PAGE_SIZE, PAGE_SHIFT
from ksmd.model.vmas import Areas, Vmas
from ksmd.model.window import Advice, Op, Record

Records = NDArray[np.void]

#: Bytes of one record: where one page has changed meanwhile, its whole record is left as it was.
_LONGEST = HUGE_PAGE_SIZE
_SHIFT = np.uint64(PAGE_SHIFT)
_SAID = {
    "dc": Advice.DONTFORK,
    "dd": Advice.DONTDUMP,
    "wf": Advice.WIPEONFORK,
    "hg": Advice.HUGEPAGE,
    "nh": Advice.NOHUGEPAGE,
}


class Ground(NamedTuple):
    """The areas of a target as columns: their pages, and what was said of each (Advice, uint32)."""

    spans: Spans
    advice: NDArray[np.uint32]

    @classmethod
    def of(cls, areas: Areas) -> Ground:
        """Take what may be scanned."""
        said = np.array([advice_of(kind.flags) for kind in areas.vmas.kinds], np.uint32)
        return cls(Spans.of(areas.starts >> _SHIFT, areas.ends >> _SHIFT), said[areas.kind])


@functools.lru_cache(maxsize=256)  # a program has few kinds of mappings
def advice_of(flags: frozenset[str]) -> Advice:
    """Return what VmFlags say that a program has said by madvise."""
    return functools.reduce(or_, (_SAID[flag] for flag in flags & _SAID.keys()), Advice.NONE)


def columns(records: Sequence[Record]) -> Records:
    """Return single records as one column."""
    rows = [(r.op, r.start, r.length, r.offset, r.advice) for r in records]
    return np.array(rows, RECORD)


def merge_records(runs: NDArray[np.void], ground: Ground, max_pages: int) -> Records:
    """Return what maps *runs* (dtype RUN, of one target and one extent) to the store.

    By address, cut where VMAs end; what lies beyond *ground* is left out. In that order each
    window finds its records in the mapping that those before have not cut up yet.
    """
    runs = runs[np.argsort(runs["page"])]
    records = _whole(Op.MERGE, runs)
    records["offset"] = runs["index"].astype(np.uint64) << _SHIFT
    return _short(inside(records, ground), max_pages)


def zero_records(zeros: NDArray[np.void], ground: Ground, max_pages: int) -> Records:
    """Return what drops *zeros* (dtype SPAN, of one target), cut likewise."""
    return _short(inside(_whole(Op.ZERO, zeros), ground), max_pages)


def unmerge_records(merged: Vmas, spans: Spans | None, max_pages: int) -> Records:
    """Return what gives *merged* back, mappings of one extent; where *spans*, only what they cover.

    Cut as the others: a long range, given back as one, takes some 2 ms.
    """
    said = np.array([advice_of(kind.flags) for kind in merged.kinds], np.uint32)
    records = np.zeros(len(merged), RECORD)
    records["op"] = Op.UNMERGE
    records["start"], records["length"] = merged.starts, merged.ends - merged.starts
    records["offset"], records["advice"] = merged.offsets, said[merged.kind]
    return _short(records if spans is None else _cut(records, spans)[0], max_pages)


def inside(records: Records, ground: Ground) -> Records:
    """Return records cut at the borders of *ground*; what lies beyond goes."""
    cut, area = _cut(records, ground.spans)
    cut["advice"] = np.where(cut["op"] == Op.MERGE, ground.advice[area], cut["advice"])
    return cut


def _cut(records: Records, spans: Spans) -> tuple[Records, NDArray[np.intp]]:
    """Return what of *records* lies in *spans*, and in which each piece does."""
    low, high = records["start"], records["start"] + records["length"]
    which, span, first, end = spans.cut(low >> _SHIFT, high >> _SHIFT)
    cut = records[which]
    cut["start"], cut["length"] = first << _SHIFT, (end - first) << _SHIFT
    _move_offsets(cut, cut["start"] - low[which])
    return cut, span


def windows_of(
    records: Records,
    max_runs: int,
    max_pages: int,
    price: WindowPrice,
    stop_ms: float,
    grain: int = 0,
) -> Iterator[Records]:
    """Cut records, none longer than *max_pages*, into windows; the order stays.

    None is to take longer than *stop_ms*. The price may change from one window to the next. With a
    *grain*, in pages, a window is filled up by a part of the record that does not fit as a whole,
    which ends at a multiple of it.
    """
    left = records.copy() if grain else records
    while len(left):
        near = left[:max_runs]
        ends = np.cumsum(near["length"] >> _SHIFT, dtype=np.int64)
        costs = np.cumsum(price.of(near))
        room = price.room(stop_ms)
        whole = min(int(np.searchsorted(ends, max_pages, side="right")),
                    int(np.searchsorted(costs, room, side="right")))  # fmt: skip
        window, left = near[:whole], left[whole:]
        if grain and whole < len(near):
            npages, spent = (int(ends[whole - 1]), float(costs[whole - 1])) if whole else (0, 0.0)
            fits = min(max_pages - npages, price.pages(room - spent))
            window = np.append(window, _cut_off(left, fits, grain))
        if not len(window):
            window, left = left[:1], left[1:]
        yield window


def _cut_off(records: Records, npages: int, grain: int) -> Records:
    """Take *npages* of the first record off, never all; fewer, so as to end at the grain."""
    first = int(records["start"][0]) >> PAGE_SHIFT
    npages = min(npages, (int(records["length"][0]) >> PAGE_SHIFT) - 1)
    npages = (first + npages) // grain * grain - first
    part = records[: npages > 0].copy()
    if len(part):
        length = np.uint64(npages << PAGE_SHIFT)
        part["length"] = length
        records["start"][0] += length
        records["length"][0] -= length
        _move_offsets(records[:1], length)
    return part


def spans(records: Records) -> list[tuple[int, int]]:
    """Return the ranges [start, end) that *records* cover, ascending, neighbours as one."""
    if not len(records):
        return []
    if np.any(records["start"][1:] < records["start"][:-1]):
        records = records[np.argsort(records["start"])]
    starts = records["start"]
    ends = starts + records["length"]
    cuts = np.flatnonzero(starts[1:] != ends[:-1])
    first = starts[np.append(0, cuts + 1)].tolist()
    return list(zip(first, ends[np.append(cuts, len(ends) - 1)].tolist(), strict=True))


def pages_of(records: Records) -> NDArray[np.uint64]:
    """Return the page numbers that *records* cover, in their order."""
    counts = (records["length"] >> _SHIFT).astype(np.int64)
    before = np.cumsum(counts) - counts
    pages = np.arange(int(counts.sum()), dtype=np.uint64)
    pages += np.repeat((records["start"] >> _SHIFT) - before.astype(np.uint64), counts)
    return pages


def cut_huge_blocks(records: Records) -> list[int]:
    """Addresses of the 2 MiB blocks that *records* cover in part only, ascending.

    Where such a block is one huge page, moving a part of it away would have to split it, and a
    split takes longer than anything else a stop window does.
    """
    ranges = np.array(spans(records), np.uint64).reshape(-1)
    edges = ranges[ranges % np.uint64(HUGE_PAGE_SIZE) != 0]
    blocks: list[int] = distinct(edges & ~np.uint64(HUGE_PAGE_SIZE - 1)).tolist()
    return blocks


def _whole(op: Op, runs: NDArray[np.void]) -> Records:
    records = np.zeros(len(runs), RECORD)
    records["op"] = op
    records["start"] = runs["page"] << _SHIFT
    records["length"] = runs["npages"].astype(np.uint64) << _SHIFT
    return records


def _short(records: Records, max_pages: int) -> Records:
    """Cut records into such that none is too long for a window, or to be lost as a whole.

    At multiples of that length, so that huge pages of the target are moved as a whole.
    """
    longest = np.uint64(min(_LONGEST, max_pages << PAGE_SHIFT))
    before = records["start"] % longest
    count = -(-(before + records["length"]).astype(np.int64) // int(longest))
    if not len(records) or count.max() == 1:
        return records
    cut, first = np.repeat(records, count), np.repeat(before, count)
    number = np.arange(len(cut)) - np.repeat(np.cumsum(count) - count, count)
    edge = number.astype(np.uint64) * longest  # from the multiple below the record
    low, high = np.maximum(edge, first), np.minimum(edge + longest, first + cut["length"])
    cut["start"] += low - first
    cut["length"] = high - low
    _move_offsets(cut, low - first)
    return cut


def _move_offsets(records: Records, ahead: NDArray[np.uint64] | np.uint64) -> None:
    records["offset"] += np.where(records["op"] == Op.ZERO, np.uint64(0), ahead)
