"""How long a stop window will take: learned from those before it, so that none takes too long.

A window takes a fixed time, so much for each run and so much for each page. In what proportion was
measured once; how much of it all differs between machines and targets (mappings, huge pages, noisy
neighbours) and follows from what the last windows took.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ksmd.model.units import PAGE_SHIFT
from ksmd.model.window import Op

#: Microseconds of a window that does nothing, of a run, and of a page; by operation.
_EMPTY = 400.0
_RUN = {Op.MERGE: 13.0, Op.ZERO: 6.0, Op.UNMERGE: 10.0, Op.REMERGE: 13.0}
_PAGE = {Op.MERGE: 1.2, Op.ZERO: 0.8, Op.UNMERGE: 2.0, Op.REMERGE: 1.2}
#: The part of the budget that is planned for: single windows take longer than their kind.
_AIM = 0.6
#: A slow window counts at once, a fast one little: too short costs time, too long breaks a promise.
_UP, _DOWN = 0.5, 0.1
#: Windows are never cut to less than a third of their usual size: what a stop takes whatever it
#: does (a target with tens of thousands of mappings) would else be taken for the price of its
#: records, and windows would shrink until nothing came of them.
_LEAST, _MOST = 0.2, 3.0
#: Shorter windows say more about the machine's noise than about their records.
_TELLING = 200.0


class WindowPrice:
    """The price of one target's windows of one kind, in microseconds."""

    def __init__(self, op: Op) -> None:
        self._run, self._page = _RUN[op], _PAGE[op]
        self._scale = 1.0

    def of(self, records: NDArray[np.void]) -> NDArray[np.float64]:
        """Return what each record (dtype RECORD) takes, in parts that :meth:`room` is made of."""
        pages = (records["length"] >> np.uint64(PAGE_SHIFT)).astype(np.float64)
        return self._run + self._page * pages

    def room(self, stop_ms: float) -> float:
        """Give how much a window may hold so as to end within *stop_ms*. It may always hold one."""
        return max(0.0, stop_ms * 1000 * _AIM - _EMPTY) / self._scale

    def learn(self, records: NDArray[np.void], micros: float) -> None:
        """Take in that a window with *records* has taken *micros*."""
        expected = float(self.of(records).sum())
        if expected < _TELLING:
            return
        found = min(_MOST, max(_LEAST, (micros - _EMPTY) / expected))
        self._scale += (found - self._scale) * (_UP if found > self._scale else _DOWN)


def all_prices() -> dict[Op, WindowPrice]:
    """Return a new target's prices."""
    return {op: WindowPrice(op) for op in Op}
