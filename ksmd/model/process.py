"""Processes as ksmd names them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class TargetId:
    """A process that cannot be confused with a later owner of its pid.

    ``start_time`` is field 22 of /proc/PID/stat, in clock ticks since boot (proc_pid_stat(5)).
    """

    pid: int
    start_time: int


@dataclass(frozen=True, slots=True)
class ProcessInfo:
    """What target selection may look at; read once per process and pass."""

    id: TargetId
    uid: int
    user: str
    comm: str
    exe: str
    cmdline: str
    cgroup: str
    unit: str
    kernel_thread: bool
    zombie: bool
