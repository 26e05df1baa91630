"""What /proc says of processes, tasks and mappings.

Three habits keep the answers true. A process is named by pid *and* start time, because pids are
used again. Mappings and status of the memory are read through a live task, because a process whose
first thread has ended still runs while its own /proc/PID/maps is empty. And what the texts mean is
known to the pure functions of :mod:`ksmd.kernel.proctext` alone.

Everything here is the standard library: the tracer imports it. Errors: TargetGoneError when the
process or task has exited (ENOENT, ESRCH), PrivilegeError when the kernel refuses (EACCES, EPERM).
Formats: proc_pid_stat(5), proc_pid_status(5), proc_pid_maps(5), proc_pid_smaps(5), cgroups(7).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import pwd
from pathlib import Path

from ksmd.kernel import proctext
from ksmd.model.errors import KsmdError, PrivilegeError, TargetGoneError
from ksmd.model.process import ProcessInfo, TargetId
from ksmd.model.vma import Vma

# include/linux/sched.h
PF_IO_WORKER = 0x00000010
PF_USER_WORKER = 0x00004000
PF_KTHREAD = 0x00200000

#: States of a task that will never run again (proc_pid_stat(5)).
DEAD_STATES = frozenset("ZXx")

_CHUNK = 1 << 16


# ---------------------------------------------------------------- reading


def translate(error: OSError, what: str) -> KsmdError:
    """Turn the OSError of an access to *what* (say "process 12") into the error users meet."""
    if error.errno in (errno.ENOENT, errno.ESRCH):
        return TargetGoneError(f"{what} is gone")
    if error.errno in (errno.EACCES, errno.EPERM):
        return PrivilegeError(
            f"{what}: {error.strerror}", "ksmd needs CAP_SYS_PTRACE to look into other processes"
        )
    return KsmdError(f"{what}: {error.strerror}")


def read_file(path: str, what: str) -> bytes:
    """Read a whole file of /proc; *what* names its process in the error."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            parts = []
            while part := os.read(fd, _CHUNK):
                parts.append(part)
            return b"".join(parts)
        finally:
            os.close(fd)
    except OSError as error:
        raise translate(error, what) from error


def read_process(pid: int, name: str) -> bytes:
    """Read /proc/PID/*name*."""
    return read_file(f"/proc/{pid}/{name}", f"process {pid}")


