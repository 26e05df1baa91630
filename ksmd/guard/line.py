"""The daemon's end of the channel to one pager process, and the process itself."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
from collections.abc import Callable, Collection
from typing import Any

from ksmd.guard import shadow
from ksmd.kernel import channel
from ksmd.kernel.patience import Patience
from ksmd.model.errors import KsmdError

#: Seconds after which a pager that does not answer is taken for dead: of its own, see Patience.
DEADLINE = 10.0

#: Told of every message, and the descriptors that came with it, before it is used.
Take = Callable[[dict[str, Any], list[int]], None]


class PagerGoneError(KsmdError):
    """The pager has died or hangs. After ``restart()`` the failed call holds too."""

    def __init__(self, why: str) -> None:
        super().__init__(f"the pager is gone: {why}", "restart() it; targets wait meanwhile")


class PagerRefusedError(KsmdError):
    """The pager answered with an error: a context that is none, an unknown id."""


class Line:
    """What we hold of a pager: a channel, and a pidfd, so that its pid never names another."""

    def __init__(self, take: Take) -> None:
        self.pid = 0
        self.pidfd = -1
        self.end: socket.socket | None = None
        self._shadow = 0, -1
        self._take = take

    def attach(self, end: socket.socket, pid: int) -> None:
        """Speak through *end* to the process *pid*, which may have ended. PagerGoneError."""
        self.end = end
        self.pid = pid
        self._lose_shadow()
        try:
            self.pidfd = os.pidfd_open(pid)
        except ProcessLookupError as error:
            raise PagerGoneError(f"process {pid} has ended") from error

    def see(self, pid: int) -> None:
        """Note the pid of the shadow that the pager has told of; 0: it has none."""
        self._lose_shadow()
        if pid:
            with contextlib.suppress(ProcessLookupError):
                self._shadow = pid, os.pidfd_open(pid)

    @property
    def shadow(self) -> int:
        """Its pid, 0 when there is none."""
        return self._shadow[0]

    def inherit(self, known: Collection[int]) -> list[int]:
        """Take what a pager that is dead held beside *known*: see shadow.py."""
        found = []
        if self._shadow[1] >= 0:
            found = shadow.inherit(*self._shadow, known)
        self._lose_shadow()
        return found

    def _lose_shadow(self) -> None:
        if self._shadow[1] >= 0:
            os.close(self._shadow[1])
        self._shadow = 0, -1

    def detach(self) -> None:
        """Let go of everything."""
        self._lose_shadow()
        if self.end is not None:
            self.end.close()
            self.end = None
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1

    def alive(self) -> bool:
        """Tell whether the process runs."""
        return self.pidfd >= 0 and not select.select([self.pidfd], [], [], 0)[0]

    def kill(self) -> None:
        """End the process by force."""
        if self.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            select.select([self.pidfd], [], [], DEADLINE)

    def ask(self, header: dict[str, Any], *fds: int) -> dict[str, Any]:
        """Send a message and give its answer; news that come before it are taken."""
        return self.ask_all([header], *fds)[0]

    def ask_all(self, headers: list[dict[str, Any]], *fds: int) -> list[dict[str, Any]]:
        """Send messages, each with *fds*, before their answers are waited for.

        PagerRefusedError where it refuses any of them; it has done the others.
        """
        patience = self.patience()
        try:
            for header in headers:
                patience.send(self._channel(), header, fds=fds)
        except (channel.PeerGoneError, TimeoutError) as error:
            raise PagerGoneError("its channel is closed or full") from error
        answers: list[dict[str, Any]] = []
        while len(answers) < len(headers):
            if "ok" in (answer := self.receive(patience)):
                answers.append(answer)
        for header, answer in zip(headers, answers, strict=True):
            if not answer["ok"]:
                raise PagerRefusedError(f"the pager refuses {header['do']}: {answer['error']}")
        return answers

    def _channel(self) -> socket.socket:
        if self.end is None:
            raise PagerGoneError("it was not started")
        return self.end

    def patience(self) -> Patience:
        """Give the pager its time from now on."""
        return Patience(DEADLINE, self.pid)

    def receive(self, patience: Patience) -> dict[str, Any]:
        """Take one message; news are noted before they are returned."""
        try:
            header, _, fds = patience.receive(self._channel())
        except channel.PeerGoneError as error:
            raise PagerGoneError("it closed its channel") from error
        except TimeoutError as error:
            raise PagerGoneError(f"no answer in {DEADLINE:g} s") from error
        self._take(header, fds)
        return header

    def collect_news(self) -> bool:
        """Take news without waiting; False when the channel is closed."""
        if self.end is None:
            return False
        while select.select([self.end], [], [], 0)[0]:
            try:
                self.receive(self.patience())
            except PagerGoneError:
                return False
        return True
