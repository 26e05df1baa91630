"""Where a scanner stands: a walk over every target's areas, piece by piece, again and again.

Like KSM's ``ksm_scan``, the cursor is a slot and an address, not an index into a list that may
change: targets come and go, and their areas are replaced, while a full scan is under way. Whatever
happens, the walk of one full scan only goes forward, so it ends, and no byte is met twice in it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass

from ksmd.model.units import PAGE_SIZE
from ksmd.model.vma import Area


@dataclass(frozen=True, slots=True)
class Piece:
    """What to read next: [start, end) in bytes, page-aligned, inside one area of one target."""

    slot: int
    start: int
    end: int


class Cursor:
    """A scanner's place among (slot, areas). One per scanner; they do not know of each other.

    ``seqnr`` counts completed full scans, as ``ksm_scan.seqnr`` does.
    """

    def __init__(self) -> None:
        self.seqnr = 0
        self._areas: dict[int, list[Area]] = {}
        self._waiting: list[int] = []  # slots still to come in this scan, the next one last
        self._slot: int | None = None
        self._address = 0
        self._under_way = False

    def begin(self, areas_by_slot: Mapping[int, Iterable[Area]]) -> None:
        """Start a full scan over these areas, in the order of the mapping, areas by address.

        A scan under way is given up and not counted.
        """
        self._areas = {slot: _ordered(areas) for slot, areas in areas_by_slot.items()}
        self._restart()

    def replace(self, slot: int, areas: Iterable[Area]) -> None:
        """Give *slot* other areas; a slot that is new is met at the end of the scan under way.

        What lies behind the cursor already is met in the next full scan.
        """
        known = slot in self._areas
        self._areas[slot] = _ordered(areas)
        if not known and self._under_way:
            self._waiting.insert(0, slot)

    def retain(self, slots: Container[int]) -> None:
        """Drop every slot that is not among *slots*."""
        for slot in [slot for slot in self._areas if slot not in slots]:
            self.forget(slot)

    def forget(self, slot: int) -> None:
        """Drop *slot*: its process is gone, or no target any more."""
        self._areas.pop(slot, None)
        if slot in self._waiting:
            self._waiting.remove(slot)
        if slot == self._slot:
            self._slot = None

    def next_piece(self, max_bytes: int) -> Piece | None:
        """Move on by at most *max_bytes* (a page or more; rounded down to pages).

        None at the end of a full scan, which raises ``seqnr``; the next call starts another one
        over the areas as they are then. Without any target it is None and counts as no scan.
        """
        if max_bytes < PAGE_SIZE:
            raise ValueError(f"a piece has at least one page, not {max_bytes} bytes")
        if not self._under_way:
            if not self._areas:
                return None
            self._restart()
        while True:
            area = self._area_ahead()
            if area is not None and self._slot is not None:
                start = max(area.start, self._address)
                end = min(area.end, start + max_bytes // PAGE_SIZE * PAGE_SIZE)
                self._address = end
                return Piece(self._slot, start, end)
            if not self._waiting:
                self._slot, self._under_way = None, False
                self.seqnr += 1
                return None
            self._slot, self._address = self._waiting.pop(), 0

    def _restart(self) -> None:
        self._waiting = list(reversed(self._areas))
        self._slot, self._address = None, 0
        self._under_way = bool(self._waiting)

    def _area_ahead(self) -> Area | None:
        """Find the area of the current slot that holds the address or is the next after it."""
        areas = self._areas.get(self._slot, []) if self._slot is not None else []
        index = bisect_right(areas, self._address, key=lambda area: area.end)
        return areas[index] if index < len(areas) else None


def _ordered(areas: Iterable[Area]) -> list[Area]:
    return sorted((a for a in areas if a.start < a.end), key=lambda area: area.start)
