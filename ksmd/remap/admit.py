"""The last look before a change: every record against the maps of the stopped target."""

from __future__ import annotations

from ksmd.kernel.vmaquery import VmaQuery
from ksmd.model.refusal import Reason
from ksmd.model.units import PAGE_SIZE
from ksmd.model.vma import Vma
from ksmd.model.window import Op, Record
from ksmd.remap import stub
from ksmd.remap.session import Session


def admit(
    session: Session, records: list[Record], extent_inode: int, huge: bool
) -> tuple[list[stub.StubRecord], dict[int, Reason]]:
    """Re-check every record against the maps of the stopped target.

    Gives what may be carried out, and the reason for each index of *records* that may not.
    """
    admitted: list[stub.StubRecord] = []
    dropped: dict[int, Reason] = {}
    rseq = session.rseq_pages()
    with VmaQuery(session.pid, session.tid) as query:
        for index, record in enumerate(records):
            vma = query.covering(record.start)
            reason = _objection(record, vma, extent_inode, rseq)
            if reason is not None or vma is None:
                dropped[index] = reason or Reason.NOT_MAPPED
                continue
            prot = sum(bit for letter, bit in zip("rwx", (1, 2, 4), strict=True)
                       if letter in vma.perms)  # fmt: skip
            admitted.append(
                stub.StubRecord(
                    record.op, record.start, record.length, record.offset, 0, prot,
                    (stub.NOHUGEPAGE if huge else 0) | record.advice,
                )
            )  # fmt: skip
    return admitted, dropped


def _objection(record: Record, vma: Vma | None, extent_inode: int, rseq: set[int]) -> Reason | None:
    if vma is None or record.start + record.length > vma.end:
        return Reason.NOT_MAPPED
    if vma.perms[3] != "p":
        return Reason.SHARED_MAPPING
    # the stub compares what it moved aside, so it must be readable; unmerging makes it so itself
    if record.op is not Op.UNMERGE and not vma.perms.startswith("rw-"):
        return Reason.NOT_WRITABLE
    if record.op in (Op.MERGE, Op.ZERO):
        if vma.inode or vma.device != (0, 0):
            return Reason.FILE_BACKED
        first, last = record.start // PAGE_SIZE, (record.start + record.length - 1) // PAGE_SIZE
        if any(first <= page <= last for page in rseq):
            return Reason.RSEQ
        return None
    if vma.inode != extent_inode:
        return Reason.NOT_MAPPED
    if vma.offset + record.start - vma.start != record.offset:
        return Reason.CHANGED
    return None
