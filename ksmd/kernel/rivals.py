"""Who else on this host merges pages, or did: other daemons, and what kernel KSM did to a process.

Processes are known by comm. A kernel thread is never taken for a program: the kernel's own thread
is called ksmd.
"""

from __future__ import annotations

from dataclasses import dataclass

from ksmd.kernel import procfs, proctext
from ksmd.model.errors import KsmdError

#: comm of our own processes; see also the tracer and the pager.
MAIN_COMM = "ksmd-main"
PAGER_COMM = "ksmd-pager"
#: Daemons that steer kernel KSM.
STEERING = ("ksmtuned", "uksmd")


@dataclass(frozen=True, slots=True)
class Running:
    """A process that matters here."""

    pid: int
    comm: str
    parent: int
    standing: bool = False  # a pager that is a service of its own


def running() -> list[Running]:
    """Find the daemons and pagers of ksmd, and daemons that steer kernel KSM."""
    found = []
    for pid in procfs.pids():
        try:
            stat = proctext.parse_stat(procfs.read_process(pid, "stat"))
            if stat.comm not in (MAIN_COMM, PAGER_COMM, *STEERING):
                continue
            if stat.flags & procfs.PF_KTHREAD or stat.state in procfs.DEAD_STATES:
                continue
            parent = int(procfs.status_fields(pid).get("PPid", "0"))
        except KsmdError:
            continue  # gone, or not ours to see
        found.append(Running(pid, stat.comm, parent))
    return found


def kernel_ksm_pages(pid: int) -> int:
    """Pages of a process that kernel KSM merges (Linux 6.1: ksm_stat); 0 where it does not say."""
    try:
        return parse_ksm_stat(procfs.read_process(pid, "ksm_stat")).get("ksm_merging_pages", 0)
    except KsmdError:
        return 0


def parse_ksm_stat(data: bytes) -> dict[str, int]:
    """Parse the numbers of /proc/PID/ksm_stat, lines of "name number" (fs/proc/base.c)."""
    lines = [line.split() for line in data.decode(errors="replace").splitlines()]
    return {line[0]: int(line[1]) for line in lines if len(line) == 2 and line[1].isdecimal()}
