"""A CPU budget that is a promise: no more than so much of one core over any ten seconds.

What our processes have used is measured, not estimated from pages. After each step the next one
waits until what was used since the one before has been earned at the promised rate, so nothing is
ever saved up and no ten seconds can hold more than the rate, one step's overshoot aside; the rate
is set a little lower than promised to make room for that.
"""

from __future__ import annotations

from collections.abc import Mapping

#: What is earned of what is promised.
_MARGIN = 0.9
#: A wait is at most so long: the next step measures anew.
_LONGEST_WAIT = 10.0
#: Pages that are read in a millisecond or so, and the fewest that a step may have.
_PAGES_PER_PERCENT = 1000
_LEAST_PAGES = 512


class CpuBudget:
    """Waits for one budget; *used* below is CPU seconds by process, of its whole life."""

    def __init__(self) -> None:
        self._used: dict[int, float] = {}
        self._paid_until = 0.0

    def wait(self, percent: int, now: float, used: Mapping[int, float]) -> float:
        """Give the seconds until the next step may begin; 0.0 without a limit (*percent* 0)."""
        spent = sum(
            max(0.0, seconds - self._used.get(process, 0.0))
            for process, seconds in used.items()
            if self._used
        )
        self._used = dict(used)
        if not percent:
            self._paid_until = now
            return 0.0
        self._paid_until = max(self._paid_until, now - spent) + spent / (percent / 100 * _MARGIN)
        return min(_LONGEST_WAIT, max(0.0, self._paid_until - now))


def step_pages(pages: int, percent: int) -> int:
    """Give the pages of one step: small ones where the budget is, so that none overdraws it."""
    if not percent:
        return pages
    return min(pages, max(_LEAST_PAGES, percent * _PAGES_PER_PERCENT))
