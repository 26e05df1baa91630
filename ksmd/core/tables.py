"""The rmap and page hash tables of one trust domain: what each page was, and which may be equal.

Promises. Memory is numpy columns only, never an object per page: 8.6 bytes per scanned page of
dense memory (4 for the checksum, 4 in the page hash table, the rest for what is kept of a block),
and one more at most while changes wait to be merged, against 64 in the kernel. Neither table grows
past the size it was given: what
does not fit is skipped and counted. Every operation is a fixed number of passes over what it was
given, with no Python loop over pages.

As in the 2008 patch, the rmap table keeps the last checksum of a page and a page that changed since
its last visit is volatile: it is placed anew and is a candidate only when it is found unchanged
once. Unlike there, the page hash holds only such stable pages.

One thread at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ksmd.core.checksum import UNKNOWN_CHECKSUM, real
from ksmd.core.pagehash import Finder, PageHash
from ksmd.core.rmap import (
    BLOCK_PAGES,
    BLOCK_SHIFT,
    CHUNK_BLOCKS,
    U8,
    U32,
    U64,
    BlockMap,
    Blocks,
    Bools,
    Index,
    PageBits,
    rows_of,
    unpacked,
)
from ksmd.core.sets import distinct
from ksmd.model.tables import Seen

# Scattered pages use up blocks faster than rows. A block for every eight rows lets areas of a few
# pages each (interpreter heaps) fill the table, and bounds the rmap table's memory at 36 bytes a
# row whatever comes.
_ROWS_PER_BLOCK = 8
_BLOCKS_AT_LEAST = 64

#: Resting blocks that lie next to each other, at least, to be passed over: fewer cost no less.
_LEAST_REST = 8

_ALL = np.uint64(0xFFFF_FFFF_FFFF_FFFF)


@dataclass(frozen=True, slots=True)
class Members:
    """Pages that may merge, as columns sorted by (slot, page), each page once.

    ``slots`` uint32: target; ``pages`` uint64: page number (address >> 12); ``checksums`` uint32.
    """

    slots: NDArray[np.uint32] = field(default_factory=lambda: np.empty(0, np.uint32))
    pages: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))
    checksums: NDArray[np.uint32] = field(default_factory=lambda: np.empty(0, np.uint32))

    def __len__(self) -> int:
        return int(self.slots.size)


class PageTables:
    """``rmap_size``: pages whose checksum is kept; ``page_hash_size``: stable pages among them."""

    def __init__(self, rmap_size: int, page_hash_size: int) -> None:
        if rmap_size <= 0 or page_hash_size <= 0:
            raise ValueError(f"tables of {rmap_size} and {page_hash_size} pages")
        self.rmap_size = rmap_size
        self.page_hash_size = page_hash_size
        self.skipped = 0  # how often a page found no room, since the start
        self.version = 0  # another one where anything has changed
        self._rows = 0
        self._blocks = Blocks(rmap_size // _ROWS_PER_BLOCK + _BLOCKS_AT_LEAST)
        self._maps: dict[int, BlockMap] = {}
        self._hash = PageHash()

    @property
    def rows(self) -> int:
        """Pages in the rmap table."""
        return self._rows

    @property
    def stable(self) -> int:
        """Pages in the page hash table."""
        return len(self._hash)

    @property
    def nbytes(self) -> int:
        """Bytes of all columns."""
        maps = sum(table.nbytes for table in self._maps.values())
        return self._blocks.nbytes + self._hash.nbytes + maps

    def observe(
        self,
        slot: int,
        first_page: int,
        end_page: int,
        pages: U64,
        checksums: U32,
        seqnr: int,
        *,
        eager: bool = False,
        now: int = 0,
    ) -> U8:
        """Take in what was read of [first_page, end_page) of a target in scan ``seqnr``.

        ``pages`` uint64 ascending, ``checksums`` uint32, one per page. Pages of the range that are
        not among them are forgotten. Returns a Seen (uint8) per page; TABLE_FULL means that the
        page has no row, or is unchanged and found no room in the page hash table. The numbers of a
        target's scans must not decrease. ValueError when ``pages`` is not what it should be.

        ``eager``: new pages enter the page hash table at their first sight, for a caller whose
        merge sees every page a second time. Changed pages still have to be found unchanged.

        ``now``, seconds: blocks in which nothing has changed rest from then on, see :meth:`awake`.
        """
        _check(first_page, end_page, pages, checksums)
        table = self._enter(slot, seqnr)
        cut = PageBits(pages)
        self._forget_absent(table, first_page, end_page, cut)
        if not pages.size:
            return np.empty(0, np.uint8)
        return self._place(table, cut, real(checksums), eager, now)

    def awake(
        self,
        slot: int,
        first_page: int,
        end_page: int,
        seqnr: int,
        now: int,
        still_since: int | None = None,
    ) -> tuple[list[tuple[int, int]], int]:
        """Give what of [first_page, end_page) scan ``seqnr`` has to look at, as page ranges.

        The rest is left as it is: nothing had changed there when it was looked at before, for as
        long as that is ago. Where the target has stood still all the time from the second
        ``still_since``, that is as good as a look now. Returns how many stable pages are spared.
        """
        table = self._enter(slot, seqnr)
        keys = np.array([-(-first_page // BLOCK_PAGES), end_page // BLOCK_PAGES], np.uint64)
        low, high = np.searchsorted(table.keys, keys)
        blocks = table.blocks[low:high]
        if still_since is not None:
            self._take_for_looked_at(table.keys[low:high], blocks, now, still_since)
        resting = np.flatnonzero(self._blocks.due[blocks] > now)
        found = table.keys[low:high][resting]
        first, end = _runs(found)
        long = end - first >= _LEAST_REST
        ranges, at, spared = [], first_page, 0
        for start, stop in zip(first[long].tolist(), end[long].tolist(), strict=True):
            spared += self._spare(blocks[resting[start:stop]])
            begins = int(found[start]) << BLOCK_SHIFT
            if at < begins:
                ranges.append((at, begins))
            at = (int(found[stop - 1]) + 1) << BLOCK_SHIFT
        if at < end_page:
            ranges.append((at, end_page))
        return ranges, spared

    def known(
        self, slot: int, seqnr: int, now: int, still_since: int
    ) -> tuple[list[tuple[int, int]], int]:
        """Do as :meth:`awake` for all that is known of a target that has not run, and for no more.

        Where no page was, there is none.
        """
        table = self._enter(slot, seqnr)
        self._take_for_looked_at(table.keys, table.blocks, now, still_since)
        resting = self._blocks.due[table.blocks] > now
        if resting.all():
            return [], self._spare(table.blocks)
        spared = self._spare(table.blocks[resting])
        keys = table.keys[~resting]
        ranges = [
            (int(keys[start]) << BLOCK_SHIFT, (int(keys[stop - 1]) + 1) << BLOCK_SHIFT)
            for start, stop in zip(*(ends.tolist() for ends in _runs(keys)), strict=True)
            if start < stop
        ]
        return ranges, spared

    def _spare(self, blocks: U32) -> int:
        """Take blocks for observed in the scan that is under way: how many pages are stable."""
        self._blocks.seen[blocks] = _ALL
        return int(np.bitwise_count(self._blocks.stable[blocks]).sum())

    def _take_for_looked_at(self, keys: U64, blocks: U32, now: int, still_since: int) -> None:
        untouched = self._blocks.untouched(blocks, now, still_since)
        if untouched.any():
            found = keys[untouched]
            self._blocks.rest(blocks[untouched], found, np.ones(found.size, np.bool_), now)

    def wake(self, slot: int, pages: U64) -> None:
        """Have the next scan look at *pages* of a target, in any order: they have changed."""
        table = self._maps.get(slot)
        if table is not None:
            at, there = table.find(PageBits(_ascending(pages)).keys)
            self._blocks.wake(table.blocks[at[there]])

    def remembered(self, slot: int, pages: U64) -> U32:
        """Return the last checksum of each of *pages* (ascending) of a target.

        0 where the table has none, UNKNOWN_CHECKSUM where it is in doubt.
        """
        table = self._maps.get(slot)
        if table is None or not pages.size:
            return np.zeros(pages.size, np.uint32)
        return self._last(table, PageBits(pages))[0]

    def doubt(self, slot: int, pages: U64) -> None:
        """Take the checksums of *pages* (any order) of a target for unknown: as if never read."""
        table = self._maps.get(slot)
        if table is None or not pages.size:
            return
        cut = PageBits(_ascending(pages))
        at, there = table.find(cut.keys)
        if not there.any():
            return
        blocks = table.blocks[at[there]]
        bits = cut.all_bits()[there] & self._blocks.present(blocks)
        self._leave_page_hash(blocks, bits & self._blocks.stable[blocks])
        self._blocks.stable[blocks] &= ~bits
        self._blocks.flat()[rows_of(blocks, bits)] = UNKNOWN_CHECKSUM
        self._blocks.wake(blocks)
        self.version += 1

    def _enter(self, slot: int, seqnr: int) -> BlockMap:
        table = self._maps.setdefault(slot, BlockMap())
        if table.seqnr != seqnr:
            self._blocks.seen[table.blocks] = 0
            table.seqnr = seqnr
        return table

    def finish(self, slot: int, seqnr: int) -> int:
        """End scan ``seqnr`` of a target: forget what it did not observe; return how many."""
        table = self._maps.get(slot)
        if table is None:
            return 0
        self._enter(slot, seqnr)  # of a target that the scan did not come to it observed nothing
        left = np.flatnonzero(self._blocks.seen[table.blocks] != _ALL)  # and of what rests, all
        blocks = table.blocks[left]
        gone = self._blocks.present(blocks) & ~self._blocks.seen[blocks]
        forgotten = self._clear(table, gone, left)
        self._blocks.trim()
        return forgotten

    def forget(self, slot: int) -> int:
        """Forget a target; return how many of its pages there were."""
        table = self._maps.pop(slot, None)
        if table is None:
            return 0
        forgotten = self._clear(
            table, self._blocks.present(table.blocks), np.arange(table.blocks.size)
        )
        self._blocks.trim()
        return forgotten

    def clear(self) -> None:
        """Forget every target."""
        for slot in list(self._maps):
            self.forget(slot)

    def forget_pages(self, slot: int, pages: U64) -> int:
        """Forget single pages of a target, in any order; return how many were there."""
        table = self._maps.get(slot)
        if table is None or not pages.size:
            return 0
        cut = PageBits(_ascending(pages))
        at, there = table.find(cut.keys)
        at = at[there]
        gone = cut.all_bits()[there] & self._blocks.present(table.blocks[at])
        return self._clear(table, gone, at)

    def duplicates(self, store_checksums: U32, zero: int | None = None) -> Members:
        """Return the stable pages that may merge.

        That is: whose checksum occurs twice or more, or is in ``store_checksums`` (uint32), or is
        that of a page of zeros.
        """
        wanted = store_checksums
        if zero is not None:
            wanted = np.append(store_checksums, np.uint32(zero))
        checksums = self._hash.duplicates(wanted)
        if not checksums.size:
            return Members()
        finder = Finder(checksums)
        slots, pages, found = [], [], []
        for slot, table in sorted(self._maps.items()):
            for start in range(0, table.blocks.size, CHUNK_BLOCKS):
                keys = table.keys[start : start + CHUNK_BLOCKS]
                blocks = table.blocks[start : start + CHUNK_BLOCKS]
                sums = self._blocks.checksums[blocks].reshape(-1)
                chosen = finder.found(sums)
                chosen &= unpacked(self._blocks.stable[blocks]).reshape(-1)
                at = np.flatnonzero(chosen)
                offset = (at % BLOCK_PAGES).astype(np.uint64)
                slots.append(np.full(at.size, slot, np.uint32))
                pages.append((keys[at >> BLOCK_SHIFT] << BLOCK_SHIFT) + offset)
                found.append(sums[at])
        return Members(np.concatenate(slots), np.concatenate(pages), np.concatenate(found))

    def _forget_absent(self, table: BlockMap, first: int, end: int, cut: PageBits) -> None:
        low = first >> BLOCK_SHIFT
        high = (end - 1) >> BLOCK_SHIFT
        span = np.array([low, high + 1], np.uint64)
        start, stop = np.searchsorted(table.keys, span)
        if start == stop:
            return
        gone = self._blocks.present(table.blocks[start:stop])
        if table.keys[start] == low:
            gone[0] &= _ALL << np.uint64(first % BLOCK_PAGES)
        if table.keys[stop - 1] == high:
            gone[-1] &= _ALL >> np.uint64(-end % BLOCK_PAGES)
        at, there = table.find(cut.keys)
        gone[at[there] - start] &= ~cut.all_bits()[there]
        self._clear(table, gone, np.arange(start, stop))

    def _clear(self, table: BlockMap, gone: U64, positions: Index) -> int:
        """Forget the pages set in ``gone`` of the blocks at ``positions``; free empty blocks."""
        hit = np.flatnonzero(gone)
        if not hit.size:
            return 0
        self.version += 1
        gone, positions = gone[hit], positions[hit]
        blocks = table.blocks[positions]
        before = self._rows
        self._leave_page_hash(blocks, gone & self._blocks.stable[blocks])
        for rows in _in_pieces(blocks, gone):
            self._blocks.flat()[rows] = 0
            self._rows -= rows.size
        self._blocks.stable[blocks] &= ~gone
        self._blocks.seen[blocks] &= ~gone
        self._blocks.wake(blocks)
        empty = self._blocks.present(blocks) == 0
        self._blocks.give(blocks[empty])
        table.delete(positions[empty])
        return before - self._rows

    def _leave_page_hash(self, blocks: U32, bits: U64) -> None:
        checksums = self._blocks.flat()
        gone = [checksums[rows] for rows in _in_pieces(blocks, bits)]
        self._hash.remove(np.concatenate(gone))  # at once: each time costs a pass over the table

    def _place(self, table: BlockMap, cut: PageBits, checksums: U32, eager: bool, now: int) -> U8:
        """Compare the pages with their rows and update both tables."""
        old, fits = self._admit(table, cut)
        known = old != 0
        fresh = fits | (old == UNKNOWN_CHECKSUM)
        changed = known & ~fresh & (old != checksums)
        same = known & ~fresh & ~changed
        # Blocks that could not be had stand in as block 0: no page of theirs passes the masks.
        at, there = table.find(cut.keys)
        blocks = np.zeros(cut.keys.size, np.uint32)
        blocks[there] = table.blocks[at[there]]
        rows = blocks[cut.which].astype(np.intp) * BLOCK_PAGES + cut.offset
        was_stable = known & ((self._blocks.stable[blocks][cut.which] & cut.bit) != 0)
        leaves = changed & was_stable
        self._hash.remove(old[leaves])
        ripe = (same & ~was_stable) | fresh if eager else same & ~was_stable
        joins = _first(ripe, self.page_hash_size - len(self._hash))
        self._hash.add(checksums[joins])
        self._blocks.flat()[rows[fresh | changed]] = checksums[fresh | changed]
        self.version += bool(fresh.any() or changed.any() or joins.any())
        held = blocks[there]
        self._blocks.stable[held] &= ~cut.bits(leaves)[there]
        self._blocks.stable[held] |= cut.bits(joins)[there]
        self._blocks.seen[held] |= cut.bits(known | fits)[there]
        self._blocks.rest(held, cut.keys[there], cut.bits(~same)[there] == 0, now)
        answer = np.full(known.size, Seen.TABLE_FULL, np.uint8)
        answer[fresh] = Seen.NEW
        answer[changed] = Seen.VOLATILE
        answer[(same & was_stable) | (joins & ~fresh)] = Seen.STABLE
        self.skipped += int(np.count_nonzero(answer == Seen.TABLE_FULL))
        return answer

    def _admit(self, table: BlockMap, cut: PageBits) -> tuple[U32, Bools]:
        """Give rows to pages that have none, in ascending order, as far as there is room.

        Returns the last checksum of every page (uint32, 0 for none) and which pages got a row.
        """
        old, there = self._last(table, cut)
        possible = there | _first(~there, self._blocks.room)
        fits = _first((old == 0) & possible[cut.which], self.rmap_size - self._rows)
        needed = np.zeros(cut.keys.size, np.bool_)
        needed[cut.which[fits]] = True
        missing = np.flatnonzero(needed & ~there)
        if missing.size:
            table.insert(cut.keys[missing], self._blocks.take(missing.size))
        self._rows += int(np.count_nonzero(fits))
        return old, fits

    def _last(self, table: BlockMap, cut: PageBits) -> tuple[U32, Bools]:
        """Return the last checksum of every page, 0 for none, and which of its blocks there are."""
        at, there = table.find(cut.keys)
        old = np.zeros(cut.which.size, np.uint32)
        have = there[cut.which]
        blocks = table.blocks[at] if there.any() else np.zeros(at.size, np.uint32)
        rows = blocks[cut.which[have]].astype(np.intp) * BLOCK_PAGES + cut.offset[have]
        old[have] = self._blocks.flat()[rows]
        return old, there


def _runs(keys: U64) -> tuple[Index, Index]:
    """Return where runs of neighbours begin and end in ascending keys; of none, one empty run."""
    cuts = np.flatnonzero(np.diff(keys) != 1) + 1
    return np.append(0, cuts), np.append(cuts, keys.size)


def _in_pieces(blocks: U32, bits: U64) -> Iterator[Index]:
    """Yield the rows that are set in the blocks' bit maps, a bounded number at a time."""
    for at in range(0, blocks.size, CHUNK_BLOCKS):
        yield rows_of(blocks[at : at + CHUNK_BLOCKS], bits[at : at + CHUNK_BLOCKS])


def _first(mask: Bools, n: int) -> Bools:
    """Return ``mask`` with only its first ``n`` True left."""
    if np.count_nonzero(mask) <= n:
        return mask
    return mask & (np.cumsum(mask) <= n)


def _ascending(pages: U64) -> U64:
    """Return *pages* in order, each once; most come so already."""
    return distinct(pages) if np.any(pages[1:] <= pages[:-1]) else pages


def _check(first_page: int, end_page: int, pages: U64, checksums: U32) -> None:
    if not 0 <= first_page < end_page:
        raise ValueError(f"the range of pages [{first_page}, {end_page})")
    if pages.size != checksums.size:
        raise ValueError(f"{pages.size} pages with {checksums.size} checksums")
    if not pages.size:
        return
    if pages[0] < first_page or pages[-1] >= end_page or np.any(pages[1:] <= pages[:-1]):
        raise ValueError(f"pages out of order, or outside [{first_page}, {end_page})")
