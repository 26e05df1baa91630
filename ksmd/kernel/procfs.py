"""What /proc says of processes, tasks and mappings.

Three habits keep the answers true. A process is named by pid *and* start time, because pids are
used again. Mappings and status of the memory are read through a live task, because a process whose
first thread has ended still runs while its own /proc/PID/maps is empty. And the parsers are pure
functions of text, so that any text can be thrown at them: they return values or raise ValueError
naming the line, nothing else.

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
import re
from dataclasses import dataclass
from operator import le
from pathlib import Path

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


@dataclass(frozen=True, slots=True)
class TaskStat:
    """The fields of /proc/PID/task/TID/stat that ksmd uses.

    ``state`` is one letter; ``flags`` are the kernel's PF_*; ``start_time`` is in clock ticks since
    boot; ``vsize`` is in bytes.
    """

    comm: str
    state: str
    ppid: int
    flags: int
    num_threads: int
    start_time: int
    vsize: int


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


# ---------------------------------------------------------------- parsers


def parse_stat(data: bytes) -> TaskStat:
    """Parse a stat line. ``comm`` may hold spaces and parentheses: the last one closes it."""
    opening, closing = data.find(b"("), data.rfind(b")")
    fields = data[closing + 1 :].split()
    if not 0 < opening < closing or len(fields) < 22:
        raise ValueError("stat: not a line of /proc/PID/stat")
    try:
        return TaskStat(
            comm=os.fsdecode(data[opening + 1 : closing]),
            state=fields[0].decode("ascii"),
            ppid=int(fields[1]),
            flags=int(fields[6]),
            num_threads=int(fields[17]),
            start_time=int(fields[19]),
            vsize=int(fields[20]),
        )
    except ValueError as error:  # UnicodeDecodeError is one
        raise ValueError(f"stat: {error}") from None


_SPACE = " \t\r\v\f"  # not what else Unicode has: a process may have it in its name


def parse_fields(data: bytes) -> dict[str, str]:
    """Parse "Key: value" lines (status, fdinfo, meminfo). Lines without a colon are skipped."""
    fields = {}
    for line in os.fsdecode(data).split("\n"):
        key, colon, value = line.partition(":")
        if colon:
            fields[key] = value.strip(_SPACE)
    return fields


def parse_cgroup(data: bytes) -> str:
    """Give the path that says most in /proc/PID/cgroup, "" when there is none.

    That is the v2 path; where v2 is not mounted or says "/" only (a hybrid host), the path of the
    v1 hierarchy name=systemd, else the first v1 path below the root.
    """
    paths: dict[str, str] = {}
    for line in data.split(b"\n"):
        parts = line.split(b":", 2)
        if len(parts) == 3:
            paths.setdefault(os.fsdecode(parts[1]), os.fsdecode(parts[2]))
    ranked = [paths.get("", ""), paths.get("name=systemd", ""), *paths.values()]
    return next((path for path in ranked if path not in ("", "/")), ranked[0] or ranked[1])


def unit_of(cgroup: str) -> str:
    """Give the systemd unit in a cgroup path: its last *.service or *.scope component, or ""."""
    for part in reversed(cgroup.split("/")):
        if part.endswith((".service", ".scope")):
            return part
    return ""


_MAPS_LINE = re.compile(
    rb"([0-9a-f]{1,16})-([0-9a-f]{1,16}) ([r-][w-][x-][ps]) ([0-9a-f]{1,16})"
    rb" ([0-9a-f]{1,8}):([0-9a-f]{1,8}) ([0-9]{1,20})(?: +(.*))?",
    re.DOTALL,
)
# The same for a whole text at once: programs may have tens of thousands of mappings.
_MAPS_TEXT = re.compile(
    rb"^([0-9a-f]{1,16})-([0-9a-f]{1,16}) ([r-][w-][x-][ps]) ([0-9a-f]{1,16})"
    rb" ([0-9a-f]{1,8}:[0-9a-f]{1,8}) ([0-9]{1,20})(?: +(.*))?\n",
    re.MULTILINE,
)
_SMAPS_FIELD = re.compile(rb"(?![0-9a-f])[A-Za-z0-9_]{1,64}:")
_HEX_DIGITS = b"0123456789abcdef"
_NO_FLAGS: frozenset[str] = frozenset()


def _bytes(text: str | bytes) -> bytes:
    return os.fsencode(text) if isinstance(text, str) else text


def _vma(line: bytes, number: int) -> Vma:
    found = _MAPS_LINE.fullmatch(line)
    if found is None:
        raise ValueError(f"maps: line {number} is not a mapping")
    start, end, perms, offset, major, minor, inode, path = found.groups()
    vma = Vma(
        start=int(start, 16),
        end=int(end, 16),
        perms=perms.decode(),
        offset=int(offset, 16),
        device=(int(major, 16), int(minor, 16)),
        inode=int(inode),
        path=os.fsdecode(path or b"").rstrip(" "),
    )
    if vma.start >= vma.end:
        raise ValueError(f"maps: line {number} ends before it starts")
    return vma


def _rows(text: bytes) -> list[Vma] | None:
    """Parse maps where it is as the kernel writes it; None where there is anything else."""
    vmas: list[Vma] = []
    new = tuple.__new__  # as Vma() does, at half the cost
    at = 0
    for found in _MAPS_TEXT.finditer(text):
        before, at = at, found.end()
        low, high, perms, offset, device, inode, path = found.groups(b"")
        start, end = int(low, 16), int(high, 16)
        if found.start() != before or start >= end:
            return None
        columns = (
            start, end, _text(perms), int(offset, 16), _device(device), int(inode), _text(path),
            _NO_FLAGS,
        )  # fmt: skip
        vmas.append(new(Vma, columns))
    return vmas if at == len(text) else None


@functools.lru_cache(maxsize=1024)
def _text(words: bytes) -> str:
    return os.fsdecode(words).rstrip(" ")


@functools.lru_cache(maxsize=256)
def _device(numbers: bytes) -> tuple[int, int]:
    major, minor = numbers.split(b":")
    return int(major, 16), int(minor, 16)


def parse_maps(text: str | bytes) -> list[Vma]:
    r"""Parse /proc/PID/maps. Empty lines are skipped; any other line that is no mapping raises.

    Lone surrogates in a str must be those of os.fsdecode(); others raise ValueError as well.
    Paths keep the kernel's escapes (``\012`` for a newline) and its " (deleted)".
    """
    text = _bytes(text)
    vmas = _rows(text)
    if vmas is not None:
        return vmas
    return [_vma(line, number) for number, line in enumerate(text.split(b"\n"), 1) if line]


def parse_smaps(text: str | bytes) -> list[Vma]:
    """Parse /proc/PID/smaps: the mappings with their VmFlags; other fields are skipped.

    A line that is neither mapping nor field, or a field before the first mapping, raises
    ValueError with its number. A mapping without a VmFlags line has no flags.
    """
    vmas: list[Vma] = []
    for number, line in enumerate(_bytes(text).split(b"\n"), 1):
        # mappings begin with a lower-case digit, fields with a capital: a path may hold ": "
        if line[:1] in _HEX_DIGITS:
            if line:
                vmas.append(_vma(line, number))
        elif not vmas or not is_smaps_field(line):
            raise ValueError(f"smaps: line {number} is not a mapping and not a field of one")
        elif line.startswith(b"VmFlags:"):
            vmas[-1] = vmas[-1]._replace(flags=flags(line[8:]))
    return vmas


def is_smaps_field(line: bytes) -> bool:
    """Tell whether a line of smaps is a field of a mapping."""
    return _SMAPS_FIELD.match(line) is not None


@functools.lru_cache(maxsize=256)  # a host knows a few dozen sets of flags
def flags(words: bytes) -> frozenset[str]:
    """Read what follows "VmFlags:"."""
    return frozenset(os.fsdecode(word) for word in words.split())


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


def task_stat(pid: int, tid: int) -> TaskStat:
    """Read the stat of one task."""
    return parse_stat(read_file(f"/proc/{pid}/task/{tid}/stat", f"task {tid} of process {pid}"))


def start_time(pid: int) -> int:
    """Give the start time of *pid* in clock ticks since boot (field 22 of stat)."""
    return parse_stat(read_process(pid, "stat")).start_time


def spent(pid: int) -> tuple[int, int, int]:
    """Tell what *pid* has spent: clock ticks of all its threads, nanoseconds of the first, faults.

    Where none of it grows, the process has hardly run.
    """
    fields = read_process(pid, "stat").rpartition(b")")[2].split()
    faults, user, system = int(fields[7]), int(fields[11]), int(fields[12])  # the 10th, 14th, 15th
    return user + system, schedstat(pid)[0], faults


def schedstat(pid: int) -> tuple[int, int]:
    """Give the nanoseconds that the first thread of *pid* has run, and stood in line for that.

    Zeros where it is gone, or the kernel keeps no such account.
    """
    try:
        ran, waited, _ = read_process(pid, "schedstat").split()
    except (KsmdError, ValueError):
        return 0, 0
    return int(ran), int(waited)


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
    return parse_fields(read_file(f"/proc/{path}", f"process {pid}"))


def status_masks(pid: int, tid: int, *names: str) -> list[int]:
    """Read signal masks ("SigPnd") and the like from a task's status, without parsing all of it."""
    data = read_file(f"/proc/{pid}/task/{tid}/status", f"process {pid}")
    masks = []
    for name in names:
        _, found, rest = data.partition(b"\n%s:" % name.encode())
        if not found:
            raise ValueError(f"status: it has no {name}")
        masks.append(int(rest.partition(b"\n")[0], 16))
    return masks


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
    stat = parse_stat(read_process(pid, "stat"))
    uid = int(status_fields(pid).get("Uid", "0 0").split()[1])
    cgroup = parse_cgroup(read_process(pid, "cgroup"))
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
        unit=unit_of(cgroup),
        kernel_thread=bool(stat.flags & PF_KTHREAD),
        zombie=zombie,
    )


