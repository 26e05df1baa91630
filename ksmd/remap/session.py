"""One stop window of one target, as CRIU's compel would name it: stop, prepare, infect, cure.

What holds at every instant, and what tests kill the tracer for:

* Before the first register of the target is changed, the way home lies ready (frame.py).
* Registers change first and the signal mask second; on the way back the mask goes first. The other
  order could leave a thread with every signal blocked.
* From its start the stub ends by itself. If something here goes wrong while it runs, the right
  thing to do is to let it go on.

Everything runs in the thread that seized. The caller has armed an alarm (:mod:`ksmd.remap.tracer`).
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import time
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final

from ksmd.kernel import libc, procfs, ptrace
from ksmd.kernel.memory import Memory
from ksmd.kernel.ptrace import Registers
from ksmd.kernel.vmaquery import VmaQuery
from ksmd.model.errors import KsmdError
from ksmd.model.process import TargetId
from ksmd.model.refusal import Reason
from ksmd.model.units import HUGE_PAGE_SIZE, PAGE_SIZE
from ksmd.model.vma import Vma
from ksmd.model.window import Op, Record
from ksmd.remap import frame, gadgets, stub
from ksmd.remap.frame import Anchor, Gadgets
from ksmd.remap.stop import (
    RefusedError,
    Stopped,
    Thread,
    choose,
    forget_calls,
    marker_signal,
    remembered_call,
    stop,
)

#: Fixed and unusual, so that a left-over can be told; tried in steps where a program is there.
SCRATCH: Final = 0x3FF000000000
_SCRATCH_STEP: Final = 16 << 20
_SCRATCH_TRIES: Final = 4
_STUB_STACK: Final = 16384
_MAP_SCRATCH: Final = 0x100022  # MAP_FIXED_NOREPLACE | MAP_ANONYMOUS | MAP_PRIVATE
_RWX: Final = 7
_MMAP: Final = 9
_MUNMAP: Final = 11
_WALL: Final = 0x40000000
_ALL: Final = (1 << 64) - 1
_TRAP_AND_RESUME_FLAGS: Final = 0x10100  # TF | RF in eflags
_PM_IN_USE: Final = 3 << 62  # present or swapped
_STACK_DEPTH_KEPT: Final = 64 << 10
_RSEQ_CS_OFFSET: Final = 8


@dataclass(frozen=True, slots=True)
class _Places:
    """What a target's earlier window found."""

    gadgets: Gadgets
    stack_end: int


_remembered: dict[int, _Places] = {}


def forget(pid: int) -> None:
    """Drop what is remembered of a process that is gone."""
    _remembered.pop(pid, None)
    forget_calls(pid)


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
    """What the stub said: (result, stage) per record, its own error, and times in microseconds."""

    results: list[tuple[int, int]] = field(default_factory=list)
    error: int = 0
    kept: int = 0
    threads: int = 0
    times: dict[str, float] = field(default_factory=dict)


