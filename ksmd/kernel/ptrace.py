"""ptrace(2) through python-ptrace's binding, with the requests that it has no name for.

Every verb works on one thread (tid) that the *calling thread* has seized. A tracee that is gone or
is not stopped raises ProcessLookupError (ESRCH); one that may not be traced PermissionError.
Request numbers as in include/uapi/linux/ptrace.h.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ptrace import PtraceError
from ptrace.binding import ptrace_registers_t
from ptrace.binding.func import (
    PTRACE_CONT,
    PTRACE_DETACH,
    PTRACE_GETSIGINFO,
    PTRACE_O_TRACESYSGOOD,
    PTRACE_SYSCALL,
)
from ptrace.binding.func import ptrace as _ptrace

from ksmd.kernel import procfs

GETREGS: Final = 12
SETREGS: Final = 13
GETREGSET: Final = 0x4204
SEIZE: Final = 0x4206
INTERRUPT: Final = 0x4207
GETSIGMASK: Final = 0x420A
SETSIGMASK: Final = 0x420B
SECCOMP_GET_FILTER: Final = 0x420C
GET_RSEQ_CONFIGURATION: Final = 0x420F

EVENT_STOP: Final = 128
O_SUSPEND_SECCOMP: Final = 1 << 21
_SYS_ADMIN: Final = 21
NT_X86_XSTATE: Final = 0x202
SYSCALL_STOP: Final = 0x85  # SIGTRAP | 0x80, with PTRACE_O_TRACESYSGOOD

_MASK64 = (1 << 64) - 1
_WORDS: Final = struct.Struct("=27Q")
_XSTATE_MAX = 16384


class Registers(ptrace_registers_t):  # type: ignore[misc]  # python-ptrace ships no types
    """struct user_regs_struct, with a copy. Fields are unsigned 64-bit."""

    @classmethod
    def places(cls, names: Sequence[str]) -> tuple[int, ...]:
        """Give where these fields are in :meth:`words`."""
        order = [name for name, *_ in cls._fields_]
        return tuple(order.index(name) for name in names)

    def words(self) -> tuple[int, ...]:
        """Give all fields, in the kernel's order."""
        return _WORDS.unpack(self)

    def copy(self) -> Registers:
        """Give an independent copy."""
        same: Registers = Registers.from_buffer_copy(self)
        return same

    def field(self, name: str) -> int:
        """Give field *name* as an int."""
        return int(getattr(self, name))

    def signed(self, name: str) -> int:
        """Give field *name* as a signed number, as the kernel reads return values."""
        value = self.field(name)
        return value - (1 << 64) if value >> 63 else value

    def set(self, **values: int) -> Registers:
        """Set fields; negative values wrap to 64 bits. Returns itself."""
        for name, value in values.items():
            setattr(self, name, value & _MASK64)
        return self


class _Iovec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


@dataclass(frozen=True, slots=True)
class RseqConfiguration:
    """Where a thread's struct rseq lies; 0 when it has registered none."""

    address: int
    size: int


def _request(command: int, tid: int, address: int = 0, data: int = 0) -> int:
    try:
        return int(_ptrace(command, tid, address, data))
    except PtraceError as error:
        code = error.errno or 0
        raise OSError(code, f"ptrace {command:#x} on {tid}: {os.strerror(code)}") from None


def seize(tid: int, options: int | None = None) -> None:
    """Attach without stopping; filters are suspended where that is possible."""
    if options is None:
        options = PTRACE_O_TRACESYSGOOD | (O_SUSPEND_SECCOMP if may_suspend_seccomp() else 0)
    _request(SEIZE, tid, 0, options)


@functools.cache
def may_suspend_seccomp() -> bool:
    """Tell whether we may suspend and read the filters of others (kernel/ptrace.c, seccomp.c).

    That takes CAP_SYS_ADMIN, and no filter on ourselves.
    """
    fields = procfs.status_fields(os.getpid())
    return fields.get("Seccomp", "0") == "0" and bool(int(fields["CapEff"], 16) >> _SYS_ADMIN & 1)


def interrupt(tid: int) -> None:
    """Ask a seized thread to stop."""
    _request(INTERRUPT, tid)


def cont(tid: int, signal: int = 0) -> None:
    """Resume, delivering *signal* if it stopped for one."""
    _request(PTRACE_CONT, tid, 0, signal)


def to_syscall(tid: int, signal: int = 0) -> None:
    """Resume until the next entry to or exit from a system call."""
    _request(PTRACE_SYSCALL, tid, 0, signal)


def detach(tid: int, signal: int = 0) -> None:
    """Let the thread go, with *signal* delivered if it stopped for one."""
    _request(PTRACE_DETACH, tid, 0, signal)


def getregs(tid: int) -> Registers:
    """General registers of a stopped thread."""
    registers = Registers()
    _request(GETREGS, tid, 0, ctypes.addressof(registers))
    return registers


def setregs(tid: int, registers: Registers) -> None:
    """Set the general registers of a stopped thread."""
    _request(SETREGS, tid, 0, ctypes.addressof(registers))


def getxstate(tid: int) -> bytes:
    """x87, SSE, AVX, ... state in XSAVE layout (NT_X86_XSTATE)."""
    buffer = ctypes.create_string_buffer(_XSTATE_MAX)
    vector = _Iovec(ctypes.addressof(buffer), _XSTATE_MAX)
    _request(GETREGSET, tid, NT_X86_XSTATE, ctypes.addressof(vector))
    return buffer.raw[: vector.length]


def getsigmask(tid: int) -> int:
    """Blocked signals, bit n-1 for signal n."""
    mask = ctypes.c_uint64()
    _request(GETSIGMASK, tid, 8, ctypes.addressof(mask))
    return mask.value


def setsigmask(tid: int, mask: int) -> None:
    """Set the blocked signals."""
    value = ctypes.c_uint64(mask)
    _request(SETSIGMASK, tid, 8, ctypes.addressof(value))


def getsiginfo(tid: int) -> bytes:
    """The siginfo_t (128 bytes) of the signal that a thread stopped for."""
    buffer = ctypes.create_string_buffer(128)
    _request(PTRACE_GETSIGINFO, tid, 0, ctypes.addressof(buffer))
    return buffer.raw


def rseq_configuration(tid: int) -> RseqConfiguration:
    """struct ptrace_rseq_configuration of a stopped thread (Linux 5.13)."""
    buffer = (ctypes.c_uint64 * 3)()
    _request(GET_RSEQ_CONFIGURATION, tid, ctypes.sizeof(buffer), ctypes.addressof(buffer))
    return RseqConfiguration(int(buffer[0]), int(buffer[1]) & 0xFFFFFFFF)


def seccomp_filters(tid: int) -> list[list[tuple[int, int, int, int]]]:
    """Give every classic BPF filter of a stopped thread as (code, jt, jf, k). CAP_SYS_ADMIN.

    A filter that was not made from classic BPF cannot be read: OSError(EMEDIUMTYPE).
    """
    filters: list[list[tuple[int, int, int, int]]] = []
    while True:
        try:
            count = _request(SECCOMP_GET_FILTER, tid, len(filters), 0)
        except FileNotFoundError:  # ENOENT: no filter of that number
            return filters
        buffer = (ctypes.c_uint64 * count)()
        _request(SECCOMP_GET_FILTER, tid, len(filters), ctypes.addressof(buffer))
        filters.append(
            [(w & 0xFFFF, w >> 16 & 0xFF, w >> 24 & 0xFF, w >> 32) for w in map(int, buffer)]
        )
