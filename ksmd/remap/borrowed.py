"""The borrowed thread: infect, run the stub, cure.

Registers change first and the signal mask second; on the way back the mask goes first. The other
order could leave a thread with every signal blocked. From its start the stub ends by itself: if
something here goes wrong while it runs, the right thing to do is to let it go on.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Final

from ksmd.kernel import libc, procfs, ptrace
from ksmd.kernel.ptrace import Registers
from ksmd.model.errors import TargetGoneError
from ksmd.model.refusal import Reason
from ksmd.model.window import Op
from ksmd.remap import frame, stub
from ksmd.remap.frame import Anchor, Gadgets
from ksmd.remap.places import SCRATCH, SCRATCH_STEP, SCRATCH_TRIES
from ksmd.remap.stop import DeadlineError, RefusedError, Thread, identify, remembered_call
from ksmd.remap.wire import Batch

if TYPE_CHECKING:
    from ksmd.remap.session import Session

_STUB_STACK: Final = 16384
_MAP_SCRATCH: Final = 0x100022  # MAP_FIXED_NOREPLACE | MAP_ANONYMOUS | MAP_PRIVATE
_READ_EXEC: Final = 5
_READ_WRITE: Final = 3
_MMAP: Final = 9
_MPROTECT: Final = 10
_MUNMAP: Final = 11
_WALL: Final = 0x40000000
_SI_TKILL: Final = -6
_ALL: Final = (1 << 64) - 1
_TRAP_AND_RESUME_FLAGS: Final = 0x10100  # TF | RF in eflags


class StubLostError(Exception):
    """The stub crashed in the target. Nothing is known of its memory any more."""


@dataclass(slots=True)
class Contexts:
    """File descriptors that a window hands to the stub; -1 where there is none."""

    alive: int
    track: int = -1
    guard: int = -1
    store: int = -1


@dataclass(slots=True)
class Outcome:
    """What the stub said: the records as it left them, its own error, times in microseconds."""

    records: bytes = b""
    error: int = 0
    kept: int = 0
    threads: int = 0
    times: dict[str, float] = field(default_factory=dict)


class Borrowed:
    """The thread that runs the stub: infect on entry, cure on exit."""

    def __init__(
        self, session: Session, thread: Thread, anchor: Anchor, found: Gadgets, xstate: bytes
    ) -> None:
        self._session = session
        self._thread = thread
        self._anchor = anchor
        self._gadgets = found
        self._xstate = xstate
        self._mask = ptrace.getsigmask(thread.tid)
        self._own = identify(session.pid, thread.tid)
        self._changed = False
        self._running = False
        self._phase = 0
        self._header = b""
        self._scratch = (0, 0)
        self._pagemap = -1

    def __enter__(self) -> Borrowed:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Cure: the mask first, then the registers."""
        if self._pagemap >= 0:
            os.close(self._pagemap)
        if not self._changed or self._thread.tid not in self._session.stopped.threads:
            return
        if isinstance(error, ProcessLookupError | TargetGoneError):
            return  # it was killed: there is nobody to cure
        if self._running and not isinstance(error, StubLostError):
            # the stub finds its way home; what we set now would cut it short, so the tracer leaves
            raise DeadlineError from error
        if self._scratch[1] and not isinstance(error, StubLostError):
            self._call(_MUNMAP, *self._scratch)
        ptrace.setsigmask(self._thread.tid, self._mask)
        ptrace.setregs(self._thread.tid, self._thread.registers)
        if self._anchor.saved is not None:
            self._session.memory.write(self._anchor.address, self._anchor.saved)

    def _wait(self) -> tuple[int, int]:
        """Wait for the thread: (event, signal) of its stop."""
        _, status = os.waitpid(self._thread.tid, _WALL)
        if not os.WIFSTOPPED(status):
            self._session.stopped.lost(self._thread.tid)
            raise RefusedError(Reason.GONE)
        return status >> 16, os.WSTOPSIG(status)

    def _syscall_stop(self) -> None:
        """Resume to the next system call entry or exit."""
        while True:
            ptrace.to_syscall(self._thread.tid)
            event, number = self._wait()
            if event == 0 and number == ptrace.SYSCALL_STOP:
                return
            self._keep_signal(event, number)

    def _keep_signal(self, event: int, number: int) -> None:
        """Note a signal that came in between. A fault means that the stub has crashed."""
        if event == ptrace.EVENT_STOP:
            return  # a group stop traps once more; resuming is all it needs
        if number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGSYS, signal.SIGFPE):
            raise StubLostError(signal.Signals(number).name)
        if number in (signal.SIGSTOP, self._own.marker):
            self._session.resend.add(number)

    def _set(self, **values: int) -> None:
        registers: Registers = self._thread.registers.copy()
        registers.set(orig_rax=-1, **values)
        registers.set(eflags=registers.field("eflags") & ~_TRAP_AND_RESUME_FLAGS)
        ptrace.setregs(self._thread.tid, registers)
        self._changed = True

    def _call(self, number: int, *args: int) -> int:
        """One system call through the gadget; it returns into the way home if we die."""
        names = ("rdi", "rsi", "rdx", "r10", "r8", "r9")
        self._set(
            rax=number,
            rip=self._gadgets.syscall_ret,
            rsp=self._anchor.address,
            **dict(zip(names, args, strict=False)),
        )
        ptrace.setsigmask(self._thread.tid, _ALL & ~(1 << (self._own.marker - 1)))
        self._syscall_stop()
        self._syscall_stop()
        return ptrace.getregs(self._thread.tid).signed("rax")

    def _map_scratch(self, length: int) -> int:
        """Lay down the way home, then map memory for the stub: its address.

        All of it is executable until the stub makes the part behind its code writable instead:
        nothing is both, so a program that denies itself such memory (PR_SET_MDWE) is no obstacle.
        What goes into it is written past protection.
        """
        again = frame.interrupted_call(
            self._thread.registers, remembered_call(self._session.pid, self._thread.tid)
        )
        got = 0
        for attempt in range(SCRATCH_TRIES):
            address = SCRATCH + attempt * SCRATCH_STEP
            home = frame.build(
                again, self._xstate, self._mask, self._anchor.address, self._gadgets,
                (address, length),
            )  # fmt: skip
            self._session.memory.write(self._anchor.address, home)
            got = self._call(_MMAP, address, length, _READ_EXEC, _MAP_SCRATCH, -1, 0)
            if got == address:
                self._scratch = (address, length)
                return address
        raise RefusedError(Reason.WINDOW_FAILED, f"mmap of scratch memory: {os.strerror(-got)}")

    def run(
        self,
        batch: Batch,
        contexts: Contexts,
        trials: Sequence[int],
        mode: int,
        device: int,
        fail: tuple[int, int, int],
    ) -> tuple[Outcome, list[int]]:
        """Map scratch memory, start the stub, hand it its descriptors and read its results."""
        memory = self._session.memory
        code = stub.code()
        code_length = libc.page_ceil(len(code))
        header_at = code_length + _STUB_STACK
        records_at = header_at + stub.HEADER_SIZE
        trials_at = records_at + len(batch) * stub.RECORD_SIZE
        length = libc.page_ceil(trials_at + len(trials) * 8)
        base = self._map_scratch(length)
        header_at, records_at, trials_at = base + header_at, base + records_at, base + trials_at
        fds = [device] if mode == stub.MODE_SETUP else self._descriptors(batch, contexts)
        header = stub.pack_header(
            header_at,
            mode=mode,
            records=records_at,
            nrecords=len(batch),
            marker=self._own.marker,
            pid=self._own.pid,
            tid=self._own.tid,
            gadget=self._gadgets.syscall_ret,
            frame=self._anchor.address + frame.F2_OFFSET,
            scratch=base,
            scratch_len=length,
            nfds=len(fds),
            trials=trials_at,
            ntrials=len(trials),
            fail_step=fail[0],
            fail_errno=fail[1],
            fail_record=fail[2],
            **batch.spans,
        )
        memory.write(base, code)
        memory.write(header_at, header + batch.tobytes() + array("Q", trials).tobytes())
        self._running = True
        self._set(
            rip=base, rsp=_stack(header_at), rbx=header_at,
            rax=_MPROTECT, rdi=base + code_length, rsi=length - code_length, rdx=_READ_WRITE,
        )  # fmt: skip
        self._until(header_at, 1)
        if not self._phase:
            self._leave()
            raise RefusedError(Reason.WINDOW_FAILED, "mprotect of scratch memory failed")
        self._hand_over(fds)
        taken = self._take(header_at) if mode == stub.MODE_SETUP else []
        started = time.perf_counter()
        self._until(header_at, 3)
        outcome = self._results(records_at, len(batch))
        outcome.times["stub"] = (time.perf_counter() - started) * 1e6
        self._leave()
        return outcome, taken

    def _leave(self) -> None:
        """Let the stub unmap its memory, which is the last thing it does."""
        self._syscall_stop()
        self._syscall_stop()
        self._running, self._scratch = False, (0, 0)

    def _until(self, header_at: int, phase: int) -> None:
        """Run the stub to that marker, or to a later one: after an error it skips some.

        Where it has nothing that it can write to its one marker comes before the first phase, and
        from its entry: nothing was pushed on the stack. Any other one like it is not the stub's.
        """
        while self._phase < phase:
            ptrace.cont(self._thread.tid)
            event, number = self._wait()
            if event == 0 and number == self._own.marker and self._is_ours():
                self._header = self._session.memory.read(header_at, stub.HEADER_SIZE)
                self._phase = self._field("phase")
                if not self._phase and self._stack_pointer() == _stack(header_at):
                    return
            else:
                self._keep_signal(event, number)

    def _is_ours(self) -> bool:
        """Tell the stub's tgkill(2) of itself from the same signal sent by anyone else."""
        info = ptrace.getsiginfo(self._thread.tid)
        code, sender = struct.unpack_from("=i4xi", info, 8)
        return bool(code == _SI_TKILL and sender == self._own.pid)

    def _stack_pointer(self) -> int:
        return ptrace.getregs(self._thread.tid).field("rsp")

    def _field(self, name: str) -> int:
        """Give a field of the stub's header, as it was at the last marker."""
        return stub.field_of(self._header, name)

    def _getfd(self, number: int) -> int:
        return libc.pidfd_getfd(self._session.pidfd, number)

    def _hand_over(self, fds: list[int]) -> None:
        """Queue *fds* on the stub's own socket: no path, no namespace, no name is needed."""
        number = self._field("socket")
        if number < 0:
            return  # the stub reports it
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))]
        # all of its kind is said, for it would be asked for otherwise
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM, 0, self._getfd(number)) as end:
            end.bind("")
            end.connect(end.getsockname())
            end.sendmsg([b"x"], rights, socket.MSG_DONTWAIT)

    def _descriptors(self, batch: Batch, contexts: Contexts) -> list[int]:
        fds = [contexts.alive]
        if contexts.track >= 0:
            fds += [contexts.track, contexts.guard]
        if batch.op >= Op.UNMERGE:
            path = procfs.task_path(self._session.pid, "pagemap", self._session.tid)
            self._pagemap = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            fds.append(self._pagemap)
        if contexts.store >= 0 and batch.op != Op.UNMERGE:  # must not need more than MERGE
            fds.append(contexts.store)
        return fds

    def _take(self, header_at: int) -> list[int]:
        """Take the two contexts that the stub made: guard, track."""
        self._until(header_at, 2)
        if self._field("error"):
            return []
        return [self._getfd(self._field(name)) for name in ("guard", "track")]

    def _results(self, records_at: int, count: int) -> Outcome:
        return Outcome(
            self._session.memory.read(records_at, count * stub.RECORD_SIZE),
            self._field("error"),
            self._field("keep"),
            threads=len(self._session.stopped.threads),
        )


def _stack(header_at: int) -> int:
    """Give the end of the stub's stack, which lies below the header."""
    return header_at - 64
