"""Seccomp filters read as the kernel reads them: never kinder."""

from __future__ import annotations

import pytest

from ksmd.core import seccomp
from ksmd.core.seccomp import (
    AUDIT_ARCH_X86_64,
    SECCOMP_RET_ALLOW,
    SECCOMP_RET_ERRNO,
    SECCOMP_RET_KILL_PROCESS,
    SECCOMP_RET_KILL_THREAD,
    SECCOMP_RET_LOG,
    SECCOMP_RET_TRACE,
    SECCOMP_RET_TRAP,
    SECCOMP_RET_USER_NOTIF,
    Instruction,
    blocked,
    evaluate,
)

LD_NR: Instruction = (0x20, 0, 0, 0)
LD_ARCH: Instruction = (0x20, 0, 0, 4)
RET_A: Instruction = (0x16, 0, 0, 0)


def ret(action: int) -> Instruction:
    return (0x06, 0, 0, action)


ALLOW = ret(SECCOMP_RET_ALLOW)
KILL = ret(SECCOMP_RET_KILL_PROCESS)


def ld_arg(number: int, high: bool = False) -> Instruction:
    return (0x20, 0, 0, 16 + 8 * number + 4 * high)


def jeq(value: int, jt: int, jf: int) -> Instruction:
    return (0x15, jt, jf, value)


def computing(*body: Instruction) -> int:
    """The value that the body leaves in A, seen through two comparisons with each bit."""
    value = 0
    for bit in range(32):
        program = [*body, (0x45, 0, 1, 1 << bit), ret(SECCOMP_RET_ERRNO), ALLOW]
        if evaluate(program, 1, (3, 5, 7, 11, 13, 1 << 40)) == SECCOMP_RET_ERRNO:
            value |= 1 << bit
    return value


STRICT = [LD_ARCH, jeq(AUDIT_ARCH_X86_64, 1, 0), KILL, LD_NR, jeq(35, 1, 0), KILL, ALLOW]


def test_a_strict_filter_allows_what_it_lists_and_kills_the_rest() -> None:
    assert evaluate(STRICT, 35) == SECCOMP_RET_ALLOW
    assert evaluate(STRICT, 9) == SECCOMP_RET_KILL_PROCESS
    assert evaluate(STRICT, 35, arch=0x40000003) == SECCOMP_RET_KILL_PROCESS


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ([(0x00, 0, 0, 0x12345678)], 0x12345678),  # ld imm
        ([(0x80, 0, 0, 0)], 64),  # ld len
        ([(0x81, 0, 0, 0), (0x87, 0, 0, 0)], 64),  # ldx len; txa
        ([LD_NR], 1),
        ([LD_ARCH], AUDIT_ARCH_X86_64),
        ([ld_arg(1)], 5),
        ([ld_arg(5)], 0),
        ([ld_arg(5, high=True)], 1 << 8),
        ([ld_arg(0), (0x04, 0, 0, 0xFFFFFFFF)], 2),  # add wraps
        ([ld_arg(0), (0x14, 0, 0, 4)], 0xFFFFFFFF),  # sub wraps
        ([ld_arg(2), (0x24, 0, 0, 6)], 42),
        ([ld_arg(3), (0x34, 0, 0, 2)], 5),
        ([ld_arg(0), (0x44, 0, 0, 8)], 11),
        ([ld_arg(2), (0x54, 0, 0, 5)], 5),
        ([ld_arg(2), (0x64, 0, 0, 31)], 0x80000000),  # lsh drops what leaves
        ([ld_arg(3), (0x74, 0, 0, 1)], 5),
        ([ld_arg(2), (0xA4, 0, 0, 2)], 5),
        ([ld_arg(0), (0x84, 0, 0, 0)], 0xFFFFFFFD),  # neg
        ([(0x01, 0, 0, 33), ld_arg(0), (0x6C, 0, 0, 0)], 6),  # lsh by x: modulo 32
        ([(0x01, 0, 0, 3), ld_arg(3), (0x3C, 0, 0, 0)], 3),  # div x
        ([ld_arg(4), (0x07, 0, 0, 0), ld_arg(0), (0x0C, 0, 0, 0)], 16),  # tax; add x
        ([ld_arg(4), (0x02, 0, 0, 15), (0x00, 0, 0, 0), (0x60, 0, 0, 15)], 13),  # st; ld mem
        ([(0x01, 0, 0, 9), (0x03, 0, 0, 2), (0x61, 0, 0, 2), (0x87, 0, 0, 0)], 9),  # stx; ldx mem
        ([(0x05, 0, 0, 1), (0x00, 0, 0, 1), (0x80, 0, 0, 0)], 64),  # ja
    ],
)
def test_instructions_compute_as_the_kernel_does(body: list[Instruction], expected: int) -> None:
    assert computing(*body) == expected


