"""How the daemon and the tracer understand each other: records, and how a tracer ends.

Records travel as the stub reads them, and come back as it left them: the daemon packs and unpacks
whole columns (dtype STUB_RECORD), and the tracer, which has no numpy, looks at whole columns too.
What has to be done for each record in Python would be done while the target stands still.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from operator import add
from typing import Final

from ksmd.model.window import Op

#: Exit status of a tracer: a thread did not stop in time.
EXIT_UNSTOPPABLE: Final = 10
#: Exit status of a tracer: the stub did not end in time. It goes on and leaves by itself.
EXIT_STUB_LATE: Final = 11
#: Exit status of a tracer: the daemon ended while it stopped a target, which it has let go.
EXIT_ORPHANED: Final = 12

#: Bits of a record's flags beside advice: it is left out; and from where on the number of a mapping
#: is written, from 1 on: of those that are tried for flags, or whose zero pages are dropped.
SKIP: Final = 32
MAPPING_SHIFT: Final = 8

_WORDS: Final = 7  # of 8 bytes: start, length, offset, aside, op | prot, flags | stage, result
_HIGH: Final = 32
_LOW: Final = 0xFFFF_FFFF


class Batch:
    """The records of one window: of one operation, ascending by ``starts``.

    What can be known without the target is worked out at once, before it is stopped.
    """

    def __init__(self, payload: bytes = b"") -> None:
        self._words = array("Q", payload)
        self.starts = self._words[0::_WORDS]
        self.lengths = self._words[1::_WORDS]
        self.ends = array("Q", map(add, self.starts, self.lengths))
        self.offsets = self._words[2::_WORDS]
        self.op = self._words[4] & _LOW if self._words else -1
        self.spans = self._spans()

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def quarantine(self) -> int:
        """Bytes that the quarantine takes."""
        return max(map(add, self._words[3::_WORDS], self.lengths), default=0)

    def _spans(self) -> dict[str, int]:
        """Give the fields of the stub's header that follow from the records, in bytes."""
        if not len(self):
            return {}
        start, offset, store_len = self.starts[0], 0, 0
        if self.op in (Op.MERGE, Op.REMERGE):
            offset = min(self.offsets)
            store_len = max(map(add, self.offsets, self.lengths)) - offset
        aside = self.quarantine
        return {
            "aside_len": aside,
            "fresh_len": aside,
            "store_offset": offset,
            "store_len": store_len,
            "wake_start": start,
            "wake_len": max(self.ends) - start,
        }

    def skip(self, index: int) -> None:
        """Leave a record out."""
        self._words[5 + _WORDS * index] |= SKIP

    def protect(self, first: int, end: int, prot: int, number: int) -> None:
        """Note for records [first, end) the mapping's protection, and its *number* or 0."""
        step = slice(4 + _WORDS * first, 4 + _WORDS * end, _WORDS)
        self._words[step] = array("Q", [self.op | prot << _HIGH]) * (end - first)
        if number:
            step, high = slice(step.start + 1, step.stop + 1, _WORDS), number << MAPPING_SHIFT
            self._words[step] = array("Q", [word | high for word in self._words[step]])

    def holding(self, address: int, length: int) -> int | None:
        """Give the record that holds any of [address, address + length), a page at the most."""
        at = bisect_left(self.starts, address + length) - 1
        return at if at >= 0 and address < self.ends[at] else None

    def tobytes(self) -> bytes:
        """Give the records as the stub reads them."""
        return self._words.tobytes()
