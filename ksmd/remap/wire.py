"""How records and results travel between the daemon and the tracer: packed, without a schema."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from ksmd.model.window import Advice, Op, Record

_RECORD: Final = struct.Struct("=IQQQI")
_RESULT: Final = struct.Struct("=qI")


def pack_records(records: Sequence[Record]) -> bytes:
    """Pack a batch of records."""
    return b"".join(_RECORD.pack(r.op, r.start, r.length, r.offset, r.advice) for r in records)


def unpack_records(data: bytes) -> list[Record]:
    """Unpack what :func:`pack_records` packed."""
    return [
        Record(Op(op), start, length, offset, Advice(advice))
        for op, start, length, offset, advice in _RECORD.iter_unpack(data)
    ]


def pack_results(results: Sequence[tuple[int, int]]) -> bytes:
    """Pack (result, stage) of every record."""
    return b"".join(_RESULT.pack(result, stage) for result, stage in results)


def unpack_results(data: bytes) -> list[tuple[int, int]]:
    """Unpack what :func:`pack_results` packed."""
    return [(result, stage) for result, stage in _RESULT.iter_unpack(data)]
