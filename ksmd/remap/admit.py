"""The last look before a change: every record against the maps of the stopped target.

The target stands still meanwhile, and a window may have hundreds of records: so the mappings are
gone through, and the records of each at one stroke.
"""

from __future__ import annotations

from bisect import bisect_left

from ksmd.model.refusal import Reason
from ksmd.model.units import PAGE_SHIFT, PAGE_SIZE
from ksmd.model.vma import Vma
from ksmd.model.window import Op
from ksmd.remap.session import Session
from ksmd.remap.wire import Batch

#: Operations that make a mapping anew, and so have to know what was said of the one before.
_TRIED = (Op.MERGE, Op.UNMERGE)
_PROT = {"r": 1, "w": 2, "x": 4}


def admit(session: Session, batch: Batch, extent_inode: int) -> tuple[dict[int, Reason], list[int]]:
    """Re-check every record of *batch* against the maps of the stopped target.

    Those that may not be carried out are marked in it, and given with the reason. Gives, too, the
    starts of the mappings that the stub has to try for flags. That takes two pages: of a mapping of
    one page what smaps said must do.
    """
    dropped: dict[int, Reason] = {}
    trials: list[int] = []
    zeroed = 0
    at = 0
    while at < len(batch):
        vma = session.query.covering(batch.starts[at])
        if vma is None:
            dropped[at] = Reason.NOT_MAPPED
            at += 1
            continue
        end = bisect_left(batch.starts, vma.end, at)
        reason = _objection(batch.op, vma, extent_inode)
        if reason is not None:
            dropped |= dict.fromkeys(range(at, end), reason)
            at = end
            continue
        number = 0
        if batch.op in _TRIED and vma.end - vma.start > PAGE_SIZE:
            trials.append(vma.start)
            number = len(trials)
        elif batch.op == Op.ZERO:
            number = zeroed = zeroed + 1
        prot = sum(_PROT.get(letter, 0) for letter in vma.perms)
        batch.protect(at, end, prot, number)
        dropped |= _beyond(batch, at, end, vma)
        if batch.op in (Op.UNMERGE, Op.REMERGE):
            dropped |= _moved(batch, at, end, vma)
        at = end
    if batch.op in (Op.MERGE, Op.ZERO):
        dropped = _rseq(batch, session.rseq_pages()) | dropped
    for index in dropped:
        batch.skip(index)
    return dropped, trials


def _objection(op: int, vma: Vma, extent_inode: int) -> Reason | None:
    if vma.perms[3] != "p":
        return Reason.SHARED_MAPPING
    # the stub compares what it moved aside, so it must be readable; unmerging makes it so itself
    if op != Op.UNMERGE and not vma.perms.startswith("rw-"):
        return Reason.NOT_WRITABLE
    if op in (Op.MERGE, Op.ZERO):
        return Reason.FILE_BACKED if vma.inode or vma.device != (0, 0) else None
    return None if vma.inode == extent_inode else Reason.NOT_MAPPED


def _beyond(batch: Batch, first: int, end: int, vma: Vma) -> dict[int, Reason]:
    """Refuse records that begin in the mapping and end beyond it."""
    if max(batch.ends[first:end]) <= vma.end:
        return {}
    return {i: Reason.NOT_MAPPED for i in range(first, end) if batch.ends[i] > vma.end}


def _moved(batch: Batch, first: int, end: int, vma: Vma) -> dict[int, Reason]:
    """Refuse records that show another part of the extent than they did."""
    shift = vma.offset - vma.start
    starts, offsets = batch.starts, batch.offsets
    return {i: Reason.CHANGED for i in range(first, end) if starts[i] + shift != offsets[i]}


def _rseq(batch: Batch, pages: set[int]) -> dict[int, Reason]:
    """Refuse records with a page that the kernel writes when a thread goes on."""
    held = (batch.holding(page << PAGE_SHIFT, PAGE_SIZE) for page in pages)
    return {index: Reason.RSEQ for index in held if index is not None}
