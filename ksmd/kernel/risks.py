"""Signs that a process must be left alone, and what the host has to say before memory changes.

A page can be written without the page table: by a device or by the kernel for an I/O request whose
buffer was pinned beforehand. The quarantine refuses such a page when it meets it (EBUSY), but a
process that lives by pinned buffers is not worth the attempts; the signs here tell it from outside,
without stopping it. Memory that a second process shares (CLONE_VM) cannot be stopped by stopping
the threads of one. A frozen process never reaches a ptrace stop.

What cannot be read is no sign: these are hints, the guarantees are in the stop window.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

from ksmd.kernel import cgroups, libc, procfs, proctext
from ksmd.kernel.vmaquery import VmaQuery
from ksmd.model.errors import KernelFeatureError, KsmdError, PrivilegeError, TargetGoneError
from ksmd.model.vma import Vma

KCMP_VM = 1

#: fd links (prefixes) of devices that write to user memory behind the page table.
_DEVICES = {
    "/dev/vfio/": "passes memory to a device through vfio",
    "anon_inode:[vfio-device]": "passes memory to a device through vfio",
    "/dev/infiniband/": "may have registered memory for RDMA",
    "anon_inode:[infinibandevent]": "may have registered memory for RDMA",
    "/dev/vhost-": "lets a vhost worker of the kernel write to its memory",
    "/dev/udmabuf": "hands memory to devices through udmabuf",
}

_USERFAULTFDS = ("anon_inode:[userfaultfd]", "/dev/userfaultfd")

#: Mappings of an AF_XDP socket's fill and completion rings start here (linux/if_xdp.h).
_XDP_RINGS = 0x100000000

_AT_PHENT = 4
_ELF64_PHENT = 56
_EM_X86_64 = 62


# ---------------------------------------------------------------- memory that others write


def _mapping_risks(vmas: Iterable[Vma]) -> list[str]:
    """Look for rings, which are shared mappings: what the program writes there others must see."""
    found: dict[str, None] = {}
    for vma in vmas:
        if vma.path.startswith("/[aio]"):
            found["has a context of Linux AIO ([aio]): reads may be in flight"] = None
        elif vma.path.startswith("socket:[") and vma.offset >= _XDP_RINGS:
            found["has an AF_XDP socket: the network writes to its memory"] = None
    return list(found)


def _ring_risk(pid: int, fd: str) -> str | None:
    try:
        fields = proctext.parse_fields(procfs.read_process(pid, f"fdinfo/{fd}"))
    except KsmdError:
        return None
    # the kernel leaves the line out while the ring is busy: then it may have some
    if fields.get("UserBufs", "?") == "0":
        return None
    return f"may have buffers registered with io_uring (fd {fd})"


def _open_files(pid: int) -> Iterator[tuple[str, str]]:
    """Give the number and the link of each open file; OSError where the list cannot be read."""
    for fd in os.listdir(f"/proc/{pid}/fd"):  # noqa: PTH208 - names only, thousands of them
        with contextlib.suppress(OSError):
            yield fd, os.readlink(f"/proc/{pid}/fd/{fd}")  # noqa: PTH115 - twice as fast


def may_answer_faults(pid: int) -> bool:
    """Tell whether *pid* holds a userfaultfd, or what makes one; True where that is not known.

    It does not see one that another process holds for *pid*: smaps does, by the flags of what is
    registered with it.
    """
    try:
        return any(link in _USERFAULTFDS for _, link in _open_files(pid))
    except OSError:
        return True


def _fd_risks(pid: int) -> list[str]:
    risks: dict[str, None] = {}
    try:
        files = list(_open_files(pid))
    except OSError:
        return []
    for fd, link in files:
        if link == "anon_inode:[io_uring]":
            if risk := _ring_risk(pid, fd):
                risks[risk] = None
        elif link.startswith(("/dev/", "anon_inode:[")):
            for prefix, risk in _DEVICES.items():
                if link.startswith(prefix):
                    risks[f"{risk} ({link})"] = None
    return list(risks)


def pin_risks(pid: int) -> list[str]:
    """Say, a sentence each, why memory of *pid* may be written behind its page table.

    Looks at pinned memory (VmPin), the rings of Linux AIO and AF_XDP, io_uring's registered
    buffers, and the devices vfio, RDMA, vhost and udmabuf. Empty when there is no sign.
    """
    tid = procfs.live_tid(pid)
    pinned = procfs.status_fields(pid, tid).get("VmPin", "0 kB")
    risks = [] if pinned.split()[:1] == ["0"] else [f"has pinned memory (VmPin: {pinned})"]
    # it may stand still: all of maps would take too long to read
    with contextlib.suppress(PrivilegeError), VmaQuery(pid, tid) as query:
        risks += _mapping_risks(query.files(shared=True))
    return risks + _fd_risks(pid)


def _same_mm(tid: int, other: int) -> bool:
    try:
        return libc.syscall("kcmp", libc.NR_KCMP, tid, other, KCMP_VM, 0, 0) == 0
    except OSError as error:
        if error.errno == errno.ESRCH:
            return False
        if error.errno == errno.EPERM:
            return _same_size(tid, other)
        if error.errno == errno.ENOSYS:
            raise KernelFeatureError(
                "this kernel cannot compare processes (kcmp)", "CONFIG_KCMP is needed"
            ) from error
        raise procfs.translate(error, f"process {other}") from error


def _same_size(tid: int, other: int) -> bool:
    """Guess for a process we may not look into: memory of another size is another memory."""
    try:
        sizes = [
            proctext.parse_stat(procfs.read_process(task, "stat")).vsize for task in (tid, other)
        ]
    except TargetGoneError:
        return False
    return sizes[0] == sizes[1]


def shares_memory(pid: int) -> int | None:
    """Give the pid of another process that shares *pid*'s memory (CLONE_VM, vfork), else None.

    Compares with every process that /proc shows (some microseconds each, by kcmp(2)); one in a pid
    namespace above ours is not seen. One that we may not compare counts when its memory has the
    same size.
    """
    tid = procfs.live_tid(pid)
    for other in procfs.pids():
        if other == pid:
            continue
        if _same_mm(tid, other):
            return other
        # a process whose first thread has ended has its memory in the others only
        try:
            if procfs.task_count(other) <= 1:
                continue
            if any(_same_mm(tid, task) for task in procfs.tasks(other)[-2:]):
                return other
        except (PrivilegeError, TargetGoneError):
            continue
    return None


# ---------------------------------------------------------------- cgroup freezer


def frozen(pid: int) -> bool:
    """Tell whether a cgroup freezer (v1 or v2) holds *pid*, or is about to."""
    for group in cgroups.groups_of(pid, "freezer"):
        try:
            data = (group.folder / ("cgroup.events" if group.v2 else "freezer.state")).read_bytes()
        except OSError:
            continue
        if (
            proctext.parse_fields(data.replace(b" ", b":")).get("frozen") == "1"
            if group.v2
            else (data.strip() in (b"FROZEN", b"FREEZING"))
        ):
            return True
    return False


# ---------------------------------------------------------------- the program and the host


def coredump_filter(pid: int) -> int:
    """Read which kinds of mapping a core dump of *pid* holds (bits, core(5))."""
    # no task has this file in its own directory, but /proc/TID is there for every task
    bits = procfs.read_process(procfs.live_tid(pid), "coredump_filter")
    if not bits.strip():  # the task has let go of its memory meanwhile
        raise TargetGoneError(f"process {pid} has exited")
    return int(bits, 16)


def set_coredump_filter(pid: int, bits: int) -> None:
    """Choose them. Merged pages are file-backed private: bit 2 keeps them in core dumps."""
    procfs.write_process(procfs.live_tid(pid), "coredump_filter", f"{bits:#x}")


def set_oom_score_adj(pid: int, value: int) -> None:
    """Set the bias of the OOM killer, -1000 (never) to 1000. Lowering it needs privilege."""
    procfs.write_process(pid, "oom_score_adj", str(value))


def max_map_count() -> int:
    """Give vm.max_map_count: how many mappings a process may have."""
    return int(procfs.read_file("/proc/sys/vm/max_map_count", "vm.max_map_count"))


def is_x86_64_header(header: bytes) -> bool:
    """Tell by its first 20 bytes whether an ELF file is a 64-bit program for x86-64 (elf(5))."""
    if len(header) < 20 or header[:4] != b"\x7fELF":
        return False
    elf64_lsb = header[4] == 2 and header[5] == 1
    return elf64_lsb and struct.unpack_from("<H", header, 18)[0] == _EM_X86_64


def is_x86_64_elf(pid: int) -> bool:
    """Tell whether *pid* runs a 64-bit x86-64 program; i386 and x32 programs are not.

    Reads the head of its executable; where that cannot be opened, the size of its program headers
    from auxv. Kernel threads and zombies have neither: False.
    """
    try:
        exe, auxv_path = procfs.task_path(pid, "exe"), procfs.task_path(pid, "auxv")
    except TargetGoneError:
        procfs.start_time(pid)  # it exists, and has no memory
        return False
    try:
        with Path(exe).open("rb") as file:
            return is_x86_64_header(file.read(20))
    except OSError:
        pass
    try:
        auxv = procfs.read_file(auxv_path, f"process {pid}")
    except TargetGoneError:
        procfs.start_time(pid)
        return False
    pairs = dict(struct.iter_unpack("<QQ", auxv[: len(auxv) // 16 * 16]))
    return pairs.get(_AT_PHENT) == _ELF64_PHENT