def write_process(pid: int, name: str, text: str) -> None:
    """Write *text* to /proc/PID/*name*."""
    try:
        fd = os.open(f"/proc/{pid}/{name}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)
    except OSError as error:
        raise translate(error, f"process {pid}") from error


# ---------------------------------------------------------------- processes and tasks


def _numbers(path: str) -> list[int]:
    return sorted(int(name) for name in os.listdir(path) if name.isdecimal())  # noqa: PTH208 - names only


def pids() -> list[int]:
    """Give the pids of all processes that /proc shows, ascending."""
    return _numbers("/proc")


def tasks(pid: int) -> list[int]:
    """Give the thread ids of *pid*, ascending; kernel workers of io_uring are among them."""
    try:
        return _numbers(f"/proc/{pid}/task")
    except OSError as error:
        raise translate(error, f"process {pid}") from error


def task_count(pid: int) -> int:
    """Tell how many tasks :func:`tasks` would give, at a third of its price."""
    try:
        return os.stat(f"/proc/{pid}/task").st_nlink - 2  # noqa: PTH116 - "." and ".." are two
    except OSError as error:
        raise translate(error, f"process {pid}") from error


def task_stat(pid: int, tid: int) -> proctext.TaskStat:
    """Read the stat of one task."""
    return proctext.parse_stat(
        read_file(f"/proc/{pid}/task/{tid}/stat", f"task {tid} of process {pid}")
    )


def start_time(pid: int) -> int:
    """Give the start time of *pid* in clock ticks since boot (field 22 of stat)."""
    return proctext.parse_stat(read_process(pid, "stat")).start_time


def spent(pid: int) -> tuple[int, int, int]:
    """Tell what *pid* has spent: clock ticks of all its threads, nanoseconds of the first, faults.

    Where none of it grows, the process has hardly run.
    """
    return pulse(pid)[1]


def pulse(pid: int) -> tuple[int, tuple[int, int, int]]:
    """Give the start time of *pid*, as :func:`start_time`, and what it has spent."""
    fields = read_process(pid, "stat").rpartition(b")")[2].split()
    # the 10th, 14th, 15th and 22nd, with pid and comm
    faults, user, system, start = (int(fields[at]) for at in (7, 11, 12, 19))
    return start, (user + system, schedstat(pid)[0], faults)


def schedstat(pid: int) -> tuple[int, int]:
    """Give the nanoseconds that the first thread of *pid* has run, and stood in line for that.

    Zeros where it is gone, or the kernel keeps no such account.
    """
    try:
        ran, waited, _ = read_process(pid, "schedstat").split()
    except (KsmdError, ValueError):
        return 0, 0
    return int(ran), int(waited)


def namespace(pid: int, kind: str) -> str:
    """Name the namespace of *kind* ("pid", "user", ...) that *pid* is in; "" where it is gone."""
    try:
        return str(Path(f"/proc/{pid}/ns/{kind}").readlink())
    except OSError:
        return ""


def children(pid: int) -> list[int]:
    """Give the living children of the first thread of *pid*; none where that cannot be told."""
    try:
        return [int(word) for word in read_process(pid, f"task/{pid}/children").split()]
    except KsmdError:
        return []


def stack_start(pid: int, tid: int) -> int:
    """Give an address in the main stack of *pid*, by its task *tid*; 0 where that is not shown."""
    stat = read_file(f"/proc/{pid}/task/{tid}/stat", f"task {tid} of process {pid}")
    fields = stat.rpartition(b")")[2].split()
    return int(fields[25])  # the 28th with pid and comm


def target_id(pid: int) -> TargetId:
    """Name the process that has *pid* now."""
    return TargetId(pid, start_time(pid))


def is_same(target: TargetId) -> bool:
    """Tell whether *target*'s pid still belongs to it (a zombie is still itself)."""
    try:
        return start_time(target.pid) == target.start_time
    except TargetGoneError:
        return False


def live_tid(pid: int) -> int:
    """Give a task of *pid* that still has the memory: the first thread unless it has ended."""
    for tid in dict.fromkeys((pid, *tasks(pid))):
        try:
            if task_stat(pid, tid).state not in DEAD_STATES:
                return tid
        except TargetGoneError:
            continue
    raise TargetGoneError(f"process {pid} has exited")


def status_fields(pid: int, tid: int | None = None) -> dict[str, str]:
    """Read status, of the process or of its task *tid*: field name -> text ("VmPin": "0 kB")."""
    path = f"{pid}/status" if tid is None else f"{pid}/task/{tid}/status"
    return proctext.parse_fields(read_file(f"/proc/{path}", f"process {pid}"))


def task_status(pid: int, tid: int) -> proctext.Status:
    """Read a task's status, of which a few fields are wanted at once."""
    return proctext.Status(read_file(f"/proc/{pid}/task/{tid}/status", f"process {pid}"))


def cpu_seconds(pid: int) -> float:
    """CPU time, user and system, of a process of ours since its start; 0.0 when it is gone."""
    try:
        fields = read_process(pid, "stat").rpartition(b")")[2].split()
    except TargetGoneError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def anonymous_pages(pid: int) -> int:
    """Count a process's resident pages that are no file's (statm); 0 when it is gone."""
    try:
        _, resident, shared, *_ = read_process(pid, "statm").split()
    except TargetGoneError:
        return 0
    return int(resident) - int(shared)


def mapped_pages(pid: int) -> tuple[int, int, int]:
    """Count the pages that a process has mapped: all, code, data and stack (statm)."""
    statm = read_process(pid, "statm")
    if statm.startswith(b"0 "):  # its first thread has ended, others may live
        statm = read_file(task_path(pid, "statm"), f"process {pid}")
    size, _, _, code, _, data, _ = statm.split()
    return int(size), int(code), int(data)


@functools.lru_cache(maxsize=256)
def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _exe(pid: int) -> str:
    try:
        return str(Path(f"/proc/{pid}/exe").readlink())
    except OSError:
        return ""


def process_info(pid: int) -> ProcessInfo:
    """Read what target selection looks at.

    ``uid`` is the effective one; ``cmdline`` has its arguments joined by spaces; ``exe`` is "" for
    kernel threads and where it may not be read; a process is a zombie when no thread of it lives.
    """
    stat = proctext.parse_stat(read_process(pid, "stat"))
    uid = int(status_fields(pid).get("Uid", "0 0").split()[1])
    cgroup = proctext.parse_cgroup(read_process(pid, "cgroup"))
    zombie = stat.state in DEAD_STATES
    if zombie:
        with contextlib.suppress(TargetGoneError):
            zombie = not live_tid(pid)
    return ProcessInfo(
        id=TargetId(pid, stat.start_time),
        uid=uid,
        user=_user_name(uid),
        comm=stat.comm,
        exe=_exe(pid),
        cmdline=os.fsdecode(read_process(pid, "cmdline").rstrip(b"\0").replace(b"\0", b" ")),
        cgroup=cgroup,
        unit=proctext.unit_of(cgroup),
        kernel_thread=bool(stat.flags & PF_KTHREAD),
        zombie=zombie,
    )


# ---------------------------------------------------------------- mappings


def task_path(pid: int, name: str, tid: int | None = None) -> str:
    """Give the path of *name* (maps, mem, pagemap, ...) through *tid*, by default a live task."""
    return f"/proc/{pid}/task/{live_tid(pid) if tid is None else tid}/{name}"


def maps(pid: int, tid: int | None = None) -> list[Vma]:
    """Read the mappings of *pid*, without flags, ascending. Empty for a kernel thread."""
    return proctext.disjoint(proctext.parse_maps(maps_text(pid, tid)))


def maps_text(pid: int, tid: int | None = None) -> bytes:
    """Read maps as it is."""
    return read_file(task_path(pid, "maps", tid), f"process {pid}")


def smaps(pid: int, tid: int | None = None) -> list[Vma]:
    """Read the mappings with their flags. The kernel walks all page tables for it: some ms/GiB."""
    return proctext.disjoint(proctext.parse_smaps(smaps_text(pid, tid)))


def smaps_text(pid: int, tid: int | None = None) -> bytes:
    """Read smaps as it is."""
    return read_file(task_path(pid, "smaps", tid), f"process {pid}")


def boot_id() -> str:
    """Give the number of this boot of the kernel."""
    return read_file("/proc/sys/kernel/random/boot_id", "the boot id").decode().strip()


def mem_available() -> int:
    """Give MemAvailable of the host in bytes."""
    return _memory("MemAvailable")["MemAvailable"]


def may_be_promised() -> int | None:
    """Give the bytes that the host can promise yet (vm.overcommit_memory is 2); None: any number.

    Where they are used up, everybody's mmap fails.
    """
    strict = read_file("/proc/sys/vm/overcommit_memory", "vm.overcommit_memory").strip() == b"2"
    if not strict:
        return None
    found = _memory("CommitLimit", "Committed_AS")
    return max(0, found["CommitLimit"] - found["Committed_AS"])


def _memory(*names: str) -> dict[str, int]:
    """Read fields of /proc/meminfo, in bytes."""
    fields = proctext.parse_fields(read_file("/proc/meminfo", "memory of the host"))
    return {name: int(fields[name].split()[0]) * 1024 for name in names}
