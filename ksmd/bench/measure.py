"""One run: a contender, fresh victims, and everything that is asked of them, in a fixed order.

Order matters. Frames are counted before contents are read (which maps zero pages), rescans before
anything is written by us, and the write that costs CoW is also the 1 % that the next rescan finds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ksmd.bench import census
from ksmd.bench.clocks import cpu_of_all
from ksmd.bench.contender import Contender, no_change, pids_of
from ksmd.bench.model import Point, Run
from ksmd.bench.victims import Victim
from ksmd.core.layout import VMA_BYTES
from ksmd.model.errors import KsmdError

_POLL_SECONDS = 0.01
_LIMIT_SECONDS = 600.0
_READS = 1_000_000
_WRITTEN_PART = 100


class Watch:
    """Time and CPU since :meth:`begin`: the contender's own and the victims'."""

    def __init__(self, contender: Contender, victims: Sequence[Victim]) -> None:
        self._contender = contender
        self._pids = pids_of(victims)
        self._began = self._cpu = self._victims = 0.0
        self.timeline: list[Point] = []

    def begin(self) -> None:
        """Set everything to zero."""
        self._cpu = self.cpu()
        self._victims = cpu_of_all(self._pids)
        self._began = time.perf_counter()

    def cpu(self) -> float:
        """CPU seconds of both, so far."""
        return self._contender.cpu() + cpu_of_all(self._pids)

    def victims_cpu(self) -> float:
        """The victims' own part since the beginning."""
        return cpu_of_all(self._pids) - self._victims

    def stamp(self) -> Point:
        """Now."""
        seconds = time.perf_counter() - self._began
        return Point(seconds, self.cpu() - self._cpu, self._contender.saved())

    def until_settled(self) -> Point:
        """Look on until the contender is done; the last moment."""
        while True:
            settled = self._contender.settled()
            self.timeline.append(self.stamp())
            if settled:
                return self.timeline[-1]
            if self.timeline[-1].seconds > _LIMIT_SECONDS:
                raise KsmdError(f"{self._contender.name} does not settle")
            time.sleep(_POLL_SECONDS)


def timed_run(make: Callable[[Sequence[Victim]], Contender], victims: Sequence[Victim]) -> Run:
    """Merge, and measure everything but pauses."""
    sums = _contents(victims)
    possible = census.possible(sums, census.zero_content())
    before = census.kernel_memory(victims)
    huge = census.huge_bytes(victims)
    reads = _reads(victims[0])
    with make(victims) as contender:
        watch = Watch(contender, victims)
        watch.begin()
        contender.start(watch.stamp)
        end = watch.until_settled()
        in_windows = watch.victims_cpu()
        entries = census.entries(victims)
        after = census.kernel_memory(victims)
        huge_after = census.huge_bytes(victims)
        reads_after = _reads(victims[0])
        report = contender.report(entries)
        idle = contender.rescan(no_change, watch.cpu)
        intact = bool(np.array_equal(sums, census.contents(victims)))
        writer = _Writer(victims)
        written = contender.rescan(writer.write, watch.cpu)
        passes = tuple(contender.passes())
    costs = replace(
        report.costs,
        vmas=max(0, after.vmas - before.vmas) * VMA_BYTES,
        page_tables=after.page_tables - before.page_tables,
    )
    return Run(
        pages=len(sums),
        possible=possible,
        timeline=tuple(watch.timeline),
        passes=passes,
        end=end,
        saved=len(sums) - census.frames(entries),
        costs=costs,
        rescan_idle=idle,
        rescan_written=written,
        written=writer.pages,
        read_before=reads,
        read_after=reads_after,
        write_ns=writer.ns,
        huge_before=huge,
        huge_after=huge_after,
        intact=intact,
        details=report.details | {"victims_cpu": in_windows, "vmas": after.vmas - before.vmas},
    )


def _contents(victims: Sequence[Victim]) -> NDArray[np.uint64]:
    """Read what the victims hold, twice.

    When a page is read by somebody else for the second time, the kernel moves it to its active
    list, once in its life: that is not to fall upon the contender who reads.
    """
    sums = census.contents(victims)
    if not np.array_equal(sums, census.contents(victims)):
        raise KsmdError("the victims' memory changes before anybody has touched it")
    return sums


def pauses(
    make: Callable[[Sequence[Victim]], Contender], victims: Sequence[Victim], spinning: int
) -> tuple[list[int], list[int]]:
    """Merge while some victims watch the clock: (pauses before, pauses during), nanoseconds."""
    watchers = victims[:spinning]
    with make(victims) as contender:
        for victim in watchers:
            victim.ask("spin")
        time.sleep(0.5)
        quiet = _still(watchers)
        for victim in watchers:
            victim.ask("spin")
        watch = Watch(contender, victims)
        watch.begin()
        contender.start(watch.stamp)
        watch.until_settled()
        during = _still(watchers)
    return quiet, during


def _still(victims: Sequence[Victim]) -> list[int]:
    found: list[int] = []
    for victim in victims:
        text = victim.ask("still")["pauses"]
        found += map(int, filter(None, text.split(",")))
    return found


def _reads(victim: Victim) -> float | None:
    victim.ask(f"read {_READS // 10}")
    answer = victim.ask(f"read {_READS}")
    return float(answer["ns"]) if "ns" in answer else None


class _Writer:
    """Writes one word in 1 % of every victim's pages; ``ns`` for each page, CoW included."""

    def __init__(self, victims: Sequence[Victim]) -> None:
        self._victims = victims
        self.pages = 0
        self.ns = 0.0

    def write(self) -> None:
        """Do it."""
        spent = 0.0
        for number, victim in enumerate(self._victims):
            count = max(1, victim.npages // _WRITTEN_PART)
            answer = victim.ask(f"write {count} {number + 1}")
            self.pages += int(answer["pages"])
            spent += float(answer["ns"]) * int(answer["pages"])
        self.ns = spent / self.pages
