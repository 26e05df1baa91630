"""Which candidates a merge pass that nobody waits for takes up."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from ksmd.core.sets import among
from ksmd.core.tables import Members


def focus(members: Members, slots: Collection[int], max_pages: int) -> Members:
    """Keep candidates of *slots*; with *max_pages*, of about that many pages in each target.

    One stop window per target and pass is all that an unasked merge may open, so a plan for more
    would fill the store with pages that wait. The limit takes the contents of the target with the
    most candidates, from its lowest address on: neighbours stay together, and every target that
    shares those contents can follow in its own window.
    """
    ready = among(members.slots, np.fromiter(slots, np.uint32, len(slots)))
    members = Members(members.slots[ready], members.pages[ready], members.checksums[ready])
    if not max_pages or not len(members):
        return members
    found, counts = np.unique(members.slots, return_counts=True)
    if counts.max() <= max_pages:
        return members
    leader = members.slots == found[np.argmax(counts)]
    kept = among(members.checksums, members.checksums[leader][:max_pages])
    return Members(members.slots[kept], members.pages[kept], members.checksums[kept])
