"""A place near the head of the line for a processor, for those of us whom targets wait for.

Pager and tracer do little, but while they do it somebody stands still: who touches memory that was
dropped, who is in a stop window. On a busy host they would stand in line for each of their steps,
and for loading.
"""

from __future__ import annotations

import contextlib
import os
from typing import Final

NICE: Final = -10


def go_before_others(pid: int = 0) -> None:
    """Raise the priority of a process (0: this one) to NICE, where it is not higher.

    OSError without the right to.
    """
    if os.getpriority(os.PRIO_PROCESS, pid) > NICE:
        os.setpriority(os.PRIO_PROCESS, pid, NICE)
    # where the scheduler shares out by session (sched(7), autogroup), nice counts only within one
    pid = pid or os.getpid()
    if os.getsid(pid) != pid:
        return  # and this one is somebody else's
    with contextlib.suppress(OSError):
        fd = os.open(f"/proc/{pid}/autogroup", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, str(NICE).encode())
        finally:
            os.close(fd)
