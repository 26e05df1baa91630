"""What the tests look at inside the machine: targets, and ksmd as a service."""

from __future__ import annotations

import contextlib
import itertools
import json
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from machine import PATIENCE, Machine, until

from ksmd.client import Client

HERE = Path(__file__).parent
PAGES = 1024
SETTINGS = """\
version: 1
targets:
  - name: victims
    match: {cmdline: 'victim\\.py', user: nobody}
    domain: victims
"""


class Target:
    """A victim inside the machine: a service of its own, run by nobody."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        service = ("systemd-run", "--quiet", "--pipe", "--collect", "--property=User=nobody")
        python = ("/opt/ksmd/bin/python", "-I", "/run/test/victim.py", PAGES)
        self._process = machine.start(
            [*service, *python], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        self.pid, self.address = map(int, self._process.stdout.readline().split())
        #: Numbers of pages that nobody has dropped: one that was dropped is guarded no more.
        self.fresh = itertools.count(100)

    def ask(self, line: str) -> str:
        """Have it do something: its answer."""
        self.order(line)
        return self.answer()

    def order(self, line: str) -> None:
        """Have it do something."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def has_answered(self) -> bool:
        """Whether the answer to an order is there."""
        assert self._process.stdout is not None
        return bool(select.select([self._process.stdout], [], [], 0)[0])

    def answer(self) -> str:
        """Wait for the answer to an order."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def store_pages(self) -> int:
        """Count the pages that show the store, as the machine's /proc says."""
        lines = self._machine.run("cat", f"/proc/{self.pid}/maps").splitlines()
        ranges = [line.split()[0].split("-") for line in lines if "/memfd:ksmd-" in line]
        return sum(int(end, 16) - int(start, 16) for start, end in ranges) >> 12

    def end(self) -> None:
        """End it by closing its input."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait(10)


Pair = tuple[Target, Target]


def answers(pair: Pair, order: str) -> list[str]:
    """Have both do something: their answers."""
    return [one.ask(order) for one in pair]


def right(pair: Pair) -> bool:
    """Whether every byte of both is what they wrote."""
    return answers(pair, "check") == ["right", "right"]


def merged(pair: Pair) -> bool:
    """Whether both show the store."""
    return all(one.store_pages() >= 0.9 * PAGES for one in pair)


def given_back(pair: Pair) -> bool:
    """Whether all their memory is their own again."""
    return [one.store_pages() for one in pair] == [0, 0] and right(pair)


def dropped(pair: Pair) -> list[str]:
    """What a page reads as that both have just dropped; it was merged if all was."""
    return answers(pair, f"drop {next(pair[0].fresh)}")


def guarded(pair: Pair) -> bool:
    """Whether dropped memory reads as zeros, as it would without us."""
    return dropped(pair) == ["0", "0"] and right(pair)


class Service:
    """ksmd.service inside the machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._dropped_in: set[str] = set()
        self._settings = ""
        self._since = f"@{time.time():.6f}"

    @property
    def main_pid(self) -> int:
        return int(self.machine.show("ksmd.service", "MainPID"))

    @property
    def state(self) -> str:
        names = ("ActiveState", "SubState", "Result")
        asked = self.machine.run(
            "systemctl", "show", f"--property={','.join(names)}", "ksmd.service"
        )
        told = dict(line.split("=", 1) for line in asked.splitlines())
        return "/".join(told[name] for name in names)

    def has_restarted(self, before: int) -> bool:
        """Whether another main process than *before* serves."""
        return self.main_pid not in (0, before) and self.state == "active/running/success"

    def ctl(self, *arguments: object) -> dict[str, Any]:
        """Run ``ksmctl --json`` as root inside, which must succeed."""
        found: dict[str, Any] = json.loads(self.machine.run("ksmctl", "--json", *arguments))
        return found

    def call(self, method: str, **parameters: object) -> dict[str, Any]:
        """Call the daemon as root, from outside: cheaper than a process for each call."""
        with Client(f"/proc/{self.machine.pid}/root/run/ksmd/ksmd.sock", PATIENCE) as client:
            return client.call(method, **parameters)

    def status(self) -> dict[str, Any]:
        """Give all counters."""
        return self.call("Status")

    def settle(self) -> dict[str, Any]:
        """Merge all there is to merge: the status then."""
        self.call("Scan", wait=True, until_settled=True)
        return self.status()

    def knows_what_is_merged(self) -> bool:
        """Wait until a daemon has in its counters what it, or the one before it, merged."""
        counted = "the merged pages in the counters"
        return bool(until(lambda: self.status()["pages_sharing"] >= 0.9 * PAGES, counted))

    def signal(self, name: str, pid: int | None = None) -> None:
        """Send a signal to the main process, or to one of its helpers."""
        self.machine.run("kill", f"-{name}", pid or self.main_pid)

    @property
    def pager_pid(self) -> int:
        return int(self.machine.show("ksmd-pager.service", "MainPID"))

    def helper(self, comm: str) -> int:
        """Give the pid of the pager, or of a helper of the main process."""
        if comm == "ksmd-pager":
            return self.pager_pid
        main = self.main_pid
        children = self.machine.run("cat", f"/proc/{main}/task/{main}/children").split()
        named = {self.machine.run("cat", f"/proc/{pid}/comm"): int(pid) for pid in children}
        return named[comm]

    def journal(self, *arguments: object) -> str:
        """Give the messages of the journal since this was made that *arguments* select."""
        since = ("--no-pager", "--quiet", "--output=cat", f"--since={self._since}")
        return self.machine.run("journalctl", *since, *arguments, check=False)

    def drop_in(self, unit: str, text: str) -> None:
        """Give a unit a drop-in, or take it away with ""."""
        folder = f"/etc/systemd/system/{unit}.d"
        if text:
            self._dropped_in.add(unit)
            (self.machine.shared / "drop-in").write_text(text)
            self.machine.run("mkdir", "-p", folder)
            self.machine.run("cp", "/run/test/drop-in", f"{folder}/test.conf")
        else:
            self._dropped_in.discard(unit)
            self.machine.run("rm", "-rf", folder)
        self.machine.run("systemctl", "daemon-reload")

    @property
    def changed(self) -> bool:
        """Whether it has a drop-in of the test, or other settings than SETTINGS."""
        return bool(self._dropped_in) or self._settings != SETTINGS

    def tidy(self) -> None:
        """Take all drop-ins and settings of the test away."""
        for unit in list(self._dropped_in):
            self.drop_in(unit, "")
        self.settings("")

    def settings(self, text: str) -> None:
        """Put a file of settings into conf.d; "" takes it away."""
        self._settings = text
        if text:
            (self.machine.shared / "settings").write_text(text)
            self.machine.run("cp", "/run/test/settings", "/etc/ksmd/conf.d/test.yaml")
        else:
            self.machine.run("rm", "-f", "/etc/ksmd/conf.d/test.yaml")