@pytest.mark.parametrize(
    ("code", "a", "k", "taken"),
    [
        (0x15, 5, 5, True),
        (0x15, 5, 6, False),
        (0x25, 6, 5, True),
        (0x25, 5, 5, False),
        (0x25, 0x80000000, 1, True),  # unsigned
        (0x35, 5, 5, True),
        (0x35, 4, 5, False),
        (0x45, 6, 2, True),
        (0x45, 6, 9, False),
    ],
)
@pytest.mark.parametrize("by_x", [False, True])
def test_jumps_compare_unsigned(code: int, a: int, k: int, taken: bool, by_x: bool) -> None:
    jump: Instruction = (code | 0x08, 0, 1, 0) if by_x else (code, 0, 1, k)
    program = [(0x01, 0, 0, k), (0x00, 0, 0, a), jump, ALLOW, KILL]
    assert evaluate(program, 0) == (SECCOMP_RET_ALLOW if taken else SECCOMP_RET_KILL_PROCESS)


def test_division_by_zero_kills_the_thread() -> None:
    assert evaluate([(0x01, 0, 0, 0), (0x3C, 0, 0, 0), ALLOW], 0) == SECCOMP_RET_KILL_THREAD


@pytest.mark.parametrize(
    ("value", "action"),
    [
        (SECCOMP_RET_ERRNO | 38, SECCOMP_RET_ERRNO),
        (SECCOMP_RET_TRACE | 0xFFFF, SECCOMP_RET_TRACE),
        (SECCOMP_RET_KILL_THREAD | 7, SECCOMP_RET_KILL_THREAD),
        (0x7FFE0000, SECCOMP_RET_KILL_PROCESS),  # an action nobody knows kills
        (0x00010000, SECCOMP_RET_KILL_PROCESS),
    ],
)
def test_the_action_is_told_without_its_data(value: int, action: int) -> None:
    assert evaluate([ret(value)], 0) == action
    assert evaluate([(0x00, 0, 0, value), RET_A], 0) == action


@pytest.mark.parametrize(
    "program",
    [
        [],
        [LD_NR],
        [LD_NR, (0x15, 0, 0, 0)],
        [(0x20, 0, 0, 64), ALLOW],
        [(0x20, 0, 0, 2), ALLOW],
        [(0x28, 0, 0, 0), ALLOW],  # ld half word
        [(0x30, 0, 0, 0), ALLOW],  # ld byte
        [(0x40, 0, 0, 0), ALLOW],  # ld ind
        [(0x94, 0, 0, 3), ALLOW],  # mod: not for seccomp
        [(0x34, 0, 0, 0), ALLOW],  # div 0
        [(0x64, 0, 0, 32), ALLOW],
        [(0x02, 0, 0, 16), ALLOW],
        [(0x60, 0, 0, 3), ALLOW],  # load before store
        [(0x15, 0, 1, 0), (0x02, 0, 0, 3), (0x60, 0, 0, 3), ALLOW],  # store on one way only
        [(0x05, 0, 0, 1), ALLOW],
        [(0x05, 0, 0, 0xFFFFFFFF), ALLOW],
        [(0x15, 1, 0, 0), ALLOW],
        [(0xFFFF, 0, 0, 0), ALLOW],
        [(0x84 | 0x08, 0, 0, 0), ALLOW],
        [ALLOW] * 4097,
    ],
)
def test_a_program_that_the_kernel_would_refuse_counts_as_a_kill(
    program: list[Instruction],
) -> None:
    assert evaluate(program, 35) == SECCOMP_RET_KILL_PROCESS


