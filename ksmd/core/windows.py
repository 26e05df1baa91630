"""From runs to stop windows: batches of records of one target and one extent, none too long."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from ksmd.model.units import HUGE_PAGE_SIZE, PAGE_SHIFT
from ksmd.model.vma import Area
from ksmd.model.window import Op, Record


def cut_into_windows(
    runs: NDArray[np.void],
    zeros: NDArray[np.void],
    areas: Sequence[Area],
    phases: dict[int, int],
    max_runs: int,
    max_pages: int,
) -> Iterator[tuple[int, list[Record]]]:
    """Give (extent number, records) for each window; extent 0 for windows of zero runs only.

    *runs* (dtype RUN) and *zeros* (SPAN) belong to one target; *phases* gives the unused pages at
    the start of each extent. Runs keep their order, most profitable first, within their extent, and
    are cut where VMAs end and where a window would exceed *max_pages*.
    """
    areas = sorted(areas, key=lambda area: area.start)
    ends = [area.end for area in areas]
    extents: dict[int, None] = dict.fromkeys(int(number) for number in runs["extent"])
    for extent in extents:
        records = (
            record
            for run in runs[runs["extent"] == extent]
            for record in _pieces(
                Op.MERGE,
                int(run["page"]),
                int(run["npages"]),
                int(run["index"]) + phases.get(extent, 0),
                areas,
                ends,
            )
        )
        for batch in _batches(records, max_runs, max_pages):
            yield extent, batch
    empty = (
        record
        for span in zeros
        for record in _pieces(Op.ZERO, int(span["page"]), int(span["npages"]), 0, areas, ends)
    )
    for batch in _batches(empty, max_runs, max_pages):
        yield 0, batch


def cut_huge_blocks(records: Sequence[Record]) -> list[int]:
    """Addresses of the 2 MiB blocks that *records* cover in part only, ascending.

    Where such a block is one huge page, moving a part of it away would have to split it, and a
    split takes longer than anything else a stop window does.
    """
    blocks: set[int] = set()
    for record in records:
        end = record.start + record.length
        blocks.update(
            edge & -HUGE_PAGE_SIZE for edge in (record.start, end) if edge % HUGE_PAGE_SIZE
        )
    return sorted(blocks)


def _pieces(
    op: Op, page: int, npages: int, file_page: int, areas: Sequence[Area], ends: Sequence[int]
) -> Iterator[Record]:
    """Cut a run at the borders of VMAs; what lies in none of them is left out.

    Areas in order and disjoint; *ends* are theirs, for there may be as many as runs.
    """
    start, end = page << PAGE_SHIFT, (page + npages) << PAGE_SHIFT
    for at in range(bisect_right(ends, start), len(areas)):
        area = areas[at]
        if area.start >= end:
            break
        low, high = max(start, area.start), min(end, area.end)
        if low < high:
            offset = (file_page << PAGE_SHIFT) + low - start if op is Op.MERGE else 0
            yield Record(op, low, high - low, offset)


def _batches(records: Iterator[Record], max_runs: int, max_pages: int) -> Iterator[list[Record]]:
    batch: list[Record] = []
    room = limit = max_pages << PAGE_SHIFT
    for record in records:
        start, offset, left = record.start, record.offset, record.length
        while left:
            length = min(left, room)
            batch.append(Record(record.op, start, length, offset))
            start, left, room = start + length, left - length, room - length
            offset += length if record.op is Op.MERGE else 0
            if not room or len(batch) == max_runs:
                yield batch
                batch, room = [], limit
    if batch:
        yield batch
