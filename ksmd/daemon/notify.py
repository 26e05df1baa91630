"""Talk to the service manager: sd_notify(3), the watchdog, stored and inherited descriptors.

Pure standard library, and one class that does nothing where no manager listens, so that callers
never ask. What the manager said in the environment is taken out of it: the pager and the tracer
must not speak for the daemon.

No call waits long or raises: a manager that is busy must not stop the daemon that it watches.
"""

from __future__ import annotations

import array
import fcntl
import logging
import os
import socket
import time
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass

log = logging.getLogger(__name__)

#: The first inherited descriptor, SD_LISTEN_FDS_START.
_FIRST_FD = 3
_SEND_SECONDS = 1.0
_VARIABLES = (
    "NOTIFY_SOCKET",
    "WATCHDOG_USEC",
    "WATCHDOG_PID",
    "LISTEN_FDS",
    "LISTEN_PID",
    "LISTEN_FDNAMES",
)


@dataclass(frozen=True, slots=True)
class Inherited:
    """A descriptor that the manager gave us: the name that the unit, or we, gave it."""

    name: str
    fd: int


class Manager:
    """The service manager of this process.

    ``inherited``: the sockets of our socket units and what we had stored with :meth:`store` before
    a restart. ``watchdog_secs``: the time within which it wants a sign of life, 0 for none.
    """

    def __init__(
        self,
        address: str = "",
        inherited: tuple[Inherited, ...] = (),
        watchdog_secs: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.inherited = inherited
        self.watchdog_secs = watchdog_secs
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._clock = clock
        self._fed = float("-inf")
        self._status = ""

    @classmethod
    def take(cls, environ: MutableMapping[str, str]) -> Manager:
        """Read what the manager says, and take it out of *environ*. Call it once, at the start."""
        said = {name: environ.pop(name, "") for name in _VARIABLES}
        inherited: tuple[Inherited, ...] = ()
        if said["LISTEN_PID"] == str(os.getpid()):
            inherited = _inherited(_number(said["LISTEN_FDS"]), said["LISTEN_FDNAMES"])
        watchdog = 0.0
        if said["WATCHDOG_PID"] in ("", str(os.getpid())):
            watchdog = _number(said["WATCHDOG_USEC"]) / 1e6
        return cls(said["NOTIFY_SOCKET"], inherited, watchdog)

    @property
    def present(self) -> bool:
        """Whether somebody listens."""
        return bool(self._address)

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

    def store(self, name: str, fd: int) -> None:
        """Have the manager keep a duplicate of *fd* beyond our death; it comes back inherited.

        *name* has at most 255 printable characters without a colon.
        """
        self._send(f"FDSTORE=1\nFDPOLL=0\nFDNAME={name}", fd)

    def forget(self, name: str) -> None:
        """Have the manager close what was stored under *name*."""
        self._send(f"FDSTOREREMOVE=1\nFDNAME={name}")

    def _send(self, text: str, fd: int = -1) -> None:
        if not self._address:
            return
        rights = [] if fd < 0 else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as end:
                end.settimeout(_SEND_SECONDS)
                end.connect(self._address)
                end.sendmsg([text.encode(errors="replace")], rights)
        except OSError as error:
            log.warning("the service manager was not told %r: %s", text.partition("=")[0], error)


def _inherited(count: int, names: str) -> tuple[Inherited, ...]:
    named = names.split(":") if names else []
    found = []
    for index in range(count):
        fd = _FIRST_FD + index
        try:
            flags = fcntl.fcntl(fd, fcntl.F_GETFD)
            fcntl.fcntl(fd, fcntl.F_SETFD, flags | fcntl.FD_CLOEXEC)
        except OSError:
            log.warning("the service manager promised descriptor %d, which is not open", fd)
            continue
        found.append(Inherited(named[index] if index < len(named) else "unknown", fd))
    return tuple(found)


def _number(text: str) -> int:
    return int(text) if text.isdecimal() else 0
