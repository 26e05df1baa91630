"""How long to wait for a process of ours: what it spends in line for a processor is not its fault.

On a host that is short of processors a pager may take ten seconds to load. Were it taken for one
that hangs, and ended, the next one would stand in the same line, and everybody's memory would wait.
So time counts only while it runs or sleeps: /proc/PID/schedstat tells how long it was ready to run
and did not (where the kernel keeps no such account, all time counts).
"""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from typing import Any

from ksmd.kernel import channel, procfs
from ksmd.model.errors import KsmdError

#: How often a process is looked at, in seconds: what it waits for is known when it has run again.
_AGAIN = 1.0
#: After this part of its time it is looked at first: whoever answers sooner costs us nothing.
_FIRST = 0.1


@dataclass(slots=True)
class _Line:
    """What was seen of one process, in seconds; ``since``: from then on it was ready, but ran not.

    ``first``: what it had waited when it was seen first.
    """

    first: float
    waited: float = 0.0
    ran: float = -1.0
    since: float = 0.0

    def look(self, waited: float, ran: float, ready: bool, now: float) -> float:
        """Take in what it has waited and run so far; give the seconds that it stands in line now.

        They are not in what it has waited before it runs again.
        """
        if ran != self.ran or not ready:
            self.since = now
        self.ran = ran
        self.waited = max(self.waited, waited - self.first)
        return now - self.since


class Patience:
    """*seconds* for something that the processes *pids* do, one for another; 0 stands for none.

    So do the children that they have.
    """

    def __init__(self, seconds: float, *pids: int) -> None:
        self.seconds = seconds
        self._pids = [pid for pid in pids if pid]
        self._began = time.monotonic()
        self._lines: dict[int, _Line] = {}

    def left(self) -> float:
        """Give the seconds that are left, 0 when they have had their time."""
        now, in_line = time.monotonic(), 0.0
        children = [child for pid in self._pids for child in procfs.children(pid)]
        for pid in [*self._pids, *children]:
            ran, waited = (spent / 1e9 for spent in procfs.schedstat(pid))
            line = self._lines.setdefault(pid, _Line(waited))
            in_line += line.look(waited, ran, _is_ready(pid), now)
        spared = in_line + sum(line.waited for line in self._lines.values())
        return max(0.0, self._began + self.seconds + spared - now)

    @property
    def _next(self) -> float:
        """Give the seconds until they are looked at (again)."""
        return min(self.left(), _AGAIN) if self._lines else self.seconds * _FIRST

    def receive(self, end: socket.socket) -> tuple[dict[str, Any], bytes, list[int]]:
        """Receive one message of theirs; TimeoutError, PeerGoneError."""
        while True:
            end.settimeout(max(0.001, self._next))
            try:
                return channel.receive(end)
            except TimeoutError:
                if not self.left():
                    raise

    def send(
        self,
        end: socket.socket,
        header: dict[str, Any],
        payload: bytes = b"",
        fds: tuple[int, ...] = (),
    ) -> None:
        """Send one message to them; TimeoutError while they take none, PeerGoneError."""
        while True:
            end.settimeout(max(0.001, self._next))
            try:
                channel.send(end, header, payload, fds)
                return
            except TimeoutError:
                if not self.left():
                    raise


def _is_ready(pid: int) -> bool:
    try:
        return procfs.task_stat(pid, pid).state == "R"
    except KsmdError:
        return False
