"""Whether memory that is given back fits: on the host, and into the memory cgroups of its owner.

A program that runs out of either is killed by the kernel; so nothing is given back that does not
fit, and no window is opened in a group that is full. What ksmd cannot help is that a program itself
writes to merged pages: it needs the memory then, as it would have from the beginning.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from ksmd.kernel import memcg, procfs
from ksmd.kernel.memcg import Limit
from ksmd.model.errors import KsmdError
from ksmd.remap.store import MEMORY_RESERVE

#: Seconds for which a group's room is taken to be what it was, less what we took of it.
_ROOM_LASTS = 0.2


class NotEnoughMemoryError(KsmdError):
    """Unmerging would take more memory than is available."""


def check_host(needed: int) -> None:
    """Raise NotEnoughMemoryError, with figures, where the host has not *needed* bytes to give."""
    available = max(0, procfs.mem_available() - MEMORY_RESERVE)
    if needed > available:
        raise NotEnoughMemoryError(
            f"unmerging takes {needed >> 20} MiB and only {available >> 20} MiB are available",
            "free memory, unmerge single targets (--pid), or stop with on_stop: keep",
        )


def check(pid: int, needed: int) -> None:
    """Raise NotEnoughMemoryError, with figures, where *pid* may not take *needed* bytes."""
    check_host(needed)
    for limit, _ in memcg.lacking({pid: needed}):
        raise NotEnoughMemoryError(
            f"unmerging process {pid} takes {needed >> 20} MiB; {limit}",
            "raise the limit, or free memory of that group",
        )


@dataclass(slots=True)
class Room:
    """What one target may take before a memory cgroup of it is full: asked anew now and then.

    ``hard``: by those limits only at which the kernel kills.
    """

    hard: bool = False
    _until: float = -math.inf
    _limit: Limit | None = None
    _left: float = 0.0

    def take(self, pid: int, nbytes: int) -> Limit | None:
        """Count *nbytes* as taken by the target *pid*; the group that has no room for them."""
        now = time.monotonic()
        if now >= self._until or nbytes > self._left:
            self._limit = memcg.tightest(pid, hard=self.hard)
            self._left = math.inf if self._limit is None else self._limit.room
            self._until = now + _ROOM_LASTS
        if nbytes > self._left:
            return self._limit
        self._left -= nbytes
        return None
