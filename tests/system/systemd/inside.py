"""What the tests look at inside the machine: targets, and ksmd as a service."""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import time
from collections.abc import Iterator
from typing import Any

from machine import PATIENCE, Machine

from ksmd.client import Client

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
def as_shipped(machine: Machine) -> Iterator[Service]:
    """Give the service without drop-ins; one that a test gave other settings is stopped then."""
    made = Service(machine)
    made.settings(SETTINGS)
    machine.run("systemctl", "reset-failed")
    machine.run("systemctl", "start", "ksmd.socket")
    yield made
    if not machine.running:
        return
    print(made.journal("--unit=ksmd", "--unit=ksmd-pager", "--lines=80"))
    if made.changed:
        machine.run("systemctl", "stop", "ksmd.service", check=False)
        made.tidy()