class Session:
    """A stopped target with one borrowed thread. Use as a context manager: leaving releases it."""

    def __init__(self, target: TargetId) -> None:
        self.pid = target.pid
        self._began = time.perf_counter()
        if not procfs.is_same(target):
            raise RefusedError(Reason.GONE)
        self._check_states()
        self.stopped: Stopped = stop(self.pid)
        self.stop_us = self._elapsed_us()
        self._resend: set[int] = set()
        self._pidfd = -1
        self._memory: Memory | None = None
        try:
            if not procfs.is_same(target):
                raise RefusedError(Reason.GONE)
            self._memory = Memory(self.pid, writable=True)
            self.tid = self._memory.tid
            self._pidfd = os.pidfd_open(self.pid)
        except BaseException:
            self.__exit__()
            raise

    def _elapsed_us(self) -> float:
        return (time.perf_counter() - self._began) * 1e6

    def _check_states(self) -> None:
        """Refuse early, without a stop, where a thread could not stop soon."""
        for tid in procfs.tasks(self.pid):
            try:
                state = procfs.task_stat(self.pid, tid).state
            except KsmdError:  # it ended between the two reads
                continue
            if state == "D":
                raise RefusedError(Reason.UNSTOPPABLE, f"thread {tid} is in state D")

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.release()
        for number in self._resend:
            try:
                os.kill(self.pid, number)
            except ProcessLookupError:
                break
        self._resend.clear()
        if self._memory is not None:
            self._memory.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    @property
    def memory(self) -> Memory:
        """The target's memory, writable."""
        assert self._memory is not None
        return self._memory

    # -- what the target looks like ---------------------------------------------------------

    def seccomp_filters(self) -> dict[int, list[list[tuple[int, int, int, int]]]]:
        """Give the seccomp filters of every thread that has one."""
        found = {}
        for tid in self.stopped.threads:
            if procfs.status_fields(self.pid, tid).get("Seccomp") == "2":
                found[tid] = ptrace.seccomp_filters(tid)
        return found

    def _rseq(self, tid: int) -> tuple[int, int]:
        """Give (address, size) of the thread's struct rseq; (0, 0) when it has none."""
        try:
            configuration = ptrace.rseq_configuration(tid)
        except OSError:  # a kernel without the request has no rseq to fear for ptrace (< 5.13)
            return 0, 0
        return configuration.address, configuration.size

    def _inside_rseq(self) -> set[int]:
        """Threads that stand in a restartable sequence. In a system call none does."""
        busy = set()
        for tid, thread in self.stopped.threads.items():
            if thread.in_syscall:
                continue
            address, _ = self._rseq(tid)
            if address and self.memory.read(address + _RSEQ_CS_OFFSET, 8) != bytes(8):
                busy.add(tid)
        return busy

    def _places(self, query: VmaQuery) -> tuple[Gadgets, Vma]:
        """Give the gadgets and the main stack: remembered from an earlier window, or searched.

        Reading all of maps takes milliseconds where there are many mappings; asking for two does
        not. What is remembered is checked, since execve changes all of it.
        """
        known = _remembered.get(self.pid)
        if known is not None and gadgets.still_there(self.memory, query, known.gadgets):
            stack = query.covering(known.stack_end - 1)
            if stack is not None and stack.end == known.stack_end and not stack.inode:
                return known.gadgets, stack
        vmas = procfs.maps(self.pid, self.tid)
        found = gadgets.find(self.memory, vmas)
        if found is None:
            raise RefusedError(Reason.NO_GADGET)
        stack = next((vma for vma in vmas if vma.path == "[stack]"), None)
        if stack is None:
            raise RefusedError(Reason.NO_ANCHOR, "no main stack")
        _remembered[self.pid] = _Places(found, stack.end)
        return found, stack

    def _anchor(self, stack: Vma, xstate: int, found: Gadgets) -> Anchor:
        """Find room for the frames at the far end of the main stack.

        Memory far below the stack pointer is free by the ABI. Where the main thread runs on another
        stack (coroutines) or has exited, only a page that nobody touched will do, or our own.
        """
        length = frame.pages_needed(xstate) * PAGE_SIZE
        if length > stack.end - stack.start:
            raise RefusedError(Reason.NO_ANCHOR, "the main stack is too small")
        leader = self.stopped.threads.get(self.pid)
        depth = leader.registers.field("rsp") - stack.start if leader is not None else -1
        if 0 <= depth < length + _STACK_DEPTH_KEPT:
            raise RefusedError(Reason.NO_ANCHOR, "the main stack is used down to its end")
        if not self._touched(stack.start, length // PAGE_SIZE):
            return Anchor(stack.start, length // PAGE_SIZE, None)
        content = self.memory.read(stack.start, length)
        if frame.is_ours(content, found):
            return Anchor(stack.start, length // PAGE_SIZE, None)
        if not 0 <= depth < stack.end - stack.start:
            raise RefusedError(Reason.NO_ANCHOR, "the end of the main stack is in use")
        return Anchor(stack.start, length // PAGE_SIZE, content)

    def _touched(self, address: int, npages: int) -> bool:
        path = procfs.task_path(self.pid, "pagemap", self.tid)
        with Path(path).open("rb", buffering=0) as file:
            data = os.pread(file.fileno(), npages * 8, address // PAGE_SIZE * 8)
        return any(entry & _PM_IN_USE for (entry,) in struct.iter_unpack("=Q", data))

    def _refuse_stale_stub(self, anchor: Anchor) -> None:
        """An earlier tracer's stub on its way home still needs its frame."""
        top = anchor.address + anchor.npages * PAGE_SIZE
        for thread in self.stopped.threads.values():
            rip, rsp = thread.registers.field("rip"), thread.registers.field("rsp")
            in_scratch = SCRATCH <= rip < SCRATCH + _SCRATCH_TRIES * _SCRATCH_STEP
            if in_scratch or anchor.address <= rsp < top:
                raise RefusedError(Reason.STALE_STUB)

    # -- the borrowed thread ----------------------------------------------------------------

    def _wait(self, tid: int) -> tuple[int, int]:
        """Wait for the thread: (event, signal) of its stop."""
        _, status = os.waitpid(tid, _WALL)
        if not os.WIFSTOPPED(status):
            self.stopped.threads.pop(tid, None)
            raise RefusedError(Reason.GONE)
        return status >> 16, os.WSTOPSIG(status)

    def _syscall_stop(self, tid: int) -> None:
        """Resume to the next system call entry or exit."""
        while True:
            ptrace.to_syscall(tid)
            event, number = self._wait(tid)
            if event == 0 and number == ptrace.SYSCALL_STOP:
                return
            self._keep_signal(event, number)

    def _keep_signal(self, event: int, number: int) -> None:
        """Note a signal that came in between. A fault means that the stub has crashed."""
        if event == ptrace.EVENT_STOP:
            return  # a group stop traps once more; resuming is all it needs
        if number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGSYS, signal.SIGFPE):
            raise StubLostError(signal.Signals(number).name)
        if number == signal.SIGSTOP:
            self._resend.add(number)

    def run_stub(
        self,
        records: list[stub.StubRecord],
        contexts: Contexts,
        *,
        mode: int = stub.MODE_WINDOW,
        device: int = -1,
        fail: tuple[int, int, int] = (0, 0, 0),
    ) -> tuple[Outcome, list[int]]:
        """Run the stub once: its outcome, and in setup the contexts it made (guard, track).

        *fail* is (step, errno, record) for tests.
        """
        with VmaQuery(self.pid, self.tid) as query:
            found, stack = self._places(query)
        thread = choose(self.stopped, self._inside_rseq())
        xstate = ptrace.getxstate(thread.tid)
        anchor = self._anchor(stack, len(xstate), found)
        self._refuse_stale_stub(anchor)
        borrowed = _Borrowed(self, thread, anchor, found, xstate)
        with borrowed:
            return borrowed.run(records, contexts, mode, device, fail)

    def rseq_pages(self) -> set[int]:
        """Page numbers that the kernel writes when the borrowed thread returns to user mode."""
        pages: set[int] = set()
        for tid in self.stopped.threads:
            address, size = self._rseq(tid)
            if address:
                pages.update(range(address // PAGE_SIZE, (address + size - 1) // PAGE_SIZE + 1))
        return pages


class _Borrowed:
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
        self._marker = marker_signal(session.pid)
        self._changed = False
        self._running = False
        self._scratch = (0, 0)
        self._pagemap = -1

    def __enter__(self) -> _Borrowed:
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
        if self._running and not isinstance(error, StubLostError):
            return  # the stub finds its way home; whatever we set now would cut it short
        if self._scratch[1] and not isinstance(error, StubLostError):
            self._call(_MUNMAP, *self._scratch)
        ptrace.setsigmask(self._thread.tid, self._mask)
        ptrace.setregs(self._thread.tid, self._thread.registers)
        if self._anchor.saved is not None:
            self._session.memory.write(self._anchor.address, self._anchor.saved)

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
            rsp=self._anchor.address + frame.F1_OFFSET,
            **dict(zip(names, args, strict=False)),
        )
        ptrace.setsigmask(self._thread.tid, _ALL & ~(1 << (self._marker - 1)))
        self._session._syscall_stop(self._thread.tid)
        self._session._syscall_stop(self._thread.tid)
        return ptrace.getregs(self._thread.tid).signed("rax")

    def _map_scratch(self, length: int) -> int:
        """Lay down the way home, then map memory for the stub: its address."""
        again = frame.interrupted_call(
            self._thread.registers, remembered_call(self._session.pid, self._thread.tid)
        )
        got = 0
        for attempt in range(_SCRATCH_TRIES):
            address = SCRATCH + attempt * _SCRATCH_STEP
            home = frame.build(
                again, self._xstate, self._mask, self._anchor.address, self._gadgets,
                (address, length),
            )  # fmt: skip
            self._session.memory.write(self._anchor.address, home)
            got = self._call(_MMAP, address, length, _RWX, _MAP_SCRATCH, -1, 0)
            if got == address:
                self._scratch = (address, length)
                return address
        raise RefusedError(Reason.WINDOW_FAILED, f"mmap of scratch memory: {os.strerror(-got)}")

    def run(
        self,
        records: list[stub.StubRecord],
        contexts: Contexts,
        mode: int,
        device: int,
        fail: tuple[int, int, int],
    ) -> tuple[Outcome, list[int]]:
        memory, tid = self._session.memory, self._thread.tid
        code = stub.code()
        header_at = libc.page_ceil(len(code)) + _STUB_STACK
        records_at = header_at + libc.page_ceil(stub.HEADER_SIZE)
        length = libc.page_ceil(records_at + len(records) * stub.RECORD.size)
        base = self._map_scratch(length)
        header_at, records_at = base + header_at, base + records_at
        fds = [device] if mode == stub.MODE_SETUP else self._descriptors(records, contexts)
        header = stub.pack_header(
            header_at,
            mode=mode,
            records=records_at,
            nrecords=len(records),
            marker=self._marker,
            gadget=self._gadgets.syscall_ret,
            frame=self._anchor.address,
            scratch=base,
            scratch_len=length,
            nfds=len(fds),
            fail_step=fail[0],
            fail_errno=fail[1],
            fail_record=fail[2],
            **_layout(records),
        )
        memory.write(base, code)
        memory.write(header_at, header)
        memory.write(records_at, b"".join(record.pack() for record in records))
        started = time.perf_counter()
        self._running = True
        self._set(rip=base, rsp=header_at - 64, rdi=header_at, rax=0)
        self._until(header_at, 1)
        self._hand_over(header_at, fds)
        taken = self._take(header_at) if mode == stub.MODE_SETUP else []
        self._until(header_at, 3)
        outcome = self._results(header_at, records_at, len(records))
        outcome.times["stub"] = (time.perf_counter() - started) * 1e6
        self._session._syscall_stop(tid)  # the stub's own munmap(scratch)
        self._session._syscall_stop(tid)
        self._running, self._scratch = False, (0, 0)
        return outcome, taken

    def _until(self, header_at: int, phase: int) -> None:
        """Run the stub to its next marker."""
        tid, at = self._thread.tid, header_at + stub.field_offset("phase")
        while True:
            ptrace.cont(tid)
            event, number = self._session._wait(tid)
            if event == 0 and number == self._marker:
                if struct.unpack("=q", self._session.memory.read(at, 8))[0] == phase:
                    return
                continue  # the same signal from elsewhere: ignored by default, so dropped
            self._session._keep_signal(event, number)

    def _field(self, header_at: int, name: str) -> int:
        data = self._session.memory.read(header_at + stub.field_offset(name), 8)
        return int(struct.unpack("=q", data)[0])

    def _getfd(self, number: int) -> int:
        return libc.pidfd_getfd(self._session._pidfd, number)

    def _hand_over(self, header_at: int, fds: list[int]) -> None:
        """Queue *fds* on the stub's own socket: no path, no namespace, no name is needed."""
        number = self._field(header_at, "socket")
        if number < 0:
            return  # the stub reports it
        with socket.socket(fileno=self._getfd(number)) as end:
            end.setblocking(False)
            end.bind("")
            end.connect(end.getsockname())
            end.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))])

    def _descriptors(self, records: list[stub.StubRecord], contexts: Contexts) -> list[int]:
        fds = [contexts.alive]
        if contexts.track >= 0:
            fds += [contexts.track, contexts.guard]
        if records[0].op in (Op.UNMERGE, Op.REMERGE):
            path = procfs.task_path(self._session.pid, "pagemap", self._session.tid)
            self._pagemap = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            fds.append(self._pagemap)
        if contexts.store >= 0:
            fds.append(contexts.store)
        return fds

    def _take(self, header_at: int) -> list[int]:
        """Take the two contexts that the stub made: guard, track."""
        self._until(header_at, 2)
        if self._field(header_at, "error"):
            return []
        return [self._getfd(self._field(header_at, name)) for name in ("guard", "track")]

    def _results(self, header_at: int, records_at: int, count: int) -> Outcome:
        memory = self._session.memory
        fields = stub.unpack_header(memory.read(header_at, stub.HEADER_SIZE))
        results = stub.unpack_results(memory.read(records_at, count * stub.RECORD.size))
        return Outcome(
            results, fields["error"], fields["keep"], threads=len(self._session.stopped.threads)
        )


def _layout(records: list[stub.StubRecord]) -> dict[str, int]:
    """Give every record its place in quarantine, and the header the spans that follow from it."""
    if not records:
        return {}
    at = 0
    for record in records:
        if record.length >= HUGE_PAGE_SIZE:  # congruent, so that huge pages move whole
            at += (record.start - at) % HUGE_PAGE_SIZE
        record.aside = at
        at += record.length
    start = min(record.start for record in records)
    stored = [record for record in records if record.op in (Op.MERGE, Op.REMERGE)]
    offset = min((record.offset for record in stored), default=0)
    end = max((record.offset + record.length for record in stored), default=0)
    return {
        "aside_len": at,
        "fresh_len": at if records[0].op is Op.UNMERGE else 0,
        "store_offset": offset,
        "store_len": end - offset,
        "wake_start": start,
        "wake_len": max(record.start + record.length for record in records) - start,
    }


def admit(
    session: Session, records: list[Record], extent_inode: int, huge: bool
) -> tuple[list[stub.StubRecord], dict[int, Reason]]:
    """Re-check every record against the maps of the stopped target.

    Gives what may be carried out, and the reason for each index of *records* that may not.
    """
    admitted: list[stub.StubRecord] = []
    dropped: dict[int, Reason] = {}
    rseq = session.rseq_pages()
    with VmaQuery(session.pid, session.tid) as query:
        for index, record in enumerate(records):
            vma = query.covering(record.start)
            reason = _objection(record, vma, extent_inode, rseq)
            if reason is not None or vma is None:
                dropped[index] = reason or Reason.NOT_MAPPED
                continue
            prot = sum(bit for letter, bit in zip("rwx", (1, 2, 4), strict=True)
                       if letter in vma.perms)  # fmt: skip
            admitted.append(
                stub.StubRecord(
                    record.op, record.start, record.length, record.offset, 0, prot,
                    stub.NOHUGEPAGE if huge else 0,
                )
            )  # fmt: skip
    return admitted, dropped


def _objection(record: Record, vma: Vma | None, extent_inode: int, rseq: set[int]) -> Reason | None:
    if vma is None or record.start + record.length > vma.end:
        return Reason.NOT_MAPPED
    if vma.perms[3] != "p":
        return Reason.SHARED_MAPPING
    if record.op in (Op.MERGE, Op.ZERO):
        if vma.inode or vma.device != (0, 0):
            return Reason.FILE_BACKED
        if not vma.perms.startswith("rw-"):
            return Reason.NOT_WRITABLE
        first, last = record.start // PAGE_SIZE, (record.start + record.length - 1) // PAGE_SIZE
        if any(first <= page <= last for page in rseq):
            return Reason.RSEQ
        return None
    if vma.inode != extent_inode:
        return Reason.NOT_MAPPED
    if vma.offset + record.start - vma.start != record.offset:
        return Reason.CHANGED
    return None
