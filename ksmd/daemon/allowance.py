"""How much of the daemon's time each user may take: nobody's calls hold up everybody else's.

The daemon is one thread. What a call costs depends on the caller's memory and on how well its
processes can be stopped, so not calls or pages are counted but the time that was spent on them.
Each user has a store of seconds that fills slowly up to a limit; work is charged when it is done,
and further work waits until the store is above zero again. Root is never held back.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

#: Seconds of the daemon's time that a user who asked for nothing lately may take at once, and the
#: share of the time that follows that may go to one user.
BURST_SECS = 5.0
SHARE = 0.25
#: Waits end early enough for an answer to come when it can.
_LONGEST_WAIT = 1.0
_MOST_USERS = 1024

Step = TypeVar("Step")


class Allowance:
    """Seconds left to each user. ``clock`` is monotonic, in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._levels: dict[int, tuple[float, float]] = {}  # by uid: seconds left, as of when

    def left(self, uid: int) -> float:
        """Seconds of work that *uid* may still ask for; zero or less: none for now."""
        if uid == 0:
            return BURST_SECS
        level, since = self._levels.get(uid, (BURST_SECS, 0.0))
        return min(BURST_SECS, level + (self._clock() - since) * SHARE)

    def wait(self, uid: int) -> float:
        """Seconds until *uid* may ask for more, at most one at a time; 0.0: now."""
        left = self.left(uid)
        return 0.0 if left > 0 else min(_LONGEST_WAIT, max(0.01, -left / SHARE))

    def charge(self, uid: int, seconds: float) -> None:
        """Take *seconds* from what *uid* has, below zero if need be."""
        if uid == 0:
            return
        level = self.left(uid) - seconds
        self._levels.pop(uid, None)  # the users of the dict stand in the order of their last charge
        self._levels[uid] = (level, self._clock())
        if len(self._levels) > _MOST_USERS:
            self._forget_full()

    @contextlib.contextmanager
    def charged(self, uid: int) -> Iterator[None]:
        """Charge *uid* for the time that the block takes."""
        begun = self._clock()
        try:
            yield
        finally:
            self.charge(uid, self._clock() - begun)

    def charging(self, uid: int, steps: Iterator[Step]) -> Iterator[Step]:
        """Give the steps of a generator, each charged to *uid*, none of them delayed."""
        while True:
            with self.charged(uid):
                try:
                    step = next(steps)
                except StopIteration:
                    return
            yield step

    def pacing(self, uid: int, steps: Iterator[Step]) -> Iterator[Step | float]:
        """Give the steps of a generator as :meth:`charging` does, and waits while *uid* has none.

        For work that holds nothing which others wait for.
        """
        for step in self.charging(uid, steps):
            yield step
            while (pause := self.wait(uid)) > 0:
                yield pause

    def _forget_full(self) -> None:
        """Drop users whose store is full again; they are as if they had never asked."""
        full = [uid for uid in self._levels if self.left(uid) >= BURST_SECS]
        for uid in full:
            del self._levels[uid]
