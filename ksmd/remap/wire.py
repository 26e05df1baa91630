"""How records and results travel between the daemon and the tracer: packed, without a schema.

This is the tracer's side, without numpy; the daemon's are the dtypes RECORD and RESULT.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import Final

RECORD: Final = struct.Struct("=IQQQI")
RESULT: Final = struct.Struct("=qI")


def unpack_records(data: bytes) -> Iterator[tuple[int, int, int, int, int]]:
    """Give (op, start, length, offset, advice) of every record."""
    return RECORD.iter_unpack(data)


def pack_results(results: Iterable[tuple[int, int]]) -> bytes:
    """Pack (result, stage) of every record."""
    pack = RESULT.pack
    return b"".join([pack(result, stage) for result, stage in results])
