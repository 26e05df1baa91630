"""What both sides of the benchmark can do, so that one sequence of steps measures either."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from ksmd.bench.model import Point, Report
from ksmd.bench.victims import Victim

#: The contenders' names, as keys in the results.
OURS, THEIRS = "ksmd", "ksm"

#: A moment, as the measuring side sees it: ``Stamp()`` gives seconds, CPU seconds and pages.
Stamp = Callable[[], Point]


class Contender(Protocol):
    """Made for some victims; entering prepares and merges nothing, leaving ends what was begun."""

    name: str

    def __enter__(self) -> Self:
        """Get ready."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop whatever runs and put everything back."""

    def start(self, stamp: Stamp) -> None:
        """Begin to scan; *stamp* is for noting when passes end."""

    def settled(self) -> bool:
        """Whether nothing more is found. KsmdError when it failed."""

    def passes(self) -> Sequence[Point]:
        """When each full scan ended."""

    def saved(self) -> int:
        """Pages saved now, asked cheaply."""

    def cpu(self) -> float:
        """CPU seconds of all its own processes or threads so far."""

    def rescan(self, before: Callable[[], None], cpu: Callable[[], float]) -> float:
        """Scan again after *before* was called: growth of *cpu* per full scan."""

    def report(self, entries: NDArray[np.uint64], /) -> Report:
        """Costs and details, given the victims' pagemap entries."""


def no_change() -> None:
    """Change nothing before a rescan."""


def pids_of(victims: Sequence[Victim]) -> list[int]:
    """Give the pids of some victims."""
    return [victim.pid for victim in victims]
