"""Real programs under test: everything of theirs, and of what they start, is merged without end.

A crowd is selected by pid alone: the processes that the test has started, and their descendants as
they come and go. The settings file is written anew and read again before every scan.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
from harness import CROWDED, PATIENCE, Daemon
from stirring import Stirrer

from ksmd.client import Client

#: A fork bomb has more processes than a settings file may name, and reading them all takes longer
#: than the round: the ones nearest to what the test has started will do.
_MOST_PIDS = 100
#: Seconds of work for each program: a short round, or what tests/programs --long asks for.
SHORT_SECONDS = 3.0
SECONDS = float(os.environ.get("KSMD_PROGRAM_SECONDS", SHORT_SECONDS))


def need(*programs: str) -> None:
    """Skip (a failure where KSMD_REQUIRE_ROOT=1) without these programs or files."""
    for program in programs:
        if shutil.which(program) is None and not Path(program).exists():
            pytest.skip(f"needs {program}: run tests/programs")


class Crowd:
    """Processes that are merged while the ``with`` block lasts: *least* pages in all, or it fails.

    ``breaths``: every other scan finds them standing still (SIGSTOP), for programs that change all
    their memory all the time. Otherwise next to nothing of theirs is the same in two reads.
    """

    def __init__(
        self, start_daemon: Callable[..., Daemon], least: int, *, breaths: bool = False
    ) -> None:
        self._least = least
        self._breaths = breaths
        self._holding = threading.Lock()
        self._held: list[int] = []  # pidfds
        self._started = time.monotonic()
        self._turn = 0
        self._roots: list[subprocess.Popen[str]] = []
        self._adopted: list[int] = []
        self._chosen: list[int] = []
        self.daemon = start_daemon(_settings([]))
        self.stirrer = Stirrer(self.daemon, lambda: self._chosen, least, self._around)

    def start(self, *command: str | Path, **options: Any) -> subprocess.Popen[str]:
        """Start a program, in a session of its own; its output is one text.

        Without address space randomization, so that its twin's pages are the more like its own.
        """
        defaults: dict[str, Any] = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
            "text": True,
            "start_new_session": True,
        }
        self._roots.append(subprocess.Popen(["setarch", "-R", *command], **(defaults | options)))
        return self._roots[-1]

    def run(self, *command: str | Path, patience: float = PATIENCE, **options: Any) -> str:
        """Run a program to its end, which must be a good one: its output."""
        process = self.start(*command, **options)
        said, _ = process.communicate(timeout=SECONDS + patience)
        assert process.returncode == 0, f"{command}: exit code {process.returncode}: {said}"
        return said

    def adopt(self, *pids: int) -> None:
        """Count processes in that the test has started by other means, and ends itself."""
        self._adopted += pids

    def pids(self, most: int = sys.maxsize) -> list[int]:
        """List what runs of all that was started, and their descendants, parents first."""
        found: list[int] = []
        waiting = deque(root.pid for root in self._roots if root.poll() is None)
        while waiting and len(found) < most:
            pid = waiting.popleft()
            found.append(pid)
            with contextlib.suppress(OSError):
                for task in Path(f"/proc/{pid}/task").iterdir():
                    waiting += map(int, (task / "children").read_text().split())
        return found

    @contextlib.contextmanager
    def _around(self, client: Client) -> Iterator[None]:
        self._choose(client)
        self._turn += 1
        if self._turn % 2:
            self._hold()
        try:
            yield
        finally:
            self._let_breathe()

    def _hold(self) -> None:
        """Stop the processes, if they are to be held at all."""
        with self._holding:
            for pid in self._chosen if self._breaths else ():
                with contextlib.suppress(ProcessLookupError):
                    self._held.append(os.pidfd_open(pid))
                    signal.pidfd_send_signal(self._held[-1], signal.SIGSTOP)

    def _let_breathe(self) -> None:
        with self._holding:
            _let_go(self._held, signal.SIGCONT)
            self._held = []

    def _choose(self, client: Client) -> None:
        pids = sorted([*self._adopted, *self.pids(_MOST_PIDS)])
        if pids != self._chosen:
            self._chosen = pids
            self.daemon.configure(_settings(pids))
            client.call("Reload")

    def enough(self) -> bool:
        """Tell whether the round may end: its time is over, and enough has been merged.

        What falls short for too long ends as well, and fails.
        """
        assert self.stirrer.error is None, f"{self.stirrer.error!r}: {self.daemon.log()}"
        passed = time.monotonic() - self._started
        merged = self.stirrer.figures.merged >= self._least
        return passed > SECONDS and (merged or passed > 3 * SECONDS + PATIENCE)

    def rounds(self) -> Iterator[int]:
        """Count rounds, from 1, until it is enough."""
        for number in itertools.count(1):
            yield number
            if self.enough():
                break

    def work(self) -> None:
        """Let the crowd go on until it is enough."""
        while not self.enough():
            time.sleep(0.1)

    def settle(self) -> None:
        """Wait until what stands still now has been read twice, and merged."""
        for _ in range(2):
            self.stirrer.await_scan()

    def interrupt(self, process: subprocess.Popen[str]) -> str:
        """End a program by SIGINT, merged on but held no more: its output; its code must be 0."""
        self._breaths = False
        self._let_breathe()
        process.send_signal(signal.SIGINT)
        code = process.wait(PATIENCE)
        assert process.stdout is not None
        said = _said(process.stdout.fileno())
        assert code == 0, said
        return said

    def end(self, process: subprocess.Popen[str], number: int = signal.SIGTERM) -> int:
        """Ask a program to end: its exit code."""
        process.send_signal(number)
        return process.wait(PATIENCE)

    def __enter__(self) -> Crowd:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        try:
            figures = self.stirrer.stop()
            print(figures)
        finally:
            self._kill()
        if kind is None:
            assert figures.merged >= self._least, f"too little was merged: {figures}"

    def _kill(self) -> None:
        """End what is left, all found before the first ends: a dead parent's are not."""
        held = []
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                held.append(os.pidfd_open(pid))
        _let_go(held, signal.SIGKILL)
        for root in self._roots:
            root.wait(PATIENCE)
            for stream in (root.stdin, root.stdout):
                if stream is not None:
                    stream.close()


def _said(fd: int) -> str:
    """Read what a program has left in its pipe: processes of its own may hold that open still."""
    os.set_blocking(fd, False)
    said = b""
    with contextlib.suppress(BlockingIOError):
        while part := os.read(fd, 1 << 16):
            said += part
    return said.decode(errors="replace")


def _let_go(held: Sequence[int], number: int) -> None:
    """Send processes a signal, by pidfds, which are closed."""
    for fd in held:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(fd, number)
        os.close(fd)


def _settings(pids: Sequence[int]) -> Mapping[str, Any]:
    targets = [{"name": "crowd", "match": {"pid": list(pids)}, "domain": "crowd"}] if pids else []
    return {"version": 1, "targets": targets} | CROWDED
