"""Pages that share a checksum and nothing else are left alone for a while, and others are not."""

from __future__ import annotations

import numpy as np

from ksmd.core.strangers import LASTS, Strangers
from ksmd.core.tables import Members


def members(*checksums: int) -> Members:
    n = len(checksums)
    return Members(
        np.ones(n, np.uint32), np.arange(n, dtype=np.uint64), np.array(checksums, np.uint32)
    )


def left(found: Strangers, now: float) -> list[int]:
    kept = found.without(members(5, 6, 5, 7), now)
    assert kept.pages.tolist() == [i for i, c in enumerate((5, 6, 5, 7)) if c in kept.checksums]
    return kept.checksums.tolist()


def test_what_was_found_goes_by_its_own_time() -> None:
    found = Strangers()
    assert left(found, 0.0) == [5, 6, 5, 7]
    found.add(np.array([5], np.uint32), 10.0)
    found.add(np.array([7, 9], np.uint32), 20.0)
    assert left(found, 21.0) == [6]
    assert left(found, 10.0 + LASTS) == [5, 6, 5]
    assert len(found) == 2
    found.add(np.array([7], np.uint32), 30.0)  # found again
    assert left(found, 20.0 + LASTS) == [5, 6, 5]
    assert left(found, 30.0 + LASTS) == [5, 6, 5, 7]
    assert not len(found)
