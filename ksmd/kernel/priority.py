"""A place near the head of the line for a processor, for those of us whom targets wait for.

Pager and tracer do little, but while they do it somebody stands still: who touches memory that was
dropped, who is in a stop window. On a busy host they would stand in line for each of their steps.
"""

from __future__ import annotations

import contextlib
import os
from typing import Final

NICE: Final = -10


def go_before_others() -> None:
    """Raise the priority of this process to NICE, where it is not higher. OSError without right."""
    if os.getpriority(os.PRIO_PROCESS, 0) > NICE:
        os.setpriority(os.PRIO_PROCESS, 0, NICE)
    # where the scheduler shares out by session (sched(7), autogroup), nice counts only within one
    if os.getsid(0) != os.getpid():
        return  # and this one is somebody else's
    with contextlib.suppress(OSError):
        fd = os.open("/proc/self/autogroup", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, str(NICE).encode())
        finally:
            os.close(fd)
