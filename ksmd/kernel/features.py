"""What the running kernel gives, found out by trying.

No version number is read: distributions carry features back, containers and hardening take them
away, and capabilities matter as much as the kernel. Everything is tried on ourselves or on a child
that lives for the length of the probe; nothing else is touched. A probe that fails in a way nobody
foresaw says so in ``detail`` and counts as absent.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import platform
import resource
import signal
import struct
from collections.abc import Callable
from functools import partial
from types import TracebackType

from ksmd.kernel import iouring, ksm, libc, memfd, pageentries, pagemap, ptrace, risks, thp
from ksmd.kernel import userfaultfd as uffd
from ksmd.model.errors import KsmdError
from ksmd.model.features import Feature
from ksmd.model.units import HUGE_PAGE_PAGES, PAGE_SIZE

_PR_SET_DUMPABLE = 4
_NR_MLOCK2 = 325
_MLOCK_ONFAULT = 1
_WALL = 0x40000000  # wait(2): also for tracees


class _Child:
    """A child that only waits, and that (not dumpable) needs CAP_SYS_PTRACE to be looked into."""

    def __init__(self) -> None:
        ready_read, ready_write = os.pipe()
        self.wait_fd, self.held_fd = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            self._live(ready_write)
        os.close(ready_write)
        os.read(ready_read, 1)
        os.close(ready_read)
        self.pidfd = os.pidfd_open(self.pid)

    def _live(self, ready: int) -> None:
        try:
            ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
            os.write(ready, b"x")
            os.close(self.held_fd)  # the parent's end alone keeps us waiting
            os.read(self.wait_fd, 1)
        finally:
            os._exit(0)

    def __enter__(self) -> _Child:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        while os.WIFSTOPPED(os.waitpid(self.pid, _WALL)[1]):
            pass  # a stop that was reported before the death
        for fd in (self.pidfd, self.wait_fd, self.held_fd):
            os.close(fd)


# Each probe returns a detail where the feature is present, and raises where it is not.


def _architecture() -> str:
    machine = platform.machine()
    if machine != "x86_64" or struct.calcsize("P") != 8:
        raise KsmdError(f"this is {machine}")
    return machine


def _seize(options: int) -> str:
    with _Child() as child:
        ptrace.seize(child.pid, options)
    return ""


def _pidfd_getfd() -> str:
    with _Child() as child:
        os.close(libc.pidfd_getfd(child.pidfd, child.wait_fd))
    return ""


def _kcmp() -> str:
    with _Child() as child:
        libc.syscall("kcmp", libc.NR_KCMP, os.getpid(), child.pid, risks.KCMP_VM, 0, 0)
    return ""


def _frames() -> str:
    memory = ctypes.create_string_buffer(b"touched", PAGE_SIZE)
    if not pageentries.own_pfn(ctypes.addressof(memory)):
        raise KsmdError("frame numbers are hidden (CAP_SYS_ADMIN)")
    return ""


def _scan() -> str:
    if not pagemap.has_scan():
        raise KsmdError("the ioctl is unknown (Linux 6.7)")
    return ""


def _device() -> str:
    os.close(uffd.open_device())
    return ""


def _uffd_feature(bit: int) -> str:
    device = uffd.open_device()
    try:
        context = uffd.create(device)
        try:
            uffd.api(context, bit)
        finally:
            os.close(context)
    finally:
        os.close(device)
    return ""


def _seals() -> str:
    extent = memfd.create_extent("ksmd-probe", 1)
    try:
        try:
            fd = os.open(f"/proc/self/fd/{extent.fd_ro}", os.O_RDWR | os.O_CLOEXEC)
        except PermissionError:
            return "mode"
        try:
            os.pwrite(fd, b"x", 0)
        except PermissionError:
            return "sealed"
        finally:
            os.close(fd)
    finally:
        memfd.release(extent)
    raise KsmdError("a sealed file could be written")


def _mlock() -> str:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit == resource.RLIM_INFINITY:
        return "RLIMIT_MEMLOCK is unlimited"
    length = libc.page_ceil(limit) + PAGE_SIZE
    flags = libc.MAP_PRIVATE | libc.MAP_ANONYMOUS | libc.MAP_NORESERVE
    address = libc.mmap(0, length, libc.PROT_READ, flags)
    try:
        libc.syscall("mlock2", _NR_MLOCK2, address, length, _MLOCK_ONFAULT)
    finally:
        libc.munmap(address, length)
    return f"beyond RLIMIT_MEMLOCK ({limit} bytes)"


def _pin() -> str:
    with mmap.mmap(-1, PAGE_SIZE) as memory, iouring.PinRing() as ring:
        buffer = ctypes.c_char.from_buffer(memory)
        ring.unpin(ring.pin(ctypes.addressof(buffer), PAGE_SIZE))
        del buffer
    return ""


def _process_madvise() -> str:
    memory = ctypes.create_string_buffer(PAGE_SIZE)
    with _Child() as child:  # which has a copy of it at the same address
        if not thp.cold(child.pidfd, [(libc.page_floor(ctypes.addressof(memory)), PAGE_SIZE)]):
            raise KsmdError("MADV_COLD did nothing")
    return ""


def _collapse() -> str:
    extent = memfd.create_extent("ksmd-probe", HUGE_PAGE_PAGES)
    try:
        try:
            data = os.lseek(extent.fd_ro, PAGE_SIZE, os.SEEK_DATA)
        except OSError:  # ENXIO: nothing but holes
            data = 0
        if data != PAGE_SIZE:
            raise KsmdError("refused: no huge page was free, or MADV_COLLAPSE is unknown")
    finally:
        memfd.release(extent)
    return ""


def _kernel_ksm() -> str:
    values = ksm.read()
    if values is None:
        raise KsmdError("the kernel was built without it")
    running = "running" if values.get("run") == 1 else "not running"
    return f"{running}, pages_sharing {values.get('pages_sharing', 0)}"


def _try(name: str, needed: bool, without: str, attempt: Callable[[], str]) -> Feature:
    try:
        return Feature(name, True, needed, attempt(), without)
    except OSError as error:
        return Feature(name, False, needed, error.strerror or str(error), without)
    except KsmdError as error:
        return Feature(name, False, needed, str(error), without)


_NO_MERGE = "nothing is merged"

_UFFD = (
    ("EVENT_FORK", uffd.FEATURE_EVENT_FORK, "a forked child would be unguarded"),
    ("EVENT_REMAP", uffd.FEATURE_EVENT_REMAP, "mremap would lose the guard"),
    ("EVENT_REMOVE", uffd.FEATURE_EVENT_REMOVE, "MADV_DONTNEED would show old content"),
    ("MISSING_SHMEM", uffd.FEATURE_MISSING_SHMEM, "holes of the store could not be answered"),
    ("MINOR_SHMEM", uffd.FEATURE_MINOR_SHMEM, "dropped pages would show old content"),
    ("MOVE", uffd.FEATURE_MOVE, "pinned pages could not be told from others"),
    ("WP_ASYNC", uffd.FEATURE_WP_ASYNC, "the quarantine's context could not be made"),
)


def probe() -> tuple[Feature, ...]:
    """Try everything ksmd leans on; some milliseconds. Call it before threads are started.

    ``needed`` features are those without which nothing is merged.
    """
    found = [
        _try("x86-64", True, f"the stub is machine code of x86-64: {_NO_MERGE}", _architecture),
        _try(
            "ptrace-seize",
            True,
            f"CAP_SYS_PTRACE is missing, or a policy forbids it: {_NO_MERGE}",
            partial(_seize, 0),
        ),
        _try(
            "ptrace-suspend-seccomp",
            False,
            "needs CAP_SYS_ADMIN and no seccomp filter on ksmd itself; programs with a seccomp"
            " filter are refused",
            partial(_seize, ptrace.O_SUSPEND_SECCOMP),
        ),
        _try("pidfd-getfd", True, f"no descriptor reaches a target: {_NO_MERGE}", _pidfd_getfd),
        _try("kcmp", True, f"shared memory (CLONE_VM) would go unseen: {_NO_MERGE}", _kcmp),
        _try("pagemap-frames", False, "estimates count shared pages less well", _frames),
        _try("pagemap-scan", False, "page maps are read entry by entry, which is slower", _scan),
        _try("userfaultfd-device", True, f"no guard: {_NO_MERGE}", _device),
    ]
    found += [
        _try(
            f"userfaultfd-{name.lower().replace('_', '-')}",
            True,
            f"{loss}: {_NO_MERGE}",
            partial(_uffd_feature, bit),
        )
        for name, bit, loss in _UFFD
    ]
    return (
        *found,
        _try("memfd-seals", True, f"targets could write to the store: {_NO_MERGE}", _seals),
        _try("mlock", True, f"CAP_IPC_LOCK: the store could be swapped out: {_NO_MERGE}", _mlock),
        _try("io-uring-pin", True, f"store pages could be unmapped: {_NO_MERGE}", _pin),
        _try(
            "process-madvise",
            False,
            "huge pages of targets are not split, so parts of them are not merged",
            _process_madvise,
        ),
        _try(
            "madvise-collapse",
            False,
            "the store is filled page by page: slower, and merged memory is read a little slower",
            _collapse,
        ),
        _try(
            "large-folios",
            False,
            "the store is made of whole free blocks of 2 MiB: far slower in a virtual machine that"
            " gives these back to its host",
            thp.LargeFolios().describe,
        ),
        _try("kernel-ksm", False, "nothing: ksmd does not use it", _kernel_ksm),
    )
