"""System calls that Python's os module lacks, by number, and the one place where errno is read.

Every wrapper raises :class:`OSError` with the call's name; callers inside ``kernel`` translate it
into a :class:`~ksmd.model.errors.KsmdError` or a refusal where they know what it means.
Numbers are those of x86-64 (arch/x86/entry/syscalls/syscall_64.tbl).
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

from ksmd.model.units import PAGE_SIZE

_libc = ctypes.CDLL(None, use_errno=True)

_syscall = _libc.syscall
_syscall.restype = ctypes.c_long

_mmap = _libc.mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_MAP_FAILED = ctypes.c_void_p(-1).value

NR_KCMP = 312
NR_PIDFD_GETFD = 438
NR_PROCESS_MADVISE = 440

PROT_NONE = 0
PROT_READ = 1
PROT_WRITE = 2
PROT_EXEC = 4
MAP_SHARED = 0x01
MAP_PRIVATE = 0x02
MAP_FIXED = 0x10
MAP_ANONYMOUS = 0x20
MAP_NORESERVE = 0x4000
MADV_DONTNEED = 4
MADV_HUGEPAGE = 14
MADV_NOHUGEPAGE = 15
MADV_COLD = 20
MADV_POPULATE_READ = 22
MADV_POPULATE_WRITE = 23
MADV_COLLAPSE = 25
MCL_CURRENT = 1
MCL_FUTURE = 2


def oserror(name: str, number: int | None = None) -> OSError:
    """Build the OSError of the call *name* from *number*, by default the current errno."""
    code = ctypes.get_errno() if number is None else number
    return OSError(code, f"{name}: {os.strerror(code)}")


def syscall(name: str, number: int, *args: Any) -> int:
    """Make the system call *number*; ints are passed as 64-bit values. Raise OSError on -1."""
    result: int = _syscall(
        ctypes.c_long(number),
        *(ctypes.c_ulong(a & (1 << 64) - 1) if isinstance(a, int) else a for a in args),
    )
    if result == -1:
        raise oserror(name)
    return result


def mmap(address: int, length: int, prot: int, flags: int, fd: int = -1, offset: int = 0) -> int:
    """mmap(2): the address of the new mapping."""
    got = _mmap(address or None, length, prot, flags, fd, offset)
    if got == _MAP_FAILED:
        raise oserror("mmap")
    return int(got or 0)


def _int_call(name: str, *args: Any) -> int:
    result = int(getattr(_libc, name)(*args))
    if result == -1:
        raise oserror(name)
    return result


def munmap(address: int, length: int) -> None:
    """munmap(2)."""
    _int_call("munmap", ctypes.c_void_p(address), ctypes.c_size_t(length))


def madvise(address: int, length: int, advice: int) -> None:
    """madvise(2) on our own memory."""
    _int_call("madvise", ctypes.c_void_p(address), ctypes.c_size_t(length), ctypes.c_int(advice))


def mprotect(address: int, length: int, prot: int) -> None:
    """mprotect(2) on our own memory."""
    _int_call("mprotect", ctypes.c_void_p(address), ctypes.c_size_t(length), ctypes.c_int(prot))


def mlock(address: int, length: int) -> None:
    """mlock(2) on our own memory."""
    _int_call("mlock", ctypes.c_void_p(address), ctypes.c_size_t(length))


def punch_hole(fd: int, offset: int, length: int) -> None:
    """fallocate(2) with FALLOC_FL_PUNCH_HOLE: that part of the file is a hole afterwards."""
    _int_call("fallocate", fd, 3, ctypes.c_long(offset), ctypes.c_long(length))


def mlockall(flags: int) -> None:
    """mlockall(2)."""
    _int_call("mlockall", ctypes.c_int(flags))


def trim_heap() -> None:
    """Give memory that is free in the heap back to the kernel: malloc_trim(3), where there is one.

    Large arrays that lie in the heap for a moment leave holes there, which glibc keeps.
    """
    trim = getattr(_libc, "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(ctypes.c_size_t(0))


def view(address: int, length: int) -> memoryview:
    """Give a writable view of *length* bytes of our own memory at *address*, without a copy."""
    return memoryview((ctypes.c_ubyte * length).from_address(address)).cast("B")


def pidfd_getfd(pidfd: int, fd: int) -> int:
    """Duplicate file descriptor *fd* of another process into ours (close-on-exec)."""
    return syscall("pidfd_getfd", NR_PIDFD_GETFD, pidfd, fd, 0)


def page_floor(address: int) -> int:
    """Round *address* down to a page boundary."""
    return address & ~(PAGE_SIZE - 1)


def page_ceil(address: int) -> int:
    """Round *address* up to a page boundary."""
    return (address + PAGE_SIZE - 1) & ~(PAGE_SIZE - 1)


def prctl(option: int, *args: int) -> None:
    """prctl(2) with numbers; unused ones are zero."""
    longs = [ctypes.c_ulong(number) for number in (*args, 0, 0, 0, 0)[:4]]
    _int_call("prctl", option, *longs)


def clone(code: int, stack: int, flags: int, argument: int) -> int:
    """clone(3): start a process that runs *code* on the stack that ends at *stack*; its pid."""
    pid = int(
        _libc.clone(ctypes.c_void_p(code), ctypes.c_void_p(stack), flags, ctypes.c_void_p(argument))
    )
    if pid < 0:
        raise oserror("clone")
    return pid


def set_name(name: str) -> None:
    """Name this process as ps shows it (PR_SET_NAME, at most 15 bytes)."""
    _int_call("prctl", 15, ctypes.c_char_p(name.encode()), 0, 0, 0)
