"""Holds what the daemon does by itself to its CPU budget, by the CPU clocks of our processes."""

from __future__ import annotations

import time
from collections.abc import Iterable

from ksmd.core.budget import CpuBudget
from ksmd.kernel import procfs


class Pace:
    """One daemon's."""

    def __init__(self) -> None:
        self._budget = CpuBudget()

    def pause(self, percent: int, pids: Iterable[int]) -> float:
        """Give the seconds to wait before the next step; *pids* are our processes."""
        if not percent:
            self._budget = CpuBudget()  # what is used meanwhile is owed to nobody
            return 0.0
        used = {pid: procfs.cpu_seconds(pid) for pid in pids}
        return self._budget.wait(percent, time.monotonic(), used)
