"""What is measured: plain values, and how marks are read off a timeline. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

PAGE_SIZE = 4096


@dataclass(frozen=True, slots=True)
class Point:
    """A moment since the start of the scan: ``seconds`` of wall and of ``cpu``, ``pages`` saved."""

    seconds: float
    cpu: float
    pages: int


@dataclass(frozen=True, slots=True)
class Costs:
    """Bytes that merging takes: what is subtracted from the frames saved."""

    vmas: int = 0
    page_tables: int = 0
    tables: int = 0
    store: int = 0  # pages of the store that nobody maps
    processes: int = 0  # their distinct frames, with the tables in them, without the store
    kernel: int = 0  # rmap items and the like

    @property
    def total(self) -> int:
        """All of it; the tables are part of the processes."""
        processes = max(self.processes, self.tables)
        return self.vmas + self.page_tables + self.store + processes + self.kernel

    @property
    def metadata(self) -> int:
        """What grows with the pages that are scanned: tables and rmap items."""
        return self.tables + self.kernel


@dataclass(frozen=True, slots=True)
class Report:
    """What a contender says of itself at its end."""

    costs: Costs
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Run:
    """One contender, once, on fresh victims. Reads and writes in ns, rescans in CPU seconds.

    ``passes``: when each full scan ended; ``end``: when nothing more was found.
    """

    pages: int
    possible: int
    timeline: tuple[Point, ...]
    passes: tuple[Point, ...]
    end: Point
    saved: int
    costs: Costs
    rescan_idle: float
    rescan_written: float
    written: int
    read_before: float | None
    read_after: float | None
    write_ns: float
    huge_before: int
    huge_after: int
    intact: bool
    details: dict[str, Any] = field(default_factory=dict)

    def mark(self, share: float) -> Point | None:
        """When *share* of the possible merge was reached; None when never, or nothing to merge."""
        return mark(self.timeline, self.possible, share)

    @property
    def net_bytes(self) -> int:
        """Bytes saved after all costs."""
        return self.saved * PAGE_SIZE - self.costs.total


def mark(timeline: Sequence[Point], possible: int, share: float) -> Point | None:
    """Give the first point from which on *share* of *possible* pages stayed saved.

    A store that fills up before anything maps it is no saving, so a rise that falls back does not
    count.
    """
    if not possible:
        return None
    found = None
    for point in reversed(timeline):
        if point.pages < share * possible:
            break
        found = point
    return found