# ---------------------------------------------------------------- mappings


def task_path(pid: int, name: str, tid: int | None = None) -> str:
    """Give the path of *name* (maps, mem, pagemap, ...) through *tid*, by default a live task."""
    return f"/proc/{pid}/task/{live_tid(pid) if tid is None else tid}/{name}"


def maps(pid: int, tid: int | None = None) -> list[Vma]:
    """Read the mappings of *pid*, without flags, ascending. Empty for a kernel thread."""
    return disjoint(parse_maps(maps_text(pid, tid)))


def maps_text(pid: int, tid: int | None = None) -> bytes:
    """Read maps as it is: what :func:`parse_maps` and :func:`disjoint` make :func:`maps` of."""
    return read_file(task_path(pid, "maps", tid), f"process {pid}")


def smaps(pid: int, tid: int | None = None) -> list[Vma]:
    """Read the mappings with their flags. The kernel walks all page tables for it: some ms/GiB."""
    return disjoint(parse_smaps(smaps_text(pid, tid)))


def smaps_text(pid: int, tid: int | None = None) -> bytes:
    """Read smaps as it is."""
    return read_file(task_path(pid, "smaps", tid), f"process {pid}")


def disjoint(vmas: list[Vma]) -> list[Vma]:
    """Cut what was said before off mappings that begin before the end of the one above them.

    The kernel writes the file in pieces and lets the process run in between: a mapping that has
    grown down, or together with its neighbour, comes a second time, as a whole.
    """
    ends, starts = [vma.end for vma in vmas], [vma.start for vma in vmas]
    if all(map(le, ends[:-1], starts[1:])):
        return vmas
    found: list[Vma] = []
    end = 0
    for vma in vmas:
        if vma.end > end:
            ahead = max(0, end - vma.start)
            offset = vma.offset + ahead if vma.inode else vma.offset
            found.append(vma._replace(start=vma.start + ahead, offset=offset))
            end = vma.end
    return found


def boot_id() -> str:
    """Give the number of this boot of the kernel."""
    return read_file("/proc/sys/kernel/random/boot_id", "the boot id").decode().strip()
