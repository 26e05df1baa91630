"""Merge and give back without end, while something else runs: the stirrer of the long tests."""

from __future__ import annotations

import contextlib
import random
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from harness import Daemon

from ksmd.client import Client
from ksmd.model.errors import KsmdError, TargetGoneError

#: Seconds that the daemon may take for one answer before it counts as hung.
PATIENCE = 120.0


@dataclass
class Figures:
    """What a run did, to be printed and to be judged: pages, and stop windows."""

    operations: int = 0
    merged: int = 0
    unmerged: int = 0
    scans: int = 0
    windows: int = 0
    refused: Counter[str] = field(default_factory=Counter)

    def add(self, other: Figures) -> None:
        """Add another run's."""
        self.operations += other.operations
        self.merged += other.merged
        self.unmerged += other.unmerged
        self.scans += other.scans
        self.windows += other.windows
        self.refused += other.refused


class NotATargetYet(Exception):
    """The daemon does not know the process, or not any more."""


def unmerge(client: Client, pid: int) -> int:
    """Give one process its pages back: how many."""
    if pid not in {line["pid"] for line in client.call("Targets")["targets"]}:
        raise NotATargetYet
    try:
        return int(client.call("Unmerge", wait=True, pid=pid)["pages"])
    except (TargetGoneError, KsmdError) as error:
        if "no target" in str(error) or isinstance(error, TargetGoneError):
            raise NotATargetYet from error
        raise


class Stirrer:
    """Scans, merges and gives back in a thread, until told to stop.

    *pids* gives the processes that may be given back now; *around* is entered for each scan.
    """

    def __init__(
        self,
        daemon: Daemon,
        pids: Callable[[], Sequence[int]],
        seed: int,
        around: Callable[[Client], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        self.figures = Figures()
        self.error: Exception | None = None
        self._daemon = daemon
        self._pids = pids
        self._around = around
        self._random = random.Random(seed)
        self._stop = threading.Event()
        self._scanned = threading.Condition()
        self._windows: Counter[int] = Counter()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            with Client(self._daemon.socket, PATIENCE) as client:
                while not self._stop.is_set():
                    self._turn(client)
        except Exception as error:
            with self._scanned:
                self.error = error
                self._scanned.notify_all()

    def _turn(self, client: Client) -> None:
        for _ in range(self._random.randint(1, 3)):
            with self._around(client):
                merged = client.call("Scan", wait=True)["merged"]
                self._note(client.call("Status"))
            with self._scanned:
                self.figures.merged += merged
                self.figures.scans += 1
                self._scanned.notify_all()
            if self._stop.is_set():
                return
        pids = list(self._pids())
        for pid in self._random.sample(pids, self._random.randint(1, len(pids))) if pids else ():
            with contextlib.suppress(NotATargetYet):
                self.figures.unmerged += unmerge(client, pid)
        client.call("Resume")  # else what was given back by request stays so
        client.call("Pause")

    def _note(self, status: dict) -> None:
        """Keep count of targets that will be gone at the end."""
        for line in status["targets"]:
            self._windows[line["pid"]] = max(self._windows[line["pid"]], line["stops"])
        self.figures.windows = self._windows.total()
        self.figures.refused = Counter({k: n for k, n in status["refusals"].items() if n})

    def await_scan(self) -> None:
        """Wait until one more scan has ended, so that there is something merged to work on."""
        with self._scanned:
            goal = self.figures.scans + 1
            self._scanned.wait_for(lambda: self.figures.scans >= goal or self.error, PATIENCE)

    def stop(self) -> Figures:
        """Stop, and give what was done."""
        self._stop.set()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), f"the daemon hangs: {self._daemon.log()}"
        assert self.error is None, f"{self.error!r}: {self._daemon.log()}"
        return self.figures
