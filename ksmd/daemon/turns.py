"""Work beside the main work: what callers asked for with scanners, and giving regions back.

The loop's jobs run one after the other, and the background scan gives way to them. That is right
for what an operator asks for, and wrong for what any user may ask for: one caller's work would hold
up the others', and a steady stream of it would never let the background scan come to an end. So
such work takes turns: of everything that is due, one step at a time, urgent work first, and the
main work goes on in between.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ksmd.model.errors import KsmdError

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Turn:
    """One piece of work. ``steps`` yields seconds to wait (floats), and its result at the end.

    ``wanted`` is asked before each step; work that nobody wants any more is given up.
    """

    name: str
    steps: Iterator[Any]
    on_result: Callable[[Any], None]
    on_error: Callable[[KsmdError], None]
    wanted: Callable[[], bool] = lambda: True
    due: float = 0.0


class Turns:
    """All work that takes turns."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._urgent: deque[Turn] = deque()
        self._ordinary: deque[Turn] = deque()

    def __len__(self) -> int:
        return len(self._urgent) + len(self._ordinary)

    def add(self, turn: Turn, *, urgent: bool = False) -> None:
        """Take *turn* up; its first step comes with the loop's next round."""
        (self._urgent if urgent else self._ordinary).append(turn)

    def due(self) -> float:
        """When the next step is due, on the clock; infinity when there is no work."""
        return min((turn.due for turn in (*self._urgent, *self._ordinary)), default=float("inf"))

    def step(self) -> None:
        """Do one step of the work that is due and has waited longest, if there is any."""
        now = self._clock()
        for queue in (self._urgent, self._ordinary):
            turn = next((turn for turn in queue if turn.due <= now), None)
            if turn is not None:
                queue.remove(turn)
                if self._advance(turn):
                    queue.append(turn)
                return

    def give_up(self, why: KsmdError) -> None:
        """End all work with *why*."""
        for queue in (self._urgent, self._ordinary):
            while queue:
                turn = queue.popleft()
                _close(turn.steps)
                turn.on_error(why)

    def _advance(self, turn: Turn) -> bool:
        """Do one step; whether there is more to come."""
        if not turn.wanted():
            _close(turn.steps)
            return False
        try:
            step = next(turn.steps)
        except StopIteration:
            return False
        except KsmdError as error:
            turn.on_error(error)
            return False
        except Exception:
            # The last line of defence, as for calls: what a user's memory looks like must not be
            # able to end the daemon, whose targets it guards.
            log.exception("%s failed", turn.name)
            turn.on_error(KsmdError(f"{turn.name} failed in a way that ksmd did not expect"))
            return False
        if isinstance(step, float):
            turn.due = self._clock() + step
        else:
            turn.on_result(step)
        return True


def _close(steps: Iterator[Any]) -> None:
    """Run a generator's clean-up now, as it may hold what others wait for."""
    close = getattr(steps, "close", None)
    if close is not None:
        close()
