"""How long to wait for a process of ours: what it spends in line for a processor is not its fault.

On a host that is short of processors a pager may take ten seconds to load. Were it taken for one
that hangs, and ended, the next one would stand in the same line, and everybody's memory would wait.
So time counts only while it runs or sleeps: /proc/PID/schedstat tells how long it was ready to run
and did not (where the kernel keeps no such account, all time counts).
"""

from __future__ import annotations

import socket
import time
from typing import Any

from ksmd.kernel import channel, procfs
from ksmd.model.errors import KsmdError

#: How often a process is looked at that has not had a turn yet, in seconds.
_AGAIN = 1.0
#: After this part of its time it is looked at first: whoever answers sooner costs us nothing.
_FIRST = 0.1


class Patience:
    """*seconds* for something that the processes *pids* do, one for another; 0 stands for none."""

    def __init__(self, seconds: float, *pids: int) -> None:
        self.seconds = seconds
        self._pids = pids
        self._began = time.monotonic()
        self._seen: dict[int, tuple[float, int]] = {}

    def left(self) -> float:
        """Give the seconds that are left, 0 when they have had their time."""
        waited, no_turn = 0.0, False
        for pid in filter(None, self._pids):
            now, turns = _line(pid)
            before, had = self._seen.setdefault(pid, (now, -1))
            waited += max(0.0, now - before)
            if had < 0:
                self._seen[pid] = now, turns
            else:  # what it waits for now is added when it comes to run
                no_turn |= had == turns and _is_ready(pid)
        left = self._began + self.seconds + waited - time.monotonic()
        return max(left, _AGAIN if no_turn else 0.0)

    @property
    def _first(self) -> float:
        return self.left() if self._seen else self.seconds * _FIRST

    def receive(self, end: socket.socket) -> tuple[dict[str, Any], bytes, list[int]]:
        """Receive one message of theirs; TimeoutError, PeerGoneError."""
        left = self._first
        while True:
            end.settimeout(max(0.001, left))
            try:
                return channel.receive(end)
            except TimeoutError:
                if not (left := self.left()):
                    raise

    def send(
        self,
        end: socket.socket,
        header: dict[str, Any],
        payload: bytes = b"",
        fds: tuple[int, ...] = (),
    ) -> None:
        """Send one message to them; TimeoutError while they take none, PeerGoneError."""
        left = self._first
        while True:
            end.settimeout(max(0.001, left))
            try:
                channel.send(end, header, payload, fds)
                return
            except TimeoutError:
                if not (left := self.left()):
                    raise


def _line(pid: int) -> tuple[float, int]:
    """Give the seconds that a process has stood in line, and how often it came to run."""
    try:
        _, waited, turns = procfs.read_process(pid, "schedstat").split()
        return int(waited) / 1e9, int(turns)
    except (KsmdError, ValueError):
        return 0.0, 0


def _is_ready(pid: int) -> bool:
    try:
        return procfs.status_fields(pid)["State"].startswith("R")
    except (KsmdError, KeyError):
        return False
