"""Daemon, tracer and pager are killed at random moments, alone and together, a thousand times.

They merge and give back without a pause meanwhile, and are started again as an operator would. The
victims notice a wrong byte, register, signal or timeout. KSMD_SOAK_KILLS is the number of kills,
KSMD_SOAK_SEED chooses moments and victims; figures are printed (pytest -s, or -rP).
"""

# ruff: noqa: F401, F811  (fixtures are imported by their names)

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from endurers import MODES, Endurer
from harness import CROWDED, PATIENCE, Held, settings_for, store_mappings, target, until
from test_restart import CALM, Lives, lives
from victims.manager import ServiceManager

from ksmd.client import Client
from ksmd.guard import door
from ksmd.model.errors import KsmdError

KILLS = int(os.environ.get("KSMD_SOAK_KILLS", "50"))
SEED = int(os.environ.get("KSMD_SOAK_SEED", "1"))
PAGES = 1536

pytestmark = [pytest.mark.root, pytest.mark.timeout(300 + 10 * KILLS)]

#: Who dies together. A pager of the daemon's own may not die with it: see ksmd.safety(7).
OWN = [*["tracer"] * 4, *["pager"] * 4, *["tracer pager"] * 2, "daemon", "daemon tracer"]
STANDING = [*OWN, "daemon pager", "daemon pager tracer"]


class Work:
    """Merging and giving back without end, by whatever daemon is there."""

    def __init__(self, socket: Path) -> None:
        self.rounds = 0
        self._socket = socket
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.is_set():
            with contextlib.suppress(KsmdError, OSError), Client(self._socket, PATIENCE) as ksmd:
                for method in ("Resume", "Pause", "Scan", "Unmerge"):
                    ksmd.call(method, **({"wait": True} if method in ("Scan", "Unmerge") else {}))
                self.rounds += 1
            self._over.wait(0.01)

    def end(self) -> None:
        """End it, after the round that is under way."""
        self._over.set()
        self._thread.join()


class Butcher:
    """Kills, and does what an operator or a service manager does then."""

    def __init__(
        self, lives: Lives, endurers: list[Endurer], manager: ServiceManager | None
    ) -> None:
        self._lives = lives
        self._endurers = endurers
        self._manager = manager
        self._random = random.Random(SEED)
        self.tally: Counter[str] = Counter()

    def one(self, settings: dict) -> set[str]:
        """Wait for a random moment, kill somebody, and start what has to be started."""
        whom = set(self._random.choice(STANDING if self._manager else OWN).split())
        victims = self._find(whom)
        self._await_moment()
        traced = any(endurer.traced() for endurer in self._endurers)
        for _, held in sorted(victims.items(), key=lambda _: self._random.random()):
            held.send(signal.SIGKILL)
        for held in victims.values():
            held.end()
        self.tally.update(list(victims))
        self.tally["kills"] += len(victims)
        self.tally["in a window"] += traced * len(victims)
        if "pager" in victims and self._manager:
            time.sleep(self._random.uniform(0, 0.3))
            self._manager.reap()
            self._manager.start()
        if "daemon" in victims:
            self._lives.buried()
            with self._disturbance():
                self._lives.start(settings, paused=False)
        old = victims["pager"].pid if "pager" in victims else 0
        until(lambda: self._served(old), "a pager")
        with Client(self._lives.daemon.socket, PATIENCE) as ksmd:
            ksmd.call("GetApiVersion")  # it answers when the pager has been told everything
        return set(victims)

    @contextlib.contextmanager
    def _disturbance(self) -> Iterator[None]:
        """Kill a pager that stands by itself, now and then, while a daemon starts."""
        if not self._manager or self._random.random() < 0.6:
            yield
            return
        wait = self._random.uniform(0, 2)
        thread = threading.Thread(target=self._kill_standing, args=(self._manager, wait))
        thread.start()
        yield
        thread.join()
        self.tally["kills"] += 1
        self.tally["pager"] += 1
        self.tally["during a start"] += 1

    @staticmethod
    def _kill_standing(manager: ServiceManager, wait: float) -> None:
        time.sleep(wait)
        manager.kill()
        manager.start()

    def _served(self, old: int) -> bool:
        daemon = self._lives.daemon
        assert daemon.process.poll() is None, f"the daemon ended: {daemon.log()}"
        return len(pagers := door.pagers(str(daemon.socket))) == 1 and pagers != [old]

    def _find(self, whom: set[str]) -> dict[str, Held]:
        daemon = self._lives.daemon
        found = {"daemon": daemon.pid, "pager": self._lives.pager().pid}
        found |= {name[5:]: pid for name, pid in daemon.helpers().items()}
        held = {}
        for name in whom & set(found):
            with contextlib.suppress(ProcessLookupError):
                held[name] = Held(found[name])
        return held

    def _await_moment(self) -> None:
        """Half of them fall at any time, half are aimed at a stop window and soon after."""
        if self._random.random() < 0.5:
            time.sleep(self._random.uniform(0, 0.8))
            return
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline and not any(e.traced() for e in self._endurers):
            time.sleep(0.0002)
        time.sleep(self._random.uniform(0, 0.004))


