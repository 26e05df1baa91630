"""Checksums that pages of different contents have in common.

Of half a million pages some thirty pairs have the same 32 bits by chance. Their digests tell them
apart before anybody is stopped, but each time that takes a page of the store for each of them, and
maps read anew. So a pass that nobody asked for leaves them alone for a while.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ksmd.core.sets import among
from ksmd.core.tables import Members

#: Seconds. A third page that does equal one of them waits so long at the most.
LASTS = 120.0


class Strangers:
    """What was found of late."""

    def __init__(self) -> None:
        self._until: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self._until)

    def add(self, checksums: NDArray[np.uint32], now: float) -> None:
        """Note that no two pages with any of *checksums* were equal at *now*, in seconds."""
        self._until.update(dict.fromkeys(checksums.tolist(), now + LASTS))

    def current(self, now: float) -> frozenset[int]:
        """Give those that are left alone at *now*; forget the others."""
        self._until = {one: until for one, until in self._until.items() if until > now}
        return frozenset(self._until)

    def without(self, members: Members, now: float) -> Members:
        """Keep the pages that may have an equal."""
        if not self.current(now):
            return members
        keep = ~among(members.checksums, np.fromiter(self._until, np.uint32, len(self._until)))
        return Members(members.slots[keep], members.pages[keep], members.checksums[keep])
