"""The last look before a change: every record against the maps of the stopped target."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

from ksmd.kernel.vmaquery import VmaQuery
from ksmd.model.refusal import Reason
from ksmd.model.units import PAGE_SHIFT, PAGE_SIZE
from ksmd.model.vma import Vma
from ksmd.model.window import Op
from ksmd.remap import stub
from ksmd.remap.session import Session

#: Operations that make a mapping anew, and so have to know what was said of the one before.
_TRIED = (Op.MERGE, Op.UNMERGE)
_PROT = {"r": 1, "w": 2, "x": 4}


def admit(
    session: Session,
    records: Iterable[tuple[int, int, int, int, int]],
    extent_inode: int,
) -> tuple[list[stub.StubRecord], dict[int, Reason], list[int]]:
    """Re-check every record (as on the wire) against the maps of the stopped target.

    Gives what may be carried out; the reason for each index of *records* that may not; and the
    starts of the mappings that the stub has to try for flags. That takes two pages: of a mapping of
    one page what smaps said must do.
    """
    admitted: list[stub.StubRecord] = []
    dropped: dict[int, Reason] = {}
    rseq = sorted(session.rseq_pages())
    vma, prot = None, 0
    trials: dict[int, int] = {}
    with VmaQuery(session.pid, session.tid) as query:
        for index, (op, start, length, offset, advice) in enumerate(records):
            if vma is None or not vma.start <= start < vma.end:
                vma = query.covering(start)
                prot = sum(_PROT.get(letter, 0) for letter in vma.perms) if vma is not None else 0
            reason = _objection(op, start, length, offset, vma, extent_inode, rseq)
            if reason is not None:
                dropped[index] = reason
                continue
            trial = 0
            if op in _TRIED and vma is not None and vma.end - vma.start > PAGE_SIZE:
                trial = trials.setdefault(vma.start, len(trials) + 1)
            admitted.append(stub.StubRecord(op, start, length, offset, 0, prot, advice, trial))
    return admitted, dropped, list(trials)


def _objection(
    op: int,
    start: int,
    length: int,
    offset: int,
    vma: Vma | None,
    extent_inode: int,
    rseq: list[int],
) -> Reason | None:
    if vma is None or start + length > vma.end:
        return Reason.NOT_MAPPED
    if vma.perms[3] != "p":
        return Reason.SHARED_MAPPING
    # the stub compares what it moved aside, so it must be readable; unmerging makes it so itself
    if op != Op.UNMERGE and not vma.perms.startswith("rw-"):
        return Reason.NOT_WRITABLE
    if op in (Op.MERGE, Op.ZERO):
        if vma.inode or vma.device != (0, 0):
            return Reason.FILE_BACKED
        at = bisect_left(rseq, start >> PAGE_SHIFT)
        if at < len(rseq) and rseq[at] < (start + length) >> PAGE_SHIFT:
            return Reason.RSEQ
        return None
    if vma.inode != extent_inode:
        return Reason.NOT_MAPPED
    if vma.offset + start - vma.start != offset:
        return Reason.CHANGED
    return None
