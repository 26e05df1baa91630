"""The filter reader against the kernel itself, and against its own answers for known arguments."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
import struct
from collections.abc import Sequence

from hypothesis import example, given, settings
from hypothesis import strategies as st

from ksmd.core import seccomp
from ksmd.core.seccomp import (
    SECCOMP_RET_ALLOW,
    SECCOMP_RET_ERRNO,
    SECCOMP_RET_KILL_PROCESS,
    SECCOMP_RET_KILL_THREAD,
    SEVERITY,
    Instruction,
    evaluate,
)

UNUSED_NR = 1023  # no such call: ENOSYS unless a filter says otherwise
ENOSYS, ENXIO = 38, 6
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, MODE_FILTER = 38, 22, 2
INSTALL_FAILED, OTHER_FAILURE = 77, 78

K = st.sampled_from([0, 1, 2, 3, 4, 5, 8, 16, 20, 24, 31, 32, 56, 60, 64, 0x7FFFFFFF, 0xFFFFFFFF])
CODES = st.sampled_from(
    [0x00, 0x01, 0x20, 0x20, 0x20, 0x60, 0x61, 0x80, 0x81, 0x02, 0x02, 0x03, 0x07, 0x87, 0x05]
    + [0x04, 0x14, 0x24, 0x34, 0x44, 0x54, 0x64, 0x74, 0x84, 0x94, 0xA4]
    + [0x0C, 0x1C, 0x2C, 0x3C, 0x4C, 0x5C, 0x6C, 0x7C, 0xAC]
    + [0x15, 0x25, 0x35, 0x45, 0x1D, 0x2D, 0x3D, 0x4D] * 2
    + [0x28, 0x40, 0x0E]
)
FINAL = st.sampled_from(
    [SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO | ENXIO, SECCOMP_RET_KILL_PROCESS, 0x7FFE0000]
).map(lambda k: (0x06, 0, 0, k))
INSTRUCTIONS = st.one_of(st.tuples(CODES, st.integers(0, 3), st.integers(0, 3), K), FINAL)
PROGRAMS = st.tuples(
    st.lists(INSTRUCTIONS, max_size=12), st.lists(FINAL, min_size=1, max_size=4)
).map(lambda parts: [*parts[0], *parts[1]])
WORDS = st.sampled_from([0, 1, 2, 5, 31, 32, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 32, (1 << 64) - 1])
ARGS = st.tuples(*[WORDS] * 6)

libc = ctypes.CDLL(None, use_errno=True)


def kernel_says(program: Sequence[Instruction], args: Sequence[int]) -> int | None:
    """What the kernel makes of the call in a child of ours; None if it refuses the program."""
    pid = os.fork()
    if pid == 0:
        os._exit(_child(program, args))
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGSYS
        return SECCOMP_RET_KILL_PROCESS
    code = os.WEXITSTATUS(status)
    if code == INSTALL_FAILED:
        return None
    return {ENOSYS: SECCOMP_RET_ALLOW, ENXIO: SECCOMP_RET_ERRNO}[code]


def _child(program: Sequence[Instruction], args: Sequence[int]) -> int:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # only the unused call meets the program: the child needs all others to live and to exit
    guarded = [
        *((0x20, 0, 0, 0), (0x15, 1, 0, UNUSED_NR), (0x06, 0, 0, SECCOMP_RET_ALLOW)),
        *((0x00, 0, 0, 0), *program),  # A is 0 at a program's start
    ]
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in guarded)
    held = ctypes.create_string_buffer(code, len(code))
    head = struct.pack("=H6xQ", len(guarded), ctypes.addressof(held))
    fprog = ctypes.create_string_buffer(head, len(head))
    one, mode, zero = ctypes.c_ulong(1), ctypes.c_ulong(MODE_FILTER), ctypes.c_ulong(0)
    libc.prctl(PR_SET_NO_NEW_PRIVS, one, zero, zero, zero)
    if libc.prctl(PR_SET_SECCOMP, mode, ctypes.c_ulong(ctypes.addressof(fprog)), zero, zero):
        return INSTALL_FAILED if ctypes.get_errno() == errno.EINVAL else OTHER_FAILURE
    libc.syscall(ctypes.c_long(UNUSED_NR), *(ctypes.c_ulong(arg) for arg in args))
    return ctypes.get_errno()


@settings(max_examples=300)
@example([(0x3C, 0, 0, 0), (0x06, 0, 0, SECCOMP_RET_ALLOW)], (0,) * 6)
@given(PROGRAMS, ARGS)
def test_the_kernel_gives_the_same_answer(program: list[Instruction], args: list[int]) -> None:
    said = kernel_says(program, args)
    expected = evaluate(program, UNUSED_NR, args)
    if said is None:
        assert not seccomp._valid(program)
        assert expected == SECCOMP_RET_KILL_PROCESS
        return
    assert seccomp._valid(program)
    if expected == SECCOMP_RET_KILL_THREAD:
        assert said == SECCOMP_RET_KILL_PROCESS  # the only thread: a death by SIGSYS either way
    else:
        assert said == expected


@settings(max_examples=500)
@given(PROGRAMS, ARGS, st.sets(st.integers(0, 5)))
def test_an_unknown_argument_is_never_judged_more_kindly_than_any_value_of_it(
    program: list[Instruction], args: tuple[int, ...], unknown: set[int]
) -> None:
    feared = evaluate(
        program, UNUSED_NR, [None if i in unknown else arg for i, arg in enumerate(args)]
    )
    concrete = evaluate(program, UNUSED_NR, args)
    assert SEVERITY.index(feared) <= SEVERITY.index(concrete)


@given(st.lists(st.tuples(*[st.integers(0, 1 << 33)] * 4), max_size=20))
def test_no_sequence_of_numbers_makes_it_raise(program: list[Instruction]) -> None:
    assert evaluate(program, 0) in SEVERITY
