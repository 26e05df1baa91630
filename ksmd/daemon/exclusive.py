"""One plan at a time: two that are carried out in turns would each prepare what the other merges.

Work in this daemon is generators that one thread advances in turns. This is their lock.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

_PAUSE_SECS = 0.005

Step = TypeVar("Step")


class Exclusive:
    """Held by one generator at a time; closing the generator lets it go.

    ``waiting``: how many others wait for it.
    """

    def __init__(self) -> None:
        self.taken = False
        self.waiting = 0

    def holding(self, steps: Iterator[Step]) -> Iterator[Step | float]:
        """Give *steps*, after seconds to wait (floats) for as long as others have it."""
        self.waiting += 1
        try:
            while self.taken:
                yield _PAUSE_SECS
        finally:
            self.waiting -= 1
        self.taken = True
        try:
            yield from steps
        finally:
            self.taken = False
