"""Talk to the service manager: sd_notify(3), the watchdog, inherited sockets, and what it stores.

One class that does nothing where no manager listens, so that callers
never ask. What the manager said in the environment is taken out of it: the pager and the tracer
must not speak for the daemon.

No call waits long or raises: a manager that is busy must not stop the daemon that it watches.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, MutableMapping
from pathlib import Path

from ksmd.daemon.listening import CONTROL_NAME
from ksmd.guard.stored import Stored
from ksmd.kernel import sdnotify
from ksmd.kernel.sdnotify import Inherited

log = logging.getLogger(__name__)

_SEND_SECONDS = 1.0
_ASK_SECONDS = 3.0
#: What the daemon heeds.
SIGNALS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "STATE_DIRECTORY")


class Manager:
    """The service manager of this process.

    ``inherited``: the sockets of our socket units, and what it kept of the daemon before us, see
    :meth:`stored`. ``watchdog_secs``: the time within which it wants a sign of life, 0 for none.
    ``state_directory``: what it keeps for the next of us.
    """

    def __init__(
        self,
        address: str = "",
        inherited: tuple[Inherited, ...] = (),
        watchdog_secs: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        state_directory: Path | None = None,
    ) -> None:
        self.inherited = inherited
        self._kept = tuple(one for one in inherited if one.name != CONTROL_NAME)
        self.state_directory = state_directory
        self.watchdog_secs = watchdog_secs
        self._address = address
        self._clock = clock
        self._fed = float("-inf")
        self._status = ""

    @classmethod
    def take(cls, environ: MutableMapping[str, str]) -> Manager:
        """Read what the manager says, and take it out of *environ*. Call it once, at the start."""
        said = {name: environ.pop(name, "") for name in _VARIABLES}
        inherited, absent = sdnotify.take_inherited(environ)
        for fd in absent:
            log.warning("the service manager promised descriptor %d, which is not open", fd)
        watchdog = 0.0
        if said["WATCHDOG_PID"] in ("", str(os.getpid())):
            watchdog = _number(said["WATCHDOG_USEC"]) / 1e6
        state = Path(said["STATE_DIRECTORY"]) if said["STATE_DIRECTORY"] else None
        return cls(said["NOTIFY_SOCKET"], tuple(inherited), watchdog, state_directory=state)

    @property
    def present(self) -> bool:
        """Whether somebody listens."""
        return bool(self._address)

    def stored(self) -> Stored:
        """Give what it kept of the daemon before us, and will keep for the next. Call it once.

        Whoever calls it a second time finds nothing left.
        """
        kept, self._kept = self._kept, ()
        return Stored(self._address, kept, log.warning)

    @property
    def kept(self) -> bool:
        """Whether it kept something that nobody asked for yet."""
        return bool(self._kept)

    def ready(self) -> None:
        """Say that we serve: at the start, and after :meth:`reloading`."""
        self._send("READY=1")

    def reloading(self) -> None:
        """Say that the settings are being read again; :meth:`ready` ends it."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """Say that we are on the way out."""
        self._send("STOPPING=1")

    def status(self, text: str) -> None:
        """Show *text* in ``systemctl status``; said again only when it is another."""
        line = " ".join(text.split())
        if line != self._status:
            self._status = line
            self._send(f"STATUS={line}")

    def alive(self) -> None:
        """Feed the watchdog, four times within its time at most. Cheap: call it at every turn."""
        now = self._clock()
        if self.watchdog_secs and now - self._fed >= self.watchdog_secs / 4:
            self._fed = now
            self._send("WATCHDOG=1")

    def extend(self, seconds: float) -> None:
        """Ask for *seconds* more, from now, before a start or a stop counts as hanging."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")

    def restarting(self, unit: str) -> bool:
        """Tell whether *unit*, which is being stopped, is to be started again at once.

        The manager tells it only to who asks, over D-Bus; no answer counts as no.
        """
        if not self.present or not unit:
            return False
        command = ["systemctl", "list-jobs", "--no-legend", "--no-pager", unit]
        try:
            told = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_ASK_SECONDS,
                check=True,
            ).stdout
        except (OSError, subprocess.SubprocessError) as error:
            log.info("whether this is a restart could not be asked: %s", error)
            return False
        # job, unit, type, state
        return any(line.split()[1:3] == [unit, "restart"] for line in told.splitlines())

    def _send(self, text: str) -> None:
        if not self._address:
            return
        try:
            sdnotify.send(self._address, text, seconds=_SEND_SECONDS)
        except OSError as error:
            log.warning("the service manager was not told %r: %s", text.partition("=")[0], error)


def collect_signals() -> list[int]:
    """Collect the daemon's signals from now on, until its loop catches them."""
    collected: list[int] = []
    for number in SIGNALS:
        signal.signal(number, lambda number, _: collected.append(number))
    return collected


def _number(text: str) -> int:
    return int(text) if text.isdecimal() else 0
