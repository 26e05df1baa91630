"""The reading half of the pipeline: candidates from pagemap, read, checksum, tables.

Nothing here writes to another process, and nothing un-shares a page: process_vm_readv is used only
on pages that pagemap calls exclusive, and only those are candidates at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ksmd.core.cursor import Cursor, Piece
from ksmd.daemon.state import Domain, Target
from ksmd.daemon.targets import Targets
from ksmd.model.errors import TargetGoneError
from ksmd.model.refusal import Reason
from ksmd.model.tables import Seen
from ksmd.model.units import PAGE_SHIFT, PAGE_SIZE

_PIECE_BYTES = 1 << 30

Pages = NDArray[np.uint64]


@dataclass(slots=True)
class ScanResult:
    """One full scan, in pages."""

    scanned: int = 0
    new: int = 0
    volatile: int = 0
    refused: Counter[Reason] = field(default_factory=Counter)


class Scanner:
    """One full scan after the other over all targets."""

    def __init__(self, targets: Targets) -> None:
        self._targets = targets
        self.cursor = Cursor()
        self._seqnr = 0

    def full_scan(self, pages_to_scan: int, result: ScanResult) -> Iterator[None]:
        """Scan everything once, adding to *result*; yields after every *pages_to_scan* pages."""
        self._seqnr += 1  # not the cursor's: a scan that was given up has used a number too
        seqnr = self._seqnr
        self.cursor.begin({target.slot: target.areas for target in self._targets})
        budget = pages_to_scan
        while (piece := self.cursor.next_piece(_PIECE_BYTES)) is not None:
            at = piece.start
            while at < piece.end:
                target = self._targets.by_slot.get(piece.slot)
                if target is None:
                    self.cursor.forget(piece.slot)
                    break
                before = result.scanned
                at = self._step(target, Piece(piece.slot, at, piece.end), budget, seqnr, result)
                budget -= result.scanned - before
                if budget <= 0:
                    yield
                    budget = pages_to_scan
        for target in self._targets:
            self._targets.tables(target).finish(target.slot, seqnr)
        yield

    def _step(
        self, target: Target, piece: Piece, budget: int, seqnr: int, result: ScanResult
    ) -> int:
        """Scan up to *budget* pages of a piece: the address to go on from."""
        domain = self._targets.domain(target)
        limit = min(budget, domain.checksummer.npages)
        try:
            present = target.pagemap.present(piece.start, piece.end, limit)
            exclusive = target.pagemap.exclusive_of(present.pages)
            pages = present.pages[exclusive]
            result.refused[Reason.FORK_SHARED] += len(present.pages) - len(pages)
            pages, checksums = _read(domain, target, pages)
        except TargetGoneError:
            self._targets.drop(target)
            self.cursor.forget(piece.slot)
            return piece.end
        walk_end = max(present.walk_end, piece.start + PAGE_SIZE)
        seen = domain.tables.observe(
            target.slot,
            piece.start >> PAGE_SHIFT,
            walk_end >> PAGE_SHIFT,
            pages,
            checksums,
            seqnr,
        )
        counts = np.bincount(seen, minlength=len(Seen))
        result.scanned += len(present.pages)
        result.new += int(counts[Seen.NEW])
        result.volatile += int(counts[Seen.VOLATILE])
        result.refused[Reason.TABLE_FULL] += int(counts[Seen.TABLE_FULL])
        return walk_end


def stretches(pages: Pages) -> Iterator[tuple[int, int]]:
    """Cut ascending page numbers into (first index, end index) of neighbouring pages."""
    if not len(pages):
        return
    cuts = (np.flatnonzero(np.diff(pages) != 1) + 1).tolist()
    yield from zip([0, *cuts], [*cuts, len(pages)], strict=True)


def _read(domain: Domain, target: Target, pages: Pages) -> tuple[Pages, NDArray[np.uint32]]:
    """Read and checksum exclusive pages, buffer by buffer; pages that vanished are left out."""
    checksummer = domain.checksummer
    kept: list[Pages] = []
    sums: list[NDArray[np.uint32]] = []
    for start in range(0, len(pages), checksummer.npages):
        chunk = pages[start : start + checksummer.npages]
        whole = np.ones(len(chunk), np.bool_)
        for first, end in stretches(chunk):
            view = checksummer.buffer[first << PAGE_SHIFT : end << PAGE_SHIFT]
            got = target.memory.read_exclusive_into(int(chunk[first]) << PAGE_SHIFT, view)
            whole[first + (got >> PAGE_SHIFT) : end] = False
        found = checksummer.sums(len(chunk))
        kept.append(chunk[whole])
        sums.append(found[whole])
    if not kept:
        return pages[:0], np.empty(0, np.uint32)
    return np.concatenate(kept), np.concatenate(sums)
