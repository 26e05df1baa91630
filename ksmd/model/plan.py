"""A plan: what would be merged, in which order, at what profit. Describing it changes nothing."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ksmd.model.refusal import Reason
from ksmd.model.tables import RUN, SPAN


@dataclass(frozen=True, slots=True)
class ExtentPlan:
    """One extent of the store to be made.

    ``sources`` (dtype SPAN) are copied one after the other into pages 0, 1, ...; ``checksums``
    (uint32, one per page) is what each copied page must have. ``scattered``: those who share it map
    short runs of it.
    """

    extent: int
    npages: int
    sources: NDArray[np.void]
    checksums: NDArray[np.uint32]
    scattered: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """What one pass of the planner decided.

    ``merges`` has dtype RUN, most profitable first; ``zeros`` (dtype SPAN) are runs of zero pages;
    ``refused`` counts pages per reason; ``saved_pages`` is what the merges and zeros would give
    back, in pages, and ``cost_bytes`` what the kernel and we would spend on them.
    """

    extents: tuple[ExtentPlan, ...] = ()
    merges: NDArray[np.void] = field(default_factory=lambda: np.empty(0, RUN))
    zeros: NDArray[np.void] = field(default_factory=lambda: np.empty(0, SPAN))
    refused: Counter[Reason] = field(default_factory=Counter)
    saved_pages: int = 0
    cost_bytes: int = 0
