"""Columns of the rmap table: the last checksum of every page, in blocks of 64 pages.

A block holds 64 neighbouring pages of one target: 64 checksums of 4 bytes and two bit maps of 64
bits, so that what happens to many pages happens to few words. A page's row in the rmap table is
its block's number times 64 plus its place in the block; checksum 0 means that no page is there.

The columns grow by realloc(3), without a second copy in memory. So nobody may hold a view of one
across :meth:`Blocks.take` or :meth:`Blocks.trim`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BLOCK_SHIFT = 6
BLOCK_PAGES = 1 << BLOCK_SHIFT

# Whole targets are worked through in pieces of so many blocks: what is unpacked from bit maps to
# one entry per page stays a few MiB.
CHUNK_BLOCKS = 4096

U8 = NDArray[np.uint8]
U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]
Bools = NDArray[np.bool_]
Index = NDArray[np.intp]

# How much the columns grow at a time; what is not used is given back by trim().
_GROWTH_FRACTION = 8
_GROWTH_FLOOR = 64

#: A block rests for 2 ** quiet seconds at most: some half an hour in the end.
_MOST_QUIET = 11
_HUGE_SHIFT = 9 - BLOCK_SHIFT
_SPREAD = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio: neighbours get unlike bits


class Blocks:
    """At most ``limit`` blocks. A block that is free has no page: its checksums and bits are 0.

    ``checksums`` uint32 (blocks, 64); ``stable`` uint64 (blocks): pages that are in the page hash
    table; ``seen`` uint64 (blocks): pages observed in the scan that is under way; ``quiet``
    uint8 (blocks): nothing has changed in the block for about 2 ** (quiet - 1) seconds, 0: not even
    since it was looked at first; ``due`` uint32 (blocks): the second from which on it is to be
    looked at again, 0 for at once.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.checksums: U32 = np.zeros((1, BLOCK_PAGES), np.uint32)
        self.stable: U64 = np.zeros(1, np.uint64)
        self.seen: U64 = np.zeros(1, np.uint64)
        self.quiet: U8 = np.zeros(1, np.uint8)
        self.due: U32 = np.zeros(1, np.uint32)
        self._used = 0  # blocks from here on were never taken
        self._free: U32 = np.empty(0, np.uint32)

    @property
    def room(self) -> int:
        """How many blocks can still be taken."""
        return self.limit - self._used + self._free.size

    @property
    def nbytes(self) -> int:
        """Bytes of the columns."""
        bits = self.stable.nbytes + self.seen.nbytes
        return (
            self.checksums.nbytes + bits + self.quiet.nbytes + self.due.nbytes + self._free.nbytes
        )

    def flat(self) -> U32:
        """Return the checksums by row; a view, see the head of this module."""
        return self.checksums.reshape(-1)

    def present(self, blocks: U32) -> U64:
        """Return for each block the bit map of the pages it holds."""
        bits = np.empty(blocks.size, np.uint64)
        for at in range(0, blocks.size, CHUNK_BLOCKS):
            part = blocks[at : at + CHUNK_BLOCKS]
            bits[at : at + part.size] = _pack(self.checksums[part] != 0)
        return bits

    def take(self, n: int) -> U32:
        """Return ``n`` free blocks; the caller has looked at ``room``."""
        reused, self._free = self._free[:n], self._free[n:].copy()
        first = self._used
        self._used += n - reused.size
        if self._used > self.stable.size:
            spare = max(_GROWTH_FLOOR, self._used // _GROWTH_FRACTION)
            self._resize(min(self._used + spare, self.limit))
        return np.concatenate((reused, np.arange(first, self._used, dtype=np.uint32)))

    def give(self, blocks: U32) -> None:
        """Take back blocks that hold no page any more, and do not rest."""
        self._free = np.concatenate((self._free, blocks))

    def wake(self, blocks: U32) -> None:
        """Have blocks looked at by the next scan."""
        self.quiet[blocks] = 0
        self.due[blocks] = 0

    def rest(self, blocks: U32, keys: U64, quiet: Bools, now: int) -> None:
        """Let blocks in which nothing has changed rest for as long again; wake the others.

        *now* is in seconds. Blocks of one huge page rest equally long, other ones vary. A look at a
        block that rests still proves nothing new.
        """
        self.wake(blocks[~quiet])
        quiet = quiet & (self.due[blocks] <= now)
        blocks = blocks[quiet]
        before = self.quiet[blocks]
        # it was looked at last when it had three quarters of its rest before it, or more
        rested = (np.int64(3) << before.astype(np.int64)) >> np.int64(2)
        unchanged = np.where(before > 0, now - self.due[blocks].astype(np.int64) + rested, 0)
        _, exponent = np.frexp(unchanged)
        self.quiet[blocks] = np.minimum(np.maximum(before + 1, exponent - 1), _MOST_QUIET)
        spread = (keys[quiet] >> np.uint64(_HUGE_SHIFT)) * _SPREAD >> np.uint64(56)
        longest = np.uint32(1) << self.quiet[blocks].astype(np.uint32)
        shorter = (longest * spread.astype(np.uint32)) >> np.uint32(10)
        self.due[blocks] = np.uint32(now) + longest - shorter

    def untouched(self, blocks: U32, now: int, still_since: int) -> Bools:
        """Tell which of the blocks that are to be looked at need not be.

        They have been found unchanged since the second *still_since*, and nobody has run since.
        """
        due = self.due[blocks].astype(np.int64)
        quiet = self.quiet[blocks].astype(np.int64)
        looked = due - (np.int64(1) << quiet)  # or later
        found: Bools = (due <= now) & (quiet > 0) & (looked >= still_since)
        return found

    def trim(self) -> None:
        """Give the memory behind the last block in use back."""
        if self._free.size:
            in_use = np.ones(self._used, np.bool_)
            in_use[self._free] = False
            last = np.flatnonzero(in_use)[-1:]
            self._used = int(last[0]) + 1 if last.size else 0
            self._free = np.sort(self._free[self._free < self._used])
        self._resize(max(self._used, 1))

    def _resize(self, n: int) -> None:
        if n == self.stable.size:
            return
        self.checksums.resize((n, BLOCK_PAGES), refcheck=False)
        self.stable.resize(n, refcheck=False)
        self.seen.resize(n, refcheck=False)
        self.quiet.resize(n, refcheck=False)
        self.due.resize(n, refcheck=False)


class BlockMap:
    """Which block holds which pages of one target. ``keys`` ascend: page number >> 6.

    ``seqnr`` is the scan in which the target was observed last.
    """

    def __init__(self) -> None:
        self.keys: U64 = np.empty(0, np.uint64)
        self.blocks: U32 = np.empty(0, np.uint32)
        self.seqnr = -1

    @property
    def nbytes(self) -> int:
        """Bytes of the columns."""
        return self.keys.nbytes + self.blocks.nbytes

    def find(self, keys: U64) -> tuple[Index, Bools]:
        """Return for each key its position (meaningless when not there) and whether it is there."""
        if not self.keys.size:
            return np.zeros(keys.size, np.intp), np.zeros(keys.size, np.bool_)
        at = np.minimum(np.searchsorted(self.keys, keys), self.keys.size - 1)
        return at, self.keys[at] == keys

    def insert(self, keys: U64, blocks: U32) -> None:
        """Add blocks under keys that are not there; ``keys`` ascend."""
        at = np.searchsorted(self.keys, keys)
        self.keys = np.insert(self.keys, at, keys)
        self.blocks = np.insert(self.blocks, at, blocks)

    def delete(self, positions: Index) -> None:
        """Remove the blocks at these positions."""
        self.keys = np.delete(self.keys, positions)
        self.blocks = np.delete(self.blocks, positions)


class PageBits:
    """Ascending pages, cut into the blocks they lie in.

    ``keys`` (one per block touched) ascend; ``which`` tells each page's place in ``keys``, ``bit``
    its bit in the block's bit maps, ``offset`` its number inside the block.
    """

    def __init__(self, pages: U64) -> None:
        keys: U64 = pages >> np.uint64(BLOCK_SHIFT)
        self.offset: Index = (pages & (BLOCK_PAGES - 1)).astype(np.intp)
        self.bit: U64 = np.left_shift(np.uint64(1), pages & np.uint64(BLOCK_PAGES - 1))
        fresh = np.ones(pages.size, np.bool_)
        np.not_equal(keys[1:], keys[:-1], out=fresh[1:])
        self._starts: Index = np.flatnonzero(fresh)
        self.keys: U64 = keys[self._starts]
        self.which: Index = np.cumsum(fresh) - 1

    def bits(self, chosen: Bools) -> U64:
        """Return for each block touched the bit map of its chosen pages."""
        if not self.keys.size:
            return np.empty(0, np.uint64)
        return np.bitwise_or.reduceat(np.where(chosen, self.bit, np.uint64(0)), self._starts)

    def all_bits(self) -> U64:
        """Return for each block touched the bit map of its pages."""
        return self.bits(np.ones(self.bit.size, np.bool_))


def rows_of(blocks: U32, bits: U64) -> Index:
    """Return the rows that are set in the blocks' bit maps, ascending inside each block."""
    at, offset = np.nonzero(unpacked(bits))
    return blocks[at].astype(np.intp) * BLOCK_PAGES + offset


def _pack(mask: Bools) -> U64:
    packed: U64 = np.packbits(mask, axis=1, bitorder="little").view("<u8").reshape(-1)
    return packed


def unpacked(bits: U64) -> Bools:
    """Return bit maps as (blocks, 64) bools."""
    octets = np.ascontiguousarray(bits, "<u8").view(np.uint8).reshape(-1, BLOCK_PAGES // 8)
    return np.unpackbits(octets, axis=1, bitorder="little").view(np.bool_)