def test_the_longest_program_is_still_read_to_its_end() -> None:
    assert evaluate([LD_NR] * 4095 + [ALLOW], 0) == SECCOMP_RET_ALLOW


BY_ARGUMENT = [LD_NR, jeq(41, 0, 3), ld_arg(0), jeq(1, 1, 0), ret(SECCOMP_RET_ERRNO | 97), ALLOW]


def test_known_arguments_are_compared_and_unknown_ones_feared() -> None:
    assert evaluate(BY_ARGUMENT, 41, (1,)) == SECCOMP_RET_ALLOW
    assert evaluate(BY_ARGUMENT, 41, (2,)) == SECCOMP_RET_ERRNO
    assert evaluate(BY_ARGUMENT, 41, (None,)) == SECCOMP_RET_ERRNO
    assert evaluate(BY_ARGUMENT, 42, (None,)) == SECCOMP_RET_ALLOW


def test_a_mask_of_zero_makes_an_unknown_argument_known() -> None:
    program = [ld_arg(0), (0x54, 0, 0, 0), jeq(0, 0, 1), ALLOW, KILL]
    assert evaluate(program, 0, (None,)) == SECCOMP_RET_ALLOW


@pytest.mark.parametrize(
    "body",
    [
        [ld_arg(0), (0x07, 0, 0, 0), (0x3C, 0, 0, 0)],  # division by an unknown value
        [ld_arg(0), RET_A],
    ],
)
def test_what_an_unknown_argument_may_do_at_worst_is_a_kill(body: list[Instruction]) -> None:
    assert evaluate([*body, ALLOW], 0, (None,)) == SECCOMP_RET_KILL_PROCESS


def test_a_filter_that_branches_without_end_on_the_unknown_counts_as_a_kill() -> None:
    # every bit doubles the number of different states
    body: list[Instruction] = [ld_arg(0), (0x02, 0, 0, 0), (0x00, 0, 0, 0), (0x02, 0, 0, 1)]
    for bit in range(24):
        body += [(0x60, 0, 0, 0), (0x45, 0, 3, 1 << bit), (0x60, 0, 0, 1)]
        body += [(0x04, 0, 0, 1 << bit), (0x02, 0, 0, 1)]
    assert evaluate([*body, ALLOW], 0, (None,)) == SECCOMP_RET_KILL_PROCESS
    assert evaluate([*body, ALLOW], 0, (5,)) == SECCOMP_RET_ALLOW


def test_all_filters_together_must_let_a_call_pass() -> None:
    no_mmap = [LD_NR, jeq(9, 0, 1), ret(SECCOMP_RET_ERRNO | 1), ALLOW]
    no_socket = [LD_NR, jeq(41, 0, 1), ret(SECCOMP_RET_USER_NOTIF), ALLOW]
    log = [ret(SECCOMP_RET_LOG)]
    assert blocked([log, no_mmap, no_socket], [35, 41, 9, 9, 3]) == [41, 9]
    assert blocked([log], [9, 41]) == []
    assert blocked([], [9]) == []


def test_calls_may_come_with_the_arguments_that_are_known() -> None:
    assert blocked([BY_ARGUMENT], [41]) == [41]
    assert blocked([BY_ARGUMENT], [(41, (1, None, None))]) == []
    assert blocked([BY_ARGUMENT], [(41, (1,)), (41, (16,)), 42]) == [41]


@pytest.mark.parametrize(
    "action",
    [
        SECCOMP_RET_KILL_PROCESS,
        SECCOMP_RET_KILL_THREAD,
        SECCOMP_RET_TRAP,
        SECCOMP_RET_ERRNO,
        SECCOMP_RET_USER_NOTIF,
        SECCOMP_RET_TRACE,
    ],
)
def test_only_allow_and_log_let_a_call_pass(action: int) -> None:
    assert blocked([[ret(action)]], [1]) == [1]


def test_more_than_six_arguments_are_a_mistake_of_ours() -> None:
    with pytest.raises(ValueError, match="six"):
        seccomp.evaluate([ALLOW], 0, (0,) * 7)