@pytest.fixture
def endurers() -> Iterator[list[Endurer]]:
    """Half a dozen, two of which fork and drop pages."""
    others = [mode for mode in MODES if mode not in ("fork", "drop")]
    chosen = ["fork", "drop", *random.Random(SEED).sample(others, 4)]
    started: list[Endurer] = []
    try:
        started.extend(Endurer(mode, PAGES) for mode in chosen)
        yield started
    finally:
        for endurer in started:
            endurer.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[ServiceManager]:
    manager = ServiceManager(tmp_path, str(tmp_path / "ksmd.sock"))
    manager.start()
    yield manager
    manager.close()


def _endure(lives: Lives, endurers: list[Endurer], manager: ServiceManager | None) -> None:
    settings = settings_for(*endurers) | CROWDED | CALM
    settings["targets"] = [target(endurer, regions=None) for endurer in endurers]
    daemon = lives.start(settings, paused=False)
    butcher = Butcher(lives, endurers, manager)
    work = Work(daemon.socket)
    eintr = {endurer.pid: 0 for endurer in endurers}
    merged, began = 0, time.monotonic()
    try:
        while butcher.tally["kills"] < KILLS:
            killed = butcher.one(settings)
            for endurer in endurers:
                endurer.must_be_well()
                now = endurer.word(Endurer.EINTRS)
                assert now == eintr[endurer.pid] or "tracer" in killed, f"{endurer.mode}: EINTR"
                eintr[endurer.pid] = now
            merged += any(store_mappings(endurer.pid) for endurer in endurers)
    finally:
        work.end()
        tally = dict(butcher.tally)
        print(
            f"\n{tally} in {time.monotonic() - began:.0f} s, {work.rounds} rounds; EINTR"
            f" {sum(eintr.values())}; merged after {merged}; longest stall {_stall(endurers)}"
        )
        for endurer in endurers:
            print(
                f"{endurer.mode}: rounds {endurer.word(Endurer.ROUNDS)} wrong"
                f" {endurer.word(Endurer.WRONG)} EINTR {eintr[endurer.pid]}"
                f" stall {_stall([endurer])}"
            )
    assert merged, "the kills proved nothing"
    daemon = lives.daemon
    until(lambda: not daemon.run_ctl("unmerge", "--wait").returncode, "all is given back")
    assert [store_mappings(endurer.pid) for endurer in endurers] == [[]] * len(endurers)
    assert lives.stop() == 0
    for endurer in endurers:
        endurer.must_be_well()
        endurer.must_be_clean()


def _stall(endurers: list[Endurer]) -> str:
    """Tell of the longest stall: how much of it was standing in line for a processor."""
    worst = max(endurers, key=lambda endurer: endurer.stall)
    return f"{worst.stall * 1000:.0f} ms, {worst.starved * 1000:.0f} of them in line"


def test_whoever_is_killed_at_any_moment_no_target_notices(lives, endurers):
    _endure(lives, endurers, None)


def test_whoever_is_killed_at_any_moment_beside_a_standing_pager_no_target_notices(
    manager, lives, endurers
):
    _endure(lives, endurers, manager)
