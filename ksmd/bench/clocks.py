"""CPU time of other processes, in seconds, to the nanosecond where the kernel gives it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

from ksmd.kernel import procfs
from ksmd.model.errors import TargetGoneError

_PF_KTHREAD = 0x200000
_TICKS = os.sysconf("SC_CLK_TCK")
_CPUCLOCK_SCHED = 2


def cpu_of(pid: int) -> float:
    """CPU seconds of a process, its ended threads included; 0 when it has ended.

    The clock id of another process is what clock_getcpuclockid(3) makes: ~pid << 3 | 2.
    """
    try:
        return time.clock_gettime(~pid << 3 | _CPUCLOCK_SCHED)
    except OSError:
        return 0.0


def cpu_of_all(pids: Iterable[int]) -> float:
    """CPU seconds of some processes."""
    return sum(cpu_of(pid) for pid in pids)


def ended_children(stat: str) -> float:
    """CPU seconds of the children that a process has waited for, from the text of its stat."""
    fields = stat.rpartition(")")[2].split()
    return (int(fields[13]) + int(fields[14])) / _TICKS  # cutime, cstime: fields 16 and 17


def cpu_of_family(pid: int) -> float:
    """CPU seconds of a process and its children, living and ended (those to 10 ms)."""
    try:
        ended = ended_children(Path(f"/proc/{pid}/stat").read_text())
    except OSError:
        return 0.0
    return cpu_of(pid) + cpu_of_all(procfs.children(pid)) + ended


def kernel_thread(name: str) -> int | None:
    """Give the pid of the kernel thread of that name; a process that only bears it is none."""
    for pid in procfs.pids():
        try:
            stat = procfs.task_stat(pid, pid)
        except TargetGoneError:
            continue
        if stat.comm == name and stat.flags & _PF_KTHREAD:
            return pid
    return None
