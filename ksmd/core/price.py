"""How long a stop window will take: learned from those before it, so that none takes too long.

A window takes a time of its own, whatever it does (stopping, infecting, curing), and so much for
each run and each page. In what proportion runs and pages count was measured once; how much of it
all differs between machines and targets (mappings, huge pages, noisy neighbours) and follows from
what the last windows took; of a target that has had few yet, from those of all: so targets that
have their first windows together learn together. The two are learned apart: if a window's own time
were taken for the price of its records, windows would grow shorter, and their own time weigh the
more.
"""

from __future__ import annotations

from copy import copy

import numpy as np
from numpy.typing import NDArray

from ksmd.model.units import PAGE_SHIFT
from ksmd.model.window import Op

#: Microseconds of a window that does nothing, of a run, and of a page; by operation.
_EMPTY = 500.0
_RUN = {Op.MERGE: 13.0, Op.ZERO: 2.0, Op.UNMERGE: 10.0, Op.REMERGE: 13.0}
_PAGE = {Op.MERGE: 1.2, Op.ZERO: 0.6, Op.UNMERGE: 2.0, Op.REMERGE: 1.2}
#: The part of the budget that is planned for, at first and within what bounds: single windows take
#: longer than their kind, on some machines more than on others. Where a window's own time is more
#: than half of its budget, to aim much lower would make twice as many of them, to little use.
_AIM, _LEAST_AIM, _MOST_AIM = 0.65, 0.6, 0.75
#: One window in so many may take longer than the budget, and by how much one that does lowers the
#: aim; so many that do not raise it again.
_MAY_MISS, _MISSED = 100, 0.02
#: A slow window counts for more than a fast one: too short costs time, too long breaks a promise.
#: But not for much more, since one is slow for reasons that the next one does not have.
_UP, _DOWN = 0.3, 0.15
#: What is learned of records stays within these; it begins in between, since slow machines exist.
_LEAST, _FIRST, _MOST = 0.2, 1.5, 3.0
#: The records' part is never less than this, for each microsecond of the window's own: a target
#: whose stops take long whatever they do (tens of thousands of mappings) would else be stopped
#: without end.
_WORTH = 0.5
#: A target that has had so many windows is known by itself.
_FEW = 8
#: Shorter windows say more about the machine's noise than about their records.
_TELLING = 200.0


class Aim:
    """What part of their budget windows are planned to take, for 99 of 100 to keep to it."""

    def __init__(self) -> None:
        self.part = _AIM

    def learn(self, micros: float, stop_ms: float) -> None:
        """Take in what a window took, and what it was to take at the most."""
        step = -_MISSED if micros > stop_ms * 1000 else _MISSED / (_MAY_MISS - 1)
        self.part = min(_MOST_AIM, max(_LEAST_AIM, self.part + step))


class WindowPrice:
    """The price of windows of one kind, in microseconds: of one target, or of all."""

    def __init__(self, op: Op, aim: Aim | None = None) -> None:
        self._aim = aim or Aim()
        self._run, self._page = _RUN[op], _PAGE[op]
        self._scale = _FIRST
        self._own = _EMPTY
        self._windows = 0  # that it has learned from

    def copy(self) -> WindowPrice:
        """Give one that knows the same, and learns by itself, but for the aim, which they share."""
        made = copy(self)
        made._windows = 0
        return made

    def of(self, records: NDArray[np.void]) -> NDArray[np.float64]:
        """Return what each record (dtype RECORD) takes, in parts that :meth:`room` is made of."""
        pages = (records["length"] >> np.uint64(PAGE_SHIFT)).astype(np.float64)
        return self._run + self._page * pages

    def pages(self, room: float) -> int:
        """Give how many pages of one run a part of :meth:`room` is enough for."""
        return max(0, int((room - self._run) / self._page))

    def room(self, stop_ms: float) -> float:
        """Give how much a window may hold so as to end within *stop_ms*. It may always hold one."""
        aim = stop_ms * 1000 * self._aim.part
        return max(aim - self._own, self._own * _WORTH) / self._scale

    def learn(
        self,
        records: NDArray[np.void],
        micros: float,
        at_work: float,
        usual: WindowPrice | None = None,
    ) -> None:
        """Take in a window with *records*: it took *micros* in all, *at_work* on the records.

        *usual* is what is known of others. A target that has had few windows knows no better.
        """
        self._windows += 1
        if usual is not None and self._windows <= _FEW:
            self._scale, self._own = usual._scale, usual._own
        self._own = _nearer(self._own, max(0.0, micros - at_work))
        npages = int(records["length"].sum()) >> PAGE_SHIFT
        expected = self._run * len(records) + self._page * npages
        if expected >= _TELLING:
            found = min(_MOST, max(_LEAST, at_work / expected))
            self._scale = _nearer(self._scale, found)


def _nearer(known: float, found: float) -> float:
    return known + (found - known) * (_UP if found > known else _DOWN)


def all_prices(aim: Aim) -> dict[Op, WindowPrice]:
    """Return the prices of which nothing is known yet."""
    return {op: WindowPrice(op, aim) for op in Op}
