"""How the daemon and the tracer understand each other: records and results, and how one ends.

Records and results are packed, without a schema. This is the tracer's side, without numpy; the
daemon's are the dtypes RECORD and RESULT.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import Final

#: Exit status of a tracer: a thread did not stop in time.
EXIT_UNSTOPPABLE: Final = 10
#: Exit status of a tracer: the stub did not end in time. It goes on and leaves by itself.
EXIT_STUB_LATE: Final = 11

RECORD: Final = struct.Struct("=IQQQI")
RESULT: Final = struct.Struct("=qI")


def unpack_records(data: bytes) -> Iterator[tuple[int, int, int, int, int]]:
    """Give (op, start, length, offset, advice) of every record."""
    return RECORD.iter_unpack(data)


def pack_results(results: Iterable[tuple[int, int]]) -> bytes:
    """Pack (result, stage) of every record."""
    pack = RESULT.pack
    return b"".join([pack(result, stage) for result, stage in results])
