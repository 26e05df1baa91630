"""The way home: the frames that put a borrowed thread back when its tracer is no more.

They lie in the *anchor*, the far end of the main stack, before the thread's first register is
changed. From then on whatever the thread runs ends in them:

* F1, at the anchor: munmap(scratch), then F2. It is where the first system call returns to.
* F2, 512 bytes above: a frame for rt_sigreturn(2) with all registers, the signal mask and the x87,
  SSE and AVX state of the interrupted thread.

F1 is the lower one because of the instant between the first change of the registers and that of the
signal mask: a tracer that dies there leaves a thread that may take a signal at once, and the kernel
lays a handler's frame down below the stack pointer. That must not be where F2 is.

A system call that was interrupted is made again from the start (its original number, not
restart_syscall: rt_sigreturn clears the kernel's restart block), so after the death of a tracer a
relative timeout begins anew. A living tracer never uses the frames; it sets the registers itself.

Layout: struct rt_sigframe and struct _fpx_sw_bytes, arch/x86/include/uapi/asm/sigcontext.h.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ksmd.kernel.ptrace import Registers
from ksmd.model.units import PAGE_SIZE

F2_OFFSET: Final = 512
_XSTATE_OFFSET: Final = 1024
_FP_XSTATE_MAGIC1: Final = 0x46505853
_FP_XSTATE_MAGIC2: Final = 0x46505845
_SW_BYTES: Final = slice(464, 512)  # the software-reserved bytes of the FXSAVE area
_TILE_DATA: Final = 1 << 18  # XFEATURE_MASK_XTILE_DATA, the only dynamic one
_TILE_DATA_SIZE: Final = 8192
_UC_FLAGS: Final = 6  # UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS
_UC_FP_XSTATE: Final = 1
#: An alternate stack description that sigreturn refuses, so that the program's stays as it is.
_NO_ALTSTACK: Final = 7
_ALL_BLOCKED: Final = (1 << 64) - 1
_MUNMAP: Final = 11
_EFLAGS_PLAIN: Final = 0x202

_ORDER: Final = "r8 r9 r10 r11 r12 r13 r14 r15 rdi rsi rbp rbx rdx rax rcx rsp rip eflags".split()

#: uc_flags, uc_link; ss_sp, ss_flags, padding, ss_size; registers; cs, gs, fs, ss; err, trapno,
#: oldmask, cr2; fpstate; reserved; the mask.
_UCONTEXT: Final = struct.Struct("=QQQiiQ18Q4H4QQ64xQ")
_PLACES: Final = Registers.places(_ORDER)
_SEGMENTS: Final = Registers.places(["cs", "ss"])

ERESTARTSYS: Final = 512
ERESTARTNOINTR: Final = 513
ERESTARTNOHAND: Final = 514
ERESTART_RESTARTBLOCK: Final = 516
NR_RESTART_SYSCALL: Final = 219


@dataclass(frozen=True, slots=True)
class Anchor:
    """Where the frames go: ``address`` and ``npages``; ``saved`` is put back after the window."""

    address: int
    npages: int
    saved: bytes | None


def pages_needed(xstate: int) -> int:
    """Pages that the frames take with an XSAVE area of *xstate* bytes."""
    return -(-(_XSTATE_OFFSET + xstate + 4) // PAGE_SIZE)


def interrupted_call(registers: Registers, remembered: int | None) -> Registers:
    """Give registers from which the interrupted system call is simply made again.

    *remembered* is the original number of a thread that sits in restart_syscall, whose registers
    no longer tell it.
    """
    again = registers.copy()
    if registers.signed("orig_rax") < 0:
        return again
    number, result = registers.field("orig_rax"), -registers.signed("rax")
    if number == NR_RESTART_SYSCALL and remembered is not None:
        number = remembered
    if result in (ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND, ERESTART_RESTARTBLOCK):
        again.set(rax=number, rip=registers.field("rip") - 2)
    return again


def _ucontext(
    registers: Sequence[int], segments: tuple[int, int], flags: int, mask: int, fp: int
) -> bytes:
    """Pack *registers*, in the order of _ORDER, for sigreturn."""
    code, stack = segments
    return _UCONTEXT.pack(
        flags, 0, 0, _NO_ALTSTACK, 0, 0, *registers, code, 0, 0, stack, 0, 0, 0, 0, fp, mask
    )


def for_sigreturn(xstate: bytes) -> bytes:
    """Cut from *xstate* (PTRACE_GETREGSET, NT_X86_XSTATE) what rt_sigreturn would refuse.

    ptrace gives room for every feature that the CPU has. sigreturn takes no more than the thread
    has room for, and a larger frame restores x87 and SSE alone (check_xstate_in_sigframe,
    arch/x86/kernel/fpu/signal.c). The one feature that threads get room for only when they first
    use it is AMX tile data, which is last in the layout.
    """
    all_features, in_use = struct.unpack_from("=Q40xQ", xstate, 464)
    if not all_features & _TILE_DATA or in_use & _TILE_DATA:
        return xstate
    area = bytearray(xstate[:-_TILE_DATA_SIZE])
    struct.pack_into("=Q", area, 464, all_features & ~_TILE_DATA)
    return bytes(area)


def _signed(xstate: bytes) -> bytes:
    """Add the marks by which sigreturn tells an XSAVE area from an FXSAVE area."""
    size = len(xstate)
    software = struct.pack("=II8sI", _FP_XSTATE_MAGIC1, size + 4, xstate[464:472], size)
    area = bytearray(xstate)
    area[_SW_BYTES] = software.ljust(48, b"\0")
    return bytes(area) + struct.pack("=I", _FP_XSTATE_MAGIC2)


@dataclass(frozen=True, slots=True)
class Gadgets:
    """Two places in the target's own code: ``syscall; ret``, and the restorer of its libc."""

    syscall_ret: int
    restorer: int


def is_ours(content: bytes, gadgets: Gadgets) -> bool:
    """Tell whether *content*, from the end of a stack, are frames of an earlier window."""
    restorer = struct.pack("=Q", gadgets.restorer)
    return content.startswith(restorer) and content[F2_OFFSET : F2_OFFSET + 8] == restorer


def build(
    registers: Registers,
    xstate: bytes,
    mask: int,
    anchor: int,
    gadgets: Gadgets,
    scratch: tuple[int, int],
) -> bytes:
    """Give the bytes to lay down at *anchor*; *scratch* is (address, length) of the stub's memory.

    *registers* are those to return to (see :func:`interrupted_call`), *xstate* is what
    :func:`for_sigreturn` gave, *mask* the thread's own.
    """
    words = registers.words()
    code, stack = (words[at] for at in _SEGMENTS)
    back = [words[at] for at in _PLACES]
    restorer = struct.pack("=Q", gadgets.restorer)
    f2 = restorer + _ucontext(
        back, (code, stack), _UC_FLAGS | _UC_FP_XSTATE, mask, anchor + _XSTATE_OFFSET
    )
    clean = {
        "rdi": scratch[0],
        "rsi": scratch[1],
        "rax": _MUNMAP,
        "rsp": anchor + F2_OFFSET,
        "rip": gadgets.syscall_ret,
        "eflags": _EFLAGS_PLAIN,
    }
    away = [clean.get(name, 0) for name in _ORDER]
    f1 = restorer + _ucontext(away, (code, stack), _UC_FLAGS, _ALL_BLOCKED, 0)
    return (
        f1.ljust(F2_OFFSET, b"\0") + f2.ljust(_XSTATE_OFFSET - F2_OFFSET, b"\0") + _signed(xstate)
    )
