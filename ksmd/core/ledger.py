"""The ledger: what is shared, what it saves, what it costs, and what was refused.

Counters mean what /sys/kernel/mm/ksm says they mean. Sharing is counted anew from the kernel's
answers (which store pages are still mapped where), never from what was once merged, so that pages
broken by a write are out of it at once.

A page with r sites saves r - 1 pages, and each site is credited 4096 * (1 - 1/r) bytes: so what
the targets are said to save adds up, exactly, to what all of them save.

Profit is after costs:

* every page the store holds, those without a site left included (space returns by the extent);
* ``VMA_BYTES`` for every VMA that merging added (page tables are as large as they were before);
* the resident memory of our own processes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ksmd.core.layout import VMA_BYTES
from ksmd.model.refusal import Reason
from ksmd.model.tables import SITES
from ksmd.model.units import PAGE_SIZE

#: How many of a target's last stops the percentile looks at.
_STOPS_KEPT = 1024


@dataclass(frozen=True, slots=True)
class SlotSharing:
    """One target: ``merging_pages`` sites, and the bytes it is credited with."""

    merging_pages: int
    saved_bytes: int


@dataclass(frozen=True, slots=True)
class Sharing:
    """What is shared at this moment.

    ``pages_shared``: store pages in use; ``pages_sharing``: sites beyond the first of each.
    """

    pages_shared: int
    pages_sharing: int
    per_slot: dict[int, SlotSharing]


def count_sharing(sites: Mapping[int, NDArray[np.void]]) -> Sharing:
    """Count, given for each slot the store pages that it still shows (dtype SITES, in any order).

    Between two neighbouring ends of runs every store page has the same users; so what this takes
    follows from the number of runs, not of pages.
    """
    slots = list(sites)
    columns = [sites[slot] for slot in slots]
    every = np.concatenate(columns) if columns else np.empty(0, SITES)
    starts, lengths = every["first"], every["npages"].astype(np.uint64)
    ends = starts + lengths
    borders, at = np.unique(np.concatenate((starts, ends)), return_inverse=True)
    first, last = at[: len(every)], at[len(every) :]
    steps = np.bincount(first, minlength=borders.size) - np.bincount(last, minlength=borders.size)
    users = np.cumsum(steps)[:-1]
    width = np.diff(borders).astype(np.int64)
    credit = PAGE_SIZE * (1.0 - 1.0 / np.maximum(users, 1)) * width
    upto_border = np.concatenate(([0.0], np.cumsum(credit)))
    credited = upto_border[last] - upto_border[first]
    pages = every["npages"].astype(np.int64)
    upto_slot = np.cumsum([column.size for column in columns])
    per_slot = {}
    running, told = 0.0, 0
    for slot, column, end in zip(slots, columns, upto_slot.tolist(), strict=True):
        part = slice(end - column.size, end)
        running += float(credited[part].sum())
        # Rounding the running total, not each part, keeps the parts adding up to the whole.
        upto = round(running)
        per_slot[slot] = SlotSharing(int(pages[part].sum()), upto - told)
        told = upto
    shared = int(width[users > 0].sum())
    return Sharing(shared, int(pages.sum()) - shared, per_slot)


def profit(
    sharing: Sharing,
    *,
    zero_pages: int,
    vmas: int,
    table_bytes: int,
    own_rss: int,
    store_pages: int | None = None,
) -> int:
    """Return general_profit in bytes; negative when ksmd costs more than it saves.

    ``zero_pages``: pages given back because they were zero; ``vmas``: VMAs that merging added;
    ``own_rss``: resident bytes of our processes without the store (RssShmem). The tables are part
    of it: ``table_bytes`` counts where it is more, as when the processes could not be measured.
    ``store_pages``: pages the store has filled (default: those in use).
    """
    sites = sharing.pages_shared + sharing.pages_sharing
    held = sharing.pages_shared if store_pages is None else store_pages
    gain = PAGE_SIZE * (sites + zero_pages - held)
    return gain - VMA_BYTES * vmas - max(own_rss, table_bytes)


def headroom(sharing: Sharing, zero_pages: int) -> int:
    """Return the bytes needed to give every page back, before the store returns its own."""
    return PAGE_SIZE * (sharing.pages_shared + sharing.pages_sharing + zero_pages)


class StopTimes:
    """How long targets were stopped, in milliseconds: percentiles of the last 1,024 stops.

    ``worst`` is the longest stop ever, since a deadline is a promise about every stop.
    """

    def __init__(self) -> None:
        self.count = 0
        self.worst = 0.0
        self._last: NDArray[np.float32] = np.zeros(_STOPS_KEPT, np.float32)
        self._p99 = 0, 0.0  # of the first so many stops

    def add(self, milliseconds: float) -> None:
        """Record one stop."""
        self._last[self.count % _STOPS_KEPT] = milliseconds
        self.count += 1
        self.worst = max(self.worst, milliseconds)

    @property
    def p99(self) -> float:
        """The stop time that 99 of 100 recent stops did not exceed; 0 before the first."""
        if self._p99[0] != self.count:  # who asks for the status, asks often
            recent = np.sort(self._last[: min(self.count, _STOPS_KEPT)])
            self._p99 = self.count, float(recent[-(-99 * recent.size // 100) - 1])
        return self._p99[1]


@dataclass(slots=True)
class Ledger:
    """Counters that only grow, from the daemon's start."""

    pages_scanned: int = 0
    pages_skipped: int = 0
    full_scans: int = 0
    cow_breaks: int = 0
    refusals: Counter[Reason] = field(default_factory=Counter)

    def refuse(self, reason: Reason, n: int = 1) -> None:
        """Count ``n`` pages, ranges or processes left alone for a reason."""
        if n:
            self.refusals[reason] += n

    def refuse_all(self, refused: Mapping[Reason, int]) -> None:
        """Count what a plan or a window refused."""
        for reason, n in refused.items():
            self.refuse(reason, n)

    def named_refusals(self) -> dict[str, int]:
        """Return the refusals as ``status`` prints them, most frequent first."""
        return {str(reason): n for reason, n in self.refusals.most_common()}
