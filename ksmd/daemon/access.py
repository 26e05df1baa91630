"""Who may call what: one line for each method of org.ksmd.Control.

The socket's mode decides who gets in at all; this table decides what they may do there. Nothing is
allowed by being forgotten: a method without a line is root's (and a test finds it).
"""

from __future__ import annotations

import os
from enum import Enum

from ksmd.daemon.connection import CallError


class Access(Enum):
    """What a caller who is not root gets."""

    ANYONE = "says the same to everybody, and nothing about any process"
    READER = "all to members of the socket's group, the caller's own process to others"
    OWN = "acts on the caller's own process alone"
    ROOT = "is refused"


METHODS: dict[str, Access] = {
    "GetApiVersion": Access.ANYONE,
    "Features": Access.ANYONE,
    # what the exporter reads
    "Status": Access.READER,
    "Targets": Access.READER,
    # the 2008 interface of a program that registers its own memory
    "CreateSharedMemoryArea": Access.OWN,
    "RegisterMemoryRegion": Access.OWN,
    "RemoveMemoryRegion": Access.OWN,
    "Share": Access.OWN,
    "CreateScan": Access.OWN,
    "Scan": Access.OWN,
    "Why": Access.OWN,
    "Monitor": Access.OWN,
    # the operator's
    "StartStopThread": Access.ROOT,
    "GetInfoThread": Access.ROOT,
    "Unmerge": Access.ROOT,
    "Pause": Access.ROOT,
    "Resume": Access.ROOT,
    "Reload": Access.ROOT,
    "Plan": Access.ROOT,
}


def check(method: str, uid: int) -> None:
    """Refuse a method that is root's to everybody else.

    The user that ksmd runs as is no one else: `ksmd pager --give-back` is.
    """
    if uid not in (0, os.geteuid()) and METHODS.get(method, Access.ROOT) is Access.ROOT:
        raise denied(f"only root may call {method}")


def denied(message: str, hint: str = "call as root") -> CallError:
    """Make the error for a caller who may not do this."""
    return CallError("PermissionDenied", message=message, hint=hint)
