"""How many pages to scan before each sleep, so that a full scan takes the time that is wanted.

What KSM's advisor reaches by trying, scan after scan, follows here from what was measured: a scan
of n pages in batches of p takes n / p sleeps and n times what a page costs. A new target's memory
is scanned faster at first: a burst that halves with every scan.
"""

from __future__ import annotations

from collections.abc import Set

#: The part of the estimate that the last scan makes up.
_NEWEST = 0.5
#: How much faster the first scan after a new target is.
_BURST = 8.0


class Advisor:
    """Remembers what the last scans took."""

    def __init__(self) -> None:
        self._pages = 0.0
        self._page_secs = 0.0
        self._burst = 1.0
        self._known: Set[int] = frozenset()

    def targets(self, slots: Set[int]) -> None:
        """Tell which targets the next scan has; to be called once before each."""
        new = slots - self._known
        self._known = slots
        self._burst = _BURST if new else max(1.0, self._burst / 2)

    def learn(self, pages: int, seconds: float) -> None:
        """Take in that a scan has looked at *pages*, in *seconds* besides its sleeps."""
        if not pages:
            return
        if not self._pages:
            self._pages, self._page_secs = float(pages), seconds / pages
            return
        self._pages += (pages - self._pages) * _NEWEST
        self._page_secs += (seconds / pages - self._page_secs) * _NEWEST

    def pages(
        self, *, scan_secs: float, sleep_secs: float, max_cpu: int, least: int, most: int
    ) -> int:
        """Give the size of a batch: between *least* and *most*, whatever else would be needed.

        *scan_secs*: what a full scan shall take; *sleep_secs*: what is slept after each batch;
        *max_cpu*: percent of one core that scanning may take, burst or not.
        """
        if not self._pages or not self._page_secs or not sleep_secs:
            return most
        spare = scan_secs - self._pages * self._page_secs
        wanted = self._pages * sleep_secs / spare * self._burst if spare > 0 else float(most)
        share = min(max_cpu, 99) / 100
        affordable = sleep_secs * share / (self._page_secs * (1 - share)) if share else least
        return int(max(least, min(wanted, affordable, most)))