@contextlib.contextmanager
def installed(tree: Path) -> Iterator[Machine]:
    """Boot a machine with ksmd installed, its user made, and its units enabled."""
    booted = Machine(tree)
    try:
        shutil.copy(HERE / "victim.py", booted.shared)
        booted.run("systemd-sysusers")
        # every accident would wait for a second
        (booted.shared / "soon").write_text("[Service]\nRestartSec=100ms\n")
        folder = "/run/systemd/system/ksmd.service.d"
        booted.run("install", "-D", "-m644", "/run/test/soon", f"{folder}/soon.conf")
        booted.run("systemctl", "daemon-reload")
        booted.run("systemctl", "enable", "ksmd.service", "ksmd-exporter.service")
        # a machine that is busy with other tests is slow to stop a target, and tests are impatient:
        # not under test here
        slow = "s/^  deadline_ms:.*/  deadline_ms: 1000/; s/^  interval_secs:.*/  interval_secs: 1/"
        booted.run("sed", "-i", slow, "/etc/ksmd/ksmd.yaml")
        yield booted
    finally:
        booted.close()


@contextlib.contextmanager
def two_targets(machine: Machine) -> Iterator[Pair]:
    """Two victims with the same content, which end with the block."""
    pair = Target(machine), Target(machine)
    try:
        yield pair
    finally:
        for one in pair:
            one.end()


class Lasting:
    """Victims of a machine that serve from test to test, for as long as all is well with them."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._there: list[Target] = []

    def pair(self) -> Pair:
        """Give two with the same content, in which nothing is merged."""
        if any(one.ask("check") != "right" or one.store_pages() for one in self._there):
            self.end()
        while len(self._there) < 2:
            self._there.append(Target(self._machine))
        return self._there[0], self._there[1]

    def end(self) -> None:
        """End them."""
        for one in self._there:
            one.end()
        self._there.clear()


@contextlib.contextmanager
def as_shipped(machine: Machine) -> Iterator[Service]:
    """Give the service without drop-ins; one that a test gave other settings is stopped then."""
    lately = ("--unit=ksmd", "--unit=ksmd-pager", "--lines=80")
    made = Service(machine)
    made.settings(SETTINGS)
    machine.run("systemctl", "reset-failed")
    machine.run("systemctl", "start", "ksmd.socket")
    try:
        yield made
    except BaseException as error:  # of a test in a thread, whose output pytest does not show
        error.add_note(made.journal(*lately))
        raise
    finally:
        if machine.running:
            print(made.journal(*lately))
            if made.changed:
                machine.run("systemctl", "stop", "ksmd.service", check=False)
                made.tidy()


@contextlib.contextmanager
def stopped(machine: Machine) -> Iterator[Service]:
    """Give ksmd.service, enabled and not started."""
    machine.run("systemctl", "stop", "ksmd.service", check=False)
    with as_shipped(machine) as made:
        yield made


@contextlib.contextmanager
def started(machine: Machine) -> Iterator[Service]:
    """Give ksmd.service, which merges nothing that it was not asked to, and has merged nothing yet.

    It may be one that an earlier test has left running.
    """
    with as_shipped(machine) as made:
        machine.run("systemctl", "start", "ksmd-pager.service", "ksmd.service")
        made.call("Unmerge", wait=True)  # it is paused from then on
        yield made
