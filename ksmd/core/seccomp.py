"""What a process's seccomp filters would do to the system calls that a merge borrows.

While the tracer lives, PTRACE_O_SUSPEND_SECCOMP keeps the filters asleep; when it dies in the
middle of a window, the stub goes on by itself and the filters apply. So they are asked beforehand.
They are classic BPF programs over ``struct seccomp_data`` (linux/seccomp.h, 64 bytes), read by
PTRACE_SECCOMP_GET_FILTER, and are interpreted here as the kernel does it (net/core/filter.c,
kernel/seccomp.c), with one addition: an argument may be unknown (None). Wherever a filter decides
by something unknown, both ways are followed and the most severe action counts. A program that the
kernel would not have accepted, or one that takes too many steps, counts as a kill: the answer may
be too strict, never too kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

AUDIT_ARCH_X86_64 = 0xC000003E

SECCOMP_RET_KILL_PROCESS = 0x80000000
SECCOMP_RET_KILL_THREAD = 0x00000000
SECCOMP_RET_TRAP = 0x00030000
SECCOMP_RET_ERRNO = 0x00050000
SECCOMP_RET_USER_NOTIF = 0x7FC00000
SECCOMP_RET_TRACE = 0x7FF00000
SECCOMP_RET_LOG = 0x7FFC0000
SECCOMP_RET_ALLOW = 0x7FFF0000
_ACTION_FULL = 0xFFFF0000

#: From the most severe on: the kernel compares the action as a signed number (ACTION_ONLY).
SEVERITY = (
    SECCOMP_RET_KILL_PROCESS,
    SECCOMP_RET_KILL_THREAD,
    SECCOMP_RET_TRAP,
    SECCOMP_RET_ERRNO,
    SECCOMP_RET_USER_NOTIF,
    SECCOMP_RET_TRACE,
    SECCOMP_RET_LOG,
    SECCOMP_RET_ALLOW,
)

#: (code, jt, jf, k), as in struct sock_filter.
Instruction = tuple[int, int, int, int]
#: A system call: its number, or its number with its arguments, None where one is not known.
Call = int | tuple[int, Sequence[int | None]]

_MAX_INSTRUCTIONS = 4096  # BPF_MAXINSNS
_MAX_STEPS = 1 << 16
_DATA_SIZE = 64
_WORDS = 16  # BPF_MEMWORDS
_MASK = 0xFFFFFFFF

_LD_IMM, _LDX_IMM = 0x00, 0x01
_LD_ABS = 0x20
_LD_MEM, _LDX_MEM = 0x60, 0x61
_LD_LEN, _LDX_LEN = 0x80, 0x81
_ST, _STX = 0x02, 0x03
_RET_K, _RET_A = 0x06, 0x16
_TAX, _TXA = 0x07, 0x87
_JA = 0x05
_NEG = 0x84
_X = 0x08  # BPF_X: the second operand is X, not k
_ADD, _SUB, _MUL, _DIV, _OR, _AND, _LSH, _RSH, _XOR = (
    0x04, 0x14, 0x24, 0x34, 0x44, 0x54, 0x64, 0x74, 0xA4,
)  # fmt: skip
_JEQ, _JGT, _JGE, _JSET = 0x15, 0x25, 0x35, 0x45

_ALU = frozenset({_ADD, _SUB, _MUL, _DIV, _OR, _AND, _LSH, _RSH, _XOR})
_JUMPS = frozenset({_JEQ, _JGT, _JGE, _JSET})
_PLAIN = frozenset(
    {_LD_IMM, _LDX_IMM, _LD_ABS, _LD_MEM, _LDX_MEM, _LD_LEN, _LDX_LEN, _ST, _STX}
    | {_RET_K, _RET_A, _TAX, _TXA, _JA, _NEG}
)


@dataclass(frozen=True, slots=True)
class _State:
    """Where an evaluation stands. None is an unknown 32-bit value."""

    pc: int = 0
    a: int | None = 0
    x: int | None = 0
    memory: tuple[int | None, ...] = (0,) * _WORDS


def evaluate(
    program: Sequence[Instruction],
    nr: int,
    args: Sequence[int | None] = (0,) * 6,
    arch: int = AUDIT_ARCH_X86_64,
) -> int:
    """Give the action (SECCOMP_RET_*, without its data) of one filter for one system call.

    With unknown arguments it is the most severe action that they could lead to. The address of
    the call is always unknown.
    """
    if not _valid(program):
        return SECCOMP_RET_KILL_PROCESS
    data = _seccomp_data(nr, args, arch)
    worst = SECCOMP_RET_ALLOW
    waiting = [_State()]
    seen = {waiting[0]}
    for _ in range(_MAX_STEPS):
        if not waiting:
            return worst
        state = waiting.pop()
        code, jt, jf, k = program[state.pc]
        result = _action(code, k, state)
        if result is not None:
            worst = min(worst, result, key=SEVERITY.index)
            if worst == SECCOMP_RET_KILL_PROCESS:
                return worst
            continue
        for after in _step(state, code, jt, jf, k, data):
            if after not in seen:
                seen.add(after)
                waiting.append(after)
    return SECCOMP_RET_KILL_PROCESS


def blocked(
    programs: Iterable[Sequence[Instruction]], calls: Iterable[Call], arch: int = AUDIT_ARCH_X86_64
) -> list[int]:
    """Give the numbers of those *calls* that the filters, all together, would not let pass.

    Only ALLOW and LOG let a call pass. A call given by number alone is asked with all arguments
    unknown. Numbers keep their order, each once.
    """
    filters = list(programs)
    found: dict[int, None] = {}
    for call in calls:
        nr, args = (call, (None,) * 6) if isinstance(call, int) else call
        actions = (evaluate(program, nr, args, arch) for program in filters)
        if any(action not in {SECCOMP_RET_ALLOW, SECCOMP_RET_LOG} for action in actions):
            found[nr] = None
    return list(found)


def _seccomp_data(nr: int, args: Sequence[int | None], arch: int) -> list[int | None]:
    """Lay out struct seccomp_data as sixteen 32-bit words (little-endian)."""
    if len(args) > 6:
        raise ValueError("a system call has at most six arguments")
    words: list[int | None] = [nr & _MASK, arch & _MASK, None, None]
    for arg in (*args, *(0,) * (6 - len(args))):
        words += [None, None] if arg is None else [arg & _MASK, arg >> 32 & _MASK]
    return words


def _valid(program: Sequence[Instruction]) -> bool:
    """Check what bpf_check_classic() and seccomp_check_filter() check."""
    length = len(program)
    if not 0 < length <= _MAX_INSTRUCTIONS or program[-1][0] not in {_RET_K, _RET_A}:
        return False
    return all(
        0 <= jt <= 255
        and 0 <= jf <= 255
        and 0 <= k <= _MASK
        and _valid_instruction(code, jt, jf, k, length - pc - 1)
        for pc, (code, jt, jf, k) in enumerate(program)
    ) and _stores_precede_loads(program)


def _valid_instruction(code: int, jt: int, jf: int, k: int, left: int) -> bool:
    """*left* is the number of instructions that follow."""
    if code == _LD_ABS:
        return k % 4 == 0 and k < _DATA_SIZE
    if code in {_LD_MEM, _LDX_MEM, _ST, _STX}:
        return k < _WORDS
    if code == _JA:
        return k < left
    if code & ~_X in _JUMPS:
        return jt < left and jf < left
    if code == _DIV:
        return k != 0
    if code in {_LSH, _RSH}:
        return k < 32
    return code in _PLAIN or code & ~_X in _ALU


def _stores_precede_loads(program: Sequence[Instruction]) -> bool:
    """Check that no scratch word is loaded before every way to it has stored it."""
    stored = [(1 << _WORDS) - 1] * len(program)  # words stored on every way to here
    here = 0
    for pc, (code, jt, jf, k) in enumerate(program):
        here &= stored[pc]
        if code in {_ST, _STX}:
            here |= 1 << k
        elif code in {_LD_MEM, _LDX_MEM} and not here & 1 << k:
            return False
        elif code == _JA:
            stored[pc + 1 + k] &= here
            here = -1
        elif code & ~_X in _JUMPS:
            stored[pc + 1 + jt] &= here
            stored[pc + 1 + jf] &= here
            here = -1
    return True


def _action(code: int, k: int, state: _State) -> int | None:
    """Give the action if this instruction ends the program, else None.

    A division by zero ends it with 0; one by something unknown is taken for the worst.
    """
    if code == _DIV | _X and not state.x:
        return SECCOMP_RET_KILL_PROCESS if state.x is None else SECCOMP_RET_KILL_THREAD
    if code not in {_RET_K, _RET_A}:
        return None
    value = k if code == _RET_K else state.a
    if value is None:
        return SECCOMP_RET_KILL_PROCESS
    action = value & _ACTION_FULL
    return action if action in SEVERITY else SECCOMP_RET_KILL_PROCESS


def _step(
    state: _State, code: int, jt: int, jf: int, k: int, data: list[int | None]
) -> Iterable[_State]:
    """Carry out one instruction that does not end the program."""
    following = state.pc + 1
    if code == _JA:
        return [replace(state, pc=following + k)]
    if code & ~_X in _JUMPS:
        taken = _compare(code & ~_X, state.a, state.x if code & _X else k)
        ways = {jt, jf} if taken is None else {jt} if taken else {jf}
        return [replace(state, pc=following + way) for way in ways]
    if code & ~_X in _ALU:
        a = _compute(code & ~_X, state.a, state.x if code & _X else k)
        return [replace(state, pc=following, a=a)]
    return [_move(state, following, code, k, data)]


def _move(state: _State, pc: int, code: int, k: int, data: list[int | None]) -> _State:
    """Carry out a load, a store, a copy between registers or a negation."""
    if code in {_ST, _STX}:
        value = state.a if code == _ST else state.x
        return replace(state, pc=pc, memory=(*state.memory[:k], value, *state.memory[k + 1 :]))
    if code in {_LDX_IMM, _LDX_MEM, _LDX_LEN, _TAX}:
        x = {_LDX_IMM: k, _LDX_LEN: _DATA_SIZE, _TAX: state.a}
        return replace(state, pc=pc, x=state.memory[k] if code == _LDX_MEM else x[code])
    if code == _LD_ABS:
        return replace(state, pc=pc, a=data[k // 4])
    if code == _LD_MEM:
        return replace(state, pc=pc, a=state.memory[k])
    if code == _NEG:
        return replace(state, pc=pc, a=None if state.a is None else -state.a & _MASK)
    return replace(state, pc=pc, a={_LD_IMM: k, _LD_LEN: _DATA_SIZE, _TXA: state.x}[code])


def _compare(code: int, a: int | None, b: int | None) -> bool | None:
    if a is None or b is None:
        return None
    return {_JEQ: a == b, _JGT: a > b, _JGE: a >= b, _JSET: bool(a & b)}[code]


def _compute(code: int, a: int | None, b: int | None) -> int | None:
    """Unsigned 32-bit arithmetic; shifts by a register count modulo 32, as on the CPU."""
    if code == _AND and 0 in {a, b}:
        return 0
    if a is None or b is None:
        return None
    if code == _DIV:
        return a // b
    if code in {_LSH, _RSH}:
        return (a << (b & 31) if code == _LSH else a >> (b & 31)) & _MASK
    value = {_ADD: a + b, _SUB: a - b, _MUL: a * b, _OR: a | b, _AND: a & b, _XOR: a ^ b}[code]
    return value & _MASK
