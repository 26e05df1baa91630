"""The main loop: one thread, one selector, and work in small steps between events.

Work is a generator (:mod:`ksmd.daemon.pipeline`). What somebody asked for (scan, unmerge) runs as a
job, one after the other, and takes the place of the background scan, which starts anew afterwards.
What programs asked for takes turns with all of that (:mod:`ksmd.daemon.turns`).
Callers are heard after each step (reading some ten thousand pages, or one stop window); where they
had more time than that took, after as many as take as long.
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ksmd.daemon.control import ControlServer
from ksmd.daemon.turns import Turns
from ksmd.model.errors import KsmdError

log = logging.getLogger(__name__)

#: Pauses between background scans: short while there is work, then twice as long after each pass
#: that found nothing to do. Every so often a look, much cheaper than a pass, tells whether anything
#: has stirred; if so the pause ends.
_BUSY_PAUSE_SECS = 1.0
_IDLE_PAUSE_SECS = 20.0
_LONGEST_PAUSE_SECS = 640.0
_LOOK_SECS = 20.0
_HOUSEKEEPING_SECS = 1.0

Step = float | Any


@dataclass(slots=True)
class Job:
    """Work that somebody asked for. ``steps`` yields seconds to wait, or interim results."""

    name: str
    steps: Iterator[Step]
    on_result: Callable[[Any], None]
    on_done: Callable[[], None]
    on_error: Callable[[KsmdError], None]


class Loop:
    """Runs until :meth:`stop`. *background* makes the endless scan; *housekeep* runs every second.

    It runs between steps only: a step that hangs keeps it from running, and so from feeding the
    service manager's watchdog.

    *background* yields floats, the seconds to wait, and ends with a pass; *settled* tells whether
    that pass left anything to do, and so how soon the next one comes; *stirred* whether there is
    reason for one before its time. *pace* gives the seconds that a step has to wait at least.
    """

    def __init__(
        self,
        background: Callable[[], Iterator[float]],
        background_allowed: Callable[[], bool],
        settled: Callable[[], bool],
        stirred: Callable[[], bool],
        pace: Callable[[], float],
        housekeep: Callable[[], None],
        on_signal: Callable[[int], None],
    ) -> None:
        self._background = background
        self._allowed = background_allowed
        self._settled = settled
        self._stirred = stirred
        self._pace = pace
        self._idle = 0.0  # the last pause after a settled pass
        self._next_look = 0.0
        self._housekeep = housekeep
        self._on_signal = on_signal
        self._jobs: deque[Job] = deque()
        self._work: Iterator[float] | None = None
        self._due = 0.0
        self._next_housekeeping = 0.0
        self._stopping = False
        self.turns = Turns()
        self.selector = selectors.DefaultSelector()
        self._server: ControlServer | None = None
        self._wake, self._woken = socket.socketpair()
        for end in (self._wake, self._woken):
            end.setblocking(False)
        self.selector.register(self._woken, selectors.EVENT_READ)

    def catch_signals(self, numbers: tuple[int, ...]) -> None:
        """Have these signals delivered to *on_signal*, in the loop."""
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        for number in numbers:
            signal.signal(number, lambda *_: None)

    def serve(self, server: ControlServer) -> None:
        """Let *server* take part in the loop."""
        server.register(self.selector)
        self._server = server

    def add(self, job: Job) -> None:
        """Run *job* after those that wait already; the background scan gives way."""
        self._jobs.append(job)
        self.hurry()

    def give_up_jobs(self, why: KsmdError) -> None:
        """Answer every job that runs or waits with *why*."""
        while self._jobs:
            self._jobs.popleft().on_error(why)
        self.turns.give_up(why)

    def hurry(self) -> None:
        """Start the next background scan now."""
        self._work, self._due, self._idle = None, 0.0, 0.0

    def stop(self) -> None:
        """Leave the loop after the current step."""
        self._stopping = True

    @property
    def busy(self) -> bool:
        """Whether a job runs or waits."""
        return bool(self._jobs)

    def run(self) -> None:
        """Run until stopped."""
        while not self._stopping:
            spent = self._events(self._timeout())
            self._keep_house()
            self._advance(spent)

    def drain(self) -> None:
        """Run the jobs that wait to their end, without events: for the way out."""
        while self._jobs:
            self._keep_house()
            time.sleep(self._job_step())

    def close(self) -> None:
        """Close what the loop holds."""
        signal.set_wakeup_fd(-1)
        self.selector.close()
        self._wake.close()
        self._woken.close()

    def _keep_house(self) -> None:
        now = time.monotonic()
        if now >= self._next_housekeeping:
            self._next_housekeeping = now + _HOUSEKEEPING_SECS
            self._housekeep()
            if self._server is not None:
                self._server.expire()
            if self._idle and now >= self._next_look:
                self._next_look = now + _LOOK_SECS
                if self._stirred():
                    self.hurry()

    def _timeout(self) -> float:
        wait = min(self._due, self._next_housekeeping, self.turns.due()) - time.monotonic()
        return max(0.0, wait)

    def _events(self, timeout: float) -> float:
        """Wait for what comes, and see to it; the seconds that this took, but for the waiting."""
        events = self.selector.select(timeout)
        began = time.monotonic()
        for key, mask in events:
            if key.fileobj is self._woken:
                self._signals()
            else:
                key.data(key, mask)
        return time.monotonic() - began

    def _advance(self, seconds: float) -> None:
        """Do a step of each work that is due, and more of them until *seconds* have passed.

        That is how long callers have just had: so they have half of our time and no more.
        """
        until = time.monotonic() + seconds
        while not self._stopping:
            now = time.monotonic()
            if now >= self._due:
                self._due = now + self._step()
            if not self._stopping:
                self.turns.step()
            now = time.monotonic()
            if now >= until or now < min(self._due, self.turns.due()):
                return

    def _signals(self) -> None:
        try:
            numbers = set(self._woken.recv(4096))
        except BlockingIOError:
            return
        for number in sorted(numbers):
            self._on_signal(number)

    def _step(self) -> float:
        """Do one step of whatever is to be done; seconds until the next."""
        if self._jobs:
            return self._job_step()
        if not self._allowed():
            self._work = None
            return _HOUSEKEEPING_SECS
        if self._work is None:
            self._work = self._background()
        try:
            return max(next(self._work), self._pace())
        except StopIteration:
            self._work = None
            return self._pause()
        except KsmdError as error:
            log.error("the scan was given up: %s", error)
        except Exception:  # a defect met in one target must not end the guard of all others
            log.exception("the scan was given up; this is a defect of ksmd")
        self._work = None
        return _BUSY_PAUSE_SECS

    def _pause(self) -> float:
        """Give the seconds from the pass that has just ended to the next."""
        if not self._settled():
            self._idle = 0.0
            return _BUSY_PAUSE_SECS
        self._idle = min(self._idle * 2 or _IDLE_PAUSE_SECS, _LONGEST_PAUSE_SECS)
        self._next_look = time.monotonic() + _LOOK_SECS
        return self._idle

    def _job_step(self) -> float:
        job = self._jobs[0]
        try:
            step = next(job.steps)
        except StopIteration:
            self._jobs.popleft()
            job.on_done()
        except KsmdError as error:
            self._jobs.popleft()
            job.on_error(error)
        except Exception as error:
            log.exception("%s was given up; this is a defect of ksmd", job.name)
            self._jobs.popleft()
            job.on_error(KsmdError(f"a defect of ksmd: {error!r}", "its log has the details"))
        else:
            if isinstance(step, float):
                return step
            job.on_result(step)
        return 0.0


def watch_pid(selector: selectors.BaseSelector, pidfd: int, on_exit: Callable[[], None]) -> None:
    """Call *on_exit* from the selector when the process behind *pidfd*, the caller's, ends."""
    pidfd = os.dup(pidfd)

    def handle(_key: selectors.SelectorKey, _mask: int) -> None:
        selector.unregister(pidfd)
        os.close(pidfd)
        on_exit()

    selector.register(pidfd, selectors.EVENT_READ, handle)
