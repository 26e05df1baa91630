"""The tables against a dict of pages: every answer, counter and member, after any history."""

from __future__ import annotations

from collections import Counter
from unittest.mock import patch

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ksmd.core import pagehash, rmap, tables
from ksmd.core.checksum import UNKNOWN_CHECKSUM
from ksmd.core.tables import PageTables
from ksmd.model.tables import Seen

# Around the borders of blocks, and far up in the address space.
PAGES = [*range(56, 74), *range(126, 132), *range((1 << 35) - 3, (1 << 35) + 3)]
SLOTS = st.sampled_from([0, 1, 5])
SUMS = st.integers(0, 5)
RMAP_SIZE, HASH_SIZE = 40, 14


class TablesAgainstDict(RuleBasedStateMachine):
    """``model`` maps (slot, page) to [checksum, stable, scan of the last observation]."""

    small_pieces = False

    def __init__(self) -> None:
        super().__init__()
        self.patches = []
        if self.small_pieces:
            self.patches = [
                patch.object(pagehash, "_CHUNK", 4),
                patch.object(pagehash, "_BUFFER_FLOOR", 2),
                patch.object(rmap, "CHUNK_BLOCKS", 2),
                patch.object(tables, "CHUNK_BLOCKS", 2),
                patch.object(rmap, "_GROWTH_FLOOR", 1),
                patch.object(tables, "_LEAST_REST", 1),
            ]
        for piece in self.patches:
            piece.start()
        self.tables = PageTables(RMAP_SIZE, HASH_SIZE)
        self.model: dict[tuple[int, int], list[int]] = {}
        self.seqnr: Counter[int] = Counter()
        self.skipped = 0
        self.now = 0
        #: Blocks in which the last look found nothing changed, by (slot, page >> 6): when it did so
        #: first, and last.
        self.calm: dict[tuple[int, int], tuple[int, int]] = {}

    def teardown(self) -> None:
        for piece in self.patches:
            piece.stop()

    def stable(self) -> int:
        return sum(stable for _, stable, _ in self.model.values())

    def drop(self, keys: list[tuple[int, int]]) -> None:
        for slot, page in keys:
            del self.model[slot, page]
            self.calm.pop((slot, page >> 6), None)

    def expect(self, slot: int, page: int, checksum: int, eager: bool) -> Seen:
        checksum = max(checksum, 1)
        seqnr = self.seqnr[slot]
        row = self.model.get((slot, page))
        if row is None:
            if len(self.model) >= RMAP_SIZE:
                return Seen.TABLE_FULL
            self.model[slot, page] = [checksum, eager and self.stable() < HASH_SIZE, seqnr]
            return Seen.NEW
        if row[0] == UNKNOWN_CHECKSUM:
            row[:] = [checksum, eager and self.stable() < HASH_SIZE, seqnr]
            return Seen.NEW
        if row[0] != checksum:
            row[:] = [checksum, 0, seqnr]
            return Seen.VOLATILE
        row[2] = seqnr
        if not row[1] and self.stable() >= HASH_SIZE:
            return Seen.TABLE_FULL
        row[1] = 1
        return Seen.STABLE

    @rule(
        slot=SLOTS,
        span=st.lists(st.sampled_from(PAGES), min_size=2, max_size=2, unique=True).map(sorted),
        eager=st.booleans(),
        data=st.data(),
    )
    def observe(self, slot: int, span: list[int], eager: bool, data: st.DataObject) -> None:
        first, end = span
        inside = [page for page in PAGES if first <= page < end]
        read = data.draw(st.dictionaries(st.sampled_from(inside), SUMS))
        pages = sorted(read)
        same = {p: (row := self.model.get((slot, p))) and row[0] == max(read[p], 1) for p in pages}
        answer = self.tables.observe(
            slot,
            first,
            end,
            np.array(pages, np.uint64),
            np.array([read[page] for page in pages], np.uint32),
            self.seqnr[slot],
            eager=eager,
            now=self.now,
        )
        self.drop([k for k in self.model if k[0] == slot and k[1] in inside and k[1] not in read])
        # All pages that changed leave the page hash before any joins it.
        for page in pages:
            row = self.model.get((slot, page))
            if row is not None and row[0] != max(read[page], 1):
                row[1] = 0
        expected = [self.expect(slot, page, read[page], eager) for page in pages]
        self.skipped += expected.count(Seen.TABLE_FULL)
        assert answer.tolist() == expected
        for block in {page >> 6 for page in pages}:
            if all(same[page] for page in pages if page >> 6 == block):
                since, _ = self.calm.get((slot, block), (self.now, 0))
                self.calm[slot, block] = since, self.now
            else:
                self.calm.pop((slot, block), None)

    @rule(slot=SLOTS, pages=st.lists(st.sampled_from(PAGES)))
    def doubt(self, slot: int, pages: list[int]) -> None:
        self.tables.doubt(slot, np.array(pages, np.uint64))
        for page in pages:
            if row := self.model.get((slot, page)):
                row[:2] = UNKNOWN_CHECKSUM, 0
            if (slot, page) in self.model:
                self.calm.pop((slot, page >> 6), None)

    @rule(slot=SLOTS)
    def remembered(self, slot: int) -> None:
        found = self.tables.remembered(slot, np.array(PAGES, np.uint64)).tolist()
        rows = [self.model.get((slot, page)) for page in PAGES]
        assert found == [row[0] if row else 0 for row in rows]

    @rule(seconds=st.integers(0, 600))
    def time_goes_by(self, seconds: int) -> None:
        self.now += seconds

    @rule(
        slot=SLOTS,
        span=st.lists(st.integers(50, 140), min_size=2, max_size=2, unique=True),
        still_for=st.none() | st.integers(-1, 3000),
    )
    def only_whole_calm_blocks_rest_and_none_is_forgotten(
        self, slot: int, span: list[int], still_for: int | None
    ) -> None:
        first, end = sorted(span)
        still = None if still_for is None else self.now - still_for
        ranges, spared = self.tables.awake(slot, first, end, self.seqnr[slot], self.now, still)
        awake = [page for low, high in ranges for page in range(low, high)]
        assert awake == sorted(set(awake))
        resting = set(range(first, end)) - set(awake)
        assert set(awake) <= set(range(first, end))
        for block in {page >> 6 for page in resting}:
            assert resting >= set(range(block << 6, (block + 1) << 6))
            since, looked = self.calm[slot, block]
            if self.now >= looked + 2 + 1.4 * (looked - since):
                assert still is not None, "it rests for longer than it was calm"
                assert looked >= still
                self.calm[slot, block] = since, self.now  # it has not run: as good as a look
        kept = [k for k in self.model if k[0] == slot and k[1] in resting]
        assert spared == sum(self.model[key][1] for key in kept)
        for key in kept:
            self.model[key][2] = self.seqnr[slot]

    @rule(slot=SLOTS, pages=st.lists(st.sampled_from(PAGES)))
    def wake(self, slot: int, pages: list[int]) -> None:
        self.tables.wake(slot, np.array(pages, np.uint64))
        for page in pages:
            self.calm.pop((slot, page >> 6), None)

    @rule(slot=SLOTS)
    def finish_and_start_the_next_scan(self, slot: int) -> None:
        seqnr = self.seqnr[slot]
        gone = [k for k, row in self.model.items() if k[0] == slot and row[2] != seqnr]
        assert self.tables.finish(slot, seqnr) == len(gone)
        self.drop(gone)
        self.seqnr[slot] += 1

    @rule(slot=SLOTS)
    def give_up_a_scan(self, slot: int) -> None:
        self.seqnr[slot] += 1

    @rule(slot=SLOTS)
    def forget(self, slot: int) -> None:
        gone = [k for k in self.model if k[0] == slot]
        assert self.tables.forget(slot) == len(gone)
        self.drop(gone)

    @rule(slot=SLOTS, pages=st.lists(st.sampled_from(PAGES)))
    def forget_pages(self, slot: int, pages: list[int]) -> None:
        gone = [k for k in self.model if k[0] == slot and k[1] in pages]
        assert self.tables.forget_pages(slot, np.array(pages, np.uint64)) == len(gone)
        self.drop(gone)

    @rule(store=st.lists(SUMS), zero=st.none() | SUMS)
    def members_are_the_same(self, store: list[int], zero: int | None) -> None:
        found = self.tables.duplicates(np.array(sorted(store), np.uint32), zero)
        times = Counter(row[0] for row in self.model.values() if row[1])
        wanted = {*store, zero}
        expected = [
            (slot, page, row[0])
            for (slot, page), row in sorted(self.model.items())
            if row[1] and (times[row[0]] > 1 or row[0] in wanted)
        ]
        columns = (found.slots.tolist(), found.pages.tolist(), found.checksums.tolist())
        assert list(zip(*columns, strict=True)) == expected

    @invariant()
    def counters_are_exact_and_within_the_sizes(self) -> None:
        assert self.tables.rows == len(self.model) <= RMAP_SIZE
        assert self.tables.stable == self.stable() <= HASH_SIZE
        assert self.tables.skipped == self.skipped


class TablesInSmallPieces(TablesAgainstDict):
    """The same with pieces of few pages, so that every loop over pieces goes round."""

    small_pieces = True


TablesAgainstDict.TestCase.settings = settings(stateful_step_count=40)
TablesInSmallPieces.TestCase.settings = settings(stateful_step_count=40)
TestTablesAgainstDict = TablesAgainstDict.TestCase
TestTablesInSmallPieces = TablesInSmallPieces.TestCase
