"""A run is cut where VMAs end, and what lies in none of them never reaches a stop window."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ksmd.core.price import WindowPrice
from ksmd.core.spans import Spans
from ksmd.core.windows import (
    Ground,
    merge_records,
    pages_of,
    spans,
    unmerge_records,
    windows_of,
    zero_records,
)
from ksmd.model.tables import RUN, SPAN
from ksmd.model.vma import Area, Vma
from ksmd.model.vmas import Areas, Vmas
from ksmd.model.window import Advice, Op

PAGE = 4096
STEPS = st.lists(st.tuples(st.integers(0, 6), st.integers(1, 9)), max_size=12)


def area(first: int, end: int, *flags: str) -> Area:
    vma = Vma(first * PAGE, end * PAGE, "rw-p", 0, (0, 0), 0, "", frozenset(flags))
    return Area(first * PAGE, end * PAGE, vma)


def ranges(steps: list[tuple[int, int]]) -> list[tuple[int, int]]:
    found, at = [], 1
    for gap, length in steps:
        found.append((at + gap, at + gap + length))
        at += gap + length
    return found


@given(areas=STEPS, runs=STEPS, grain=st.sampled_from([0, 1, 2, 4]), stop_ms=st.floats(0, 5))
def test_every_page_of_a_run_that_lies_in_an_area_comes_once_at_its_place_and_no_other(
    areas: list[tuple[int, int]], runs: list[tuple[int, int]], grain: int, stop_ms: float
) -> None:
    where = [area(*pair) for pair in ranges(areas)]
    table = np.zeros(len(runs), RUN)
    for row, (first, end) in zip(table, ranges(runs), strict=True):
        row["page"], row["npages"], row["extent"], row["index"] = (
            first,
            end - first,
            7,
            1000 + first,
        )
    records = merge_records(table, Ground.of(Areas.of(where)), 8)
    places: dict[int, int] = {}
    for batch in windows_of(records, 4, 8, WindowPrice(Op.MERGE), stop_ms, grain):
        assert 0 < len(batch) <= 4
        assert batch["length"].all()
        assert batch["length"].sum() <= 8 * PAGE
        for op, start, length, offset, advice in batch.tolist():
            assert (op, advice) == (Op.MERGE, 0)
            assert any(a.start <= start < start + length <= a.end for a in where)
            for at in range(0, length, PAGE):
                page = (start + at) // PAGE
                assert page not in places
                places[page] = (offset + at) // PAGE
        covered = {p * PAGE for low, high in spans(batch) for p in range(low // PAGE, high // PAGE)}
        assert covered == {p * PAGE for p in pages_of(batch).tolist()}
        assert len(pages_of(batch)) == batch["length"].sum() // PAGE
    wanted = {p for first, end in ranges(runs) for p in range(first, end)}
    allowed = {p for a in where for p in range(a.start // PAGE, a.end // PAGE)}
    assert places == {page: 1000 + page for page in wanted & allowed}


@given(areas=STEPS, zeros=STEPS)
def test_zero_runs_are_cut_at_the_same_borders_and_need_no_extent(
    areas: list[tuple[int, int]], zeros: list[tuple[int, int]]
) -> None:
    table = np.zeros(len(zeros), SPAN)
    for row, (first, end) in zip(table, ranges(zeros), strict=True):
        row["page"], row["npages"] = first, end - first
    where = [area(*pair) for pair in ranges(areas)]
    found: list[int] = []
    records = zero_records(table, Ground.of(Areas.of(where)), 4096)
    for batch in windows_of(records, 400, 4096, WindowPrice(Op.ZERO), 1000):
        for op, start, length, offset, _ in batch.tolist():
            assert (op, offset) == (Op.ZERO, 0)
            found += range(start // PAGE, (start + length) // PAGE)
    wanted = {p for first, end in ranges(zeros) for p in range(first, end)}
    allowed = {p for a in where for p in range(a.start // PAGE, a.end // PAGE)}
    assert sorted(found) == sorted(wanted & allowed)


def test_long_runs_are_cut_where_huge_pages_begin() -> None:
    table = np.zeros(1, RUN)
    table["page"], table["npages"], table["index"] = 1000, 1500, 7
    records = merge_records(table, Ground.of(Areas.of([area(0, 5000)])), 2048)
    found = np.stack([records[name] // PAGE for name in ("start", "length", "offset")], axis=1)
    assert found.tolist() == [[1000, 24, 7], [1024, 512, 31], [1536, 512, 543], [2048, 452, 1055]]


def test_a_window_is_filled_up_by_a_part_of_the_run_that_does_not_fit() -> None:
    table = np.zeros(1, RUN)
    table["page"], table["npages"], table["index"] = 1024, 1024, 7
    records = merge_records(table, Ground.of(Areas.of([area(0, 5000)])), 2048)
    price = WindowPrice(Op.MERGE)
    limit = 700 * price.of(records)[0] / 512  # microseconds: enough for 700 pages
    price.room = lambda _: limit  # type: ignore[method-assign]

    def shape(grain: int) -> list[list[tuple[int, int, int]]]:
        batches = windows_of(records, 400, 2048, price, 5, grain)
        return [
            [
                (start // PAGE, length // PAGE, offset // PAGE)
                for _, start, length, offset, _ in batch.tolist()
            ]
            for batch in batches
        ]

    assert shape(0) == [[(1024, 512, 7)], [(1536, 512, 519)]]
    assert shape(16) == [[(1024, 512, 7), (1536, 176, 519)], [(1712, 336, 695)]]
    assert len(records) == 2, "cut in a copy"


def test_what_is_merged_takes_along_what_was_said_of_huge_pages_and_dropped_zeros_do_not() -> None:
    where = [area(0, 10, "rd", "wr", "hg"), area(10, 20, "rd", "wr", "nh"), area(20, 30, "rd")]
    runs, zeros = np.zeros(1, RUN), np.zeros(1, SPAN)
    runs["page"], runs["npages"] = 5, 20
    zeros["page"], zeros["npages"] = 5, 20
    records = merge_records(runs, Ground.of(Areas.of(where)), 4096)
    assert records["start"].tolist() == [5 * PAGE, 10 * PAGE, 20 * PAGE]
    assert records["advice"].tolist() == [Advice.HUGEPAGE, Advice.NOHUGEPAGE, Advice.NONE]
    assert not zero_records(zeros, Ground.of(Areas.of(where)), 4096)["advice"].any()


def test_what_is_given_back_is_cut_and_keeps_its_offsets_and_what_was_said_of_it() -> None:
    """The second mapping is longer than a huge page, and begins in the middle of one."""
    mappings = Vmas.of(
        [
            Vma(2 * PAGE, 4 * PAGE, "rw-p", 7 * PAGE, (0, 1), 9, "/memfd:ksmd-x"),
            Vma(500 * PAGE, 1500 * PAGE, "rw-p", 0, (0, 1), 9, "/memfd:ksmd-x", frozenset({"nh"})),
        ]
    )

    def shape(spans: Spans | None) -> list[tuple[int, int, int, int]]:
        records = unmerge_records(mappings, spans, 4096)
        assert (records["op"] == Op.UNMERGE).all()
        columns = (records[name] // PAGE for name in ("start", "length", "offset"))
        return list(zip(*(c.tolist() for c in columns), records["advice"].tolist(), strict=True))

    kept = int(Advice.NOHUGEPAGE)
    assert shape(None) == [
        (2, 2, 7, 0),
        (500, 12, 0, kept),
        (512, 512, 12, kept),
        (1024, 476, 524, kept),
    ]
    assert shape(Spans([(0, 3), (510, 514), (1600, 1700)])) == [
        (2, 1, 7, 0),
        (510, 2, 10, kept),
        (512, 2, 12, kept),
    ]
    assert shape(Spans([])) == []
