"""What the daemon holds beside its pager: extents, and the contexts of targets."""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass, field
from typing import Any

from ksmd.guard.intervals import Intervals


@dataclass(frozen=True, slots=True)
class KeptExtent:
    """Part of an extent that the pager maps and locks too; *fd* stays the caller's.

    *about* is kept for a later daemon: what JSON can hold.
    """

    inode: int
    fd: int
    offset: int
    length: int
    about: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Held:
    """A target: its guard context, what is announced in it, its tracking context, its label.

    ``unmerging``: a window is under way that gives pages back.
    """

    fd: int
    owed: Intervals = field(default_factory=Intervals)
    track: int = -1
    about: dict[str, Any] = field(default_factory=dict)
    unmerging: bool = False

    @property
    def fds(self) -> tuple[int, ...]:
        """The descriptors."""
        return (self.fd, self.track) if self.track >= 0 else (self.fd,)

    def close(self) -> None:
        """Close them."""
        for fd in self.fds:
            os.close(fd)


def duplicate(fd: int) -> int:
    """Give a second descriptor of the same file, which no child process inherits."""
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
