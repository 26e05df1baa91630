"""The service manager's two ways to a process: its notification socket, and inherited descriptors.

sd_notify(3) and sd_listen_fds(3), as far as ksmd uses them, in a module that loads next to nothing:
the pager speaks for itself.
"""

from __future__ import annotations

import array
import fcntl
import os
import socket
from collections.abc import MutableMapping
from typing import NamedTuple

#: The first inherited descriptor, SD_LISTEN_FDS_START.
FIRST_FD = 3


class Inherited(NamedTuple):
    """A descriptor that the manager gave us: the name that the unit, or we, gave it."""

    name: str
    fd: int


def send(address: str, text: str, fd: int = -1, seconds: float = 1.0) -> None:
    """Send one notification, with a descriptor. OSError; 0 *seconds*: at once or not at all."""
    rights = [] if fd < 0 else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as end:
        end.settimeout(seconds)
        end.connect("\0" + address[1:] if address.startswith("@") else address)
        end.sendmsg([text.encode(errors="replace")], rights)


def store(name: str) -> str:
    """Say "keep the descriptor that comes with this, beyond my death, under this name".

    *name* has at most 255 printable characters without a colon.
    """
    return f"FDSTORE=1\nFDPOLL=0\nFDNAME={name}"


def forget(name: str) -> str:
    """Say "close what was stored under this name"."""
    return f"FDSTOREREMOVE=1\nFDNAME={name}"


def take_inherited(environ: MutableMapping[str, str]) -> tuple[list[Inherited], list[int]]:
    """Take what we inherit out of *environ*, close-on-exec from now on.

    Second comes what was promised and is not open.
    """
    pid, count, names = (
        environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
    )
    if pid != str(os.getpid()) or not count.isdecimal():
        return [], []
    named = names.split(":") if names else []
    found, absent = [], []
    for index in range(int(count)):
        fd = FIRST_FD + index
        try:
            flags = fcntl.fcntl(fd, fcntl.F_GETFD)
            fcntl.fcntl(fd, fcntl.F_SETFD, flags | fcntl.FD_CLOEXEC)
        except OSError:
            absent.append(fd)
            continue
        found.append(Inherited(named[index] if index < len(named) else "unknown", fd))
    return found, absent
