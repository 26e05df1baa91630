"""How long a short-lived worker waits for "share this now", by the size of what it shares.

One process that holds the data stays; another comes, connects, registers the same data and shares
it: the time from its first call until the answer says what is merged, as the worker sees it. Both
are nobody's, without privileges, and numpy made their memory, huge pages and all.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from rich.table import Table

from ksmd.bench import table
from ksmd.bench.ours import COMMAND, Ksmd
from ksmd.bench.victims import Victim
from ksmd.daemon.allowance import SHARE
from ksmd.model.errors import KsmdError

#: Two processes, the store, and a reserve.
_COPIES = 4


@dataclass(frozen=True, slots=True)
class Latency:
    """What workers with *mib* MiB waited, one after the other, and how much of it was merged."""

    mib: int
    pages: int
    ms: tuple[float, ...]
    merged: tuple[int, ...]

    def as_dict(self) -> dict[str, Any]:
        """Give it ready for JSON."""
        return {
            "mib": self.mib,
            "pages": self.pages,
            "median_ms": median(self.ms),
            "ms": list(self.ms),
            "merged": list(self.merged),
        }


class OpenKsmd(Ksmd):
    """A private daemon that knows no process and lets every user in."""

    def __init__(self, command: Sequence[str] = COMMAND) -> None:
        super().__init__([], command)
        Path(self._directory.name).chmod(0o755)

    @property
    def socket(self) -> Path:
        """Where it listens."""
        return self._socket

    def _start(self) -> None:
        super()._start()
        self._configure({"version": 1, "socket_mode": "0666"})
        self._call("Reload")


def latencies(sizes: Sequence[int], rounds: int, progress: Callable[[str], None]) -> list[Latency]:
    """Measure each size, with a daemon of its own."""
    found = []
    for mib in sizes:
        needed = _COPIES * mib << 20
        if psutil.virtual_memory().available < needed:
            raise KsmdError(f"{mib} MiB need {needed >> 20} MiB of memory", "give smaller sizes")
        progress(f"share {mib} MiB, {rounds} workers")
        found.append(_latency(mib, rounds))
    return found


def _latency(mib: int, rounds: int) -> Latency:
    ms, merged = [], []
    with ExitStack() as stack:
        ksmd = stack.enter_context(OpenKsmd())
        stays = _worker(ksmd, mib, stack)
        _share(stays)
        for _ in range(rounds):
            with ExitStack() as briefly:
                comes = _worker(ksmd, mib, briefly)
                answer = _share(comes)
            ms.append(int(answer["ns"]) / 1e6)
            merged.append(int(answer["merged"]))
        return Latency(mib, stays.npages, tuple(ms), tuple(merged))


def _worker(ksmd: OpenKsmd, mib: int, stack: ExitStack) -> Victim:
    command = [sys.executable, "-P", "-m", "ksmd.bench.sharer", str(ksmd.socket), str(mib)]
    worker = Victim(command)
    stack.callback(worker.stop)
    worker.await_ready()
    return worker


def _share(worker: Victim) -> dict[str, str]:
    """Have a worker share what it holds, then rest."""
    answer = worker.ask("share")
    if answer["intact"] != "1":
        raise KsmdError(f"worker {worker.pid} holds other words than before")
    # all of them are one user's, who may take so much of the daemon's time and no more
    time.sleep(int(answer["ns"]) / 1e9 / SHARE)
    return answer


def show(found: Sequence[Latency]) -> tuple[str, Table]:
    """Make the table with its title."""
    made = table.of_columns("MiB", "median ms", "first", "fastest", "slowest", "MiB/s", "merged")
    for one in found:
        made.add_row(
            str(one.mib),
            *(f"{ms:.1f}" for ms in (median(one.ms), one.ms[0], min(one.ms), max(one.ms))),
            f"{one.mib / median(one.ms) * 1e3:.0f}",
            table.share(min(one.merged) / one.pages),
        )
    return "Milliseconds until a worker's memory is shared with one that holds the same", made
