"""One stop window of one target, as CRIU's compel would name it: stop, prepare, infect, cure.

What holds at every instant, and what tests kill the tracer for: before the first register of the
target is changed, the way home lies ready (frame.py); and whatever is left half way finds home by
itself. Everything runs in the thread that seized. The caller has armed an alarm (tracer.py).
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Final

from ksmd.kernel import peer, procfs, ptrace
from ksmd.kernel.memory import Memory
from ksmd.kernel.vmaquery import VmaQuery
from ksmd.model.errors import KsmdError
from ksmd.model.process import TargetId
from ksmd.model.refusal import Reason
from ksmd.model.units import PAGE_SIZE
from ksmd.remap import places, stub
from ksmd.remap.borrowed import Borrowed, Contexts, Outcome
from ksmd.remap.frame import for_sigreturn
from ksmd.remap.stop import RefusedError, Stopped, choose, stop
from ksmd.remap.wire import Batch

_RSEQ_CS_OFFSET: Final = 8


class Session:
    """A stopped target with one borrowed thread. Use as a context manager: leaving releases it.

    It has to stand still at *until* (time.monotonic): LateError. ``stop_us``: microseconds until it
    did, ``total_us``: until it ran again.
    """

    def __init__(self, target: TargetId, until: float) -> None:
        self.pid = target.pid
        self.pidfd = peer.open_process(self.pid)
        try:
            self._check_states(target)
            self._began = time.perf_counter()
            self.stopped: Stopped = stop(self.pid, until)
        except BaseException:
            os.close(self.pidfd)
            raise
        self.stop_us = self._elapsed_us()
        self.total_us = 0.0
        self.resend: set[int] = set()
        self._memory: Memory | None = None
        self._query: VmaQuery | None = None
        self._rseqs: dict[int, tuple[int, int]] = {}
        try:
            if peer.ended(self.pidfd):  # then another may have its pid
                raise RefusedError(Reason.GONE)
            # the first thread, if it has not ended, which the open file then proves
            first = self.pid if self.pid in self.stopped.threads else None
            self._memory = Memory(self.pid, writable=True, tid=first)
            self.tid = self._memory.tid
            self._query = VmaQuery(self.pid, self.tid)
            if self.tid != self.pid:
                # PIDFD_THREAD, Linux 6.9: a first thread that has ended has no descriptor table
                os.close(self.pidfd)
                self.pidfd = -1
                self.pidfd = os.pidfd_open(self.tid, os.O_EXCL)
        except BaseException:
            self.__exit__()
            raise

    def _elapsed_us(self) -> float:
        return (time.perf_counter() - self._began) * 1e6

    def _check_states(self, target: TargetId) -> None:
        """Refuse early, without a stop, another process, and a thread that could not stop soon."""
        for tid in procfs.tasks(self.pid):
            try:
                found = procfs.task_stat(self.pid, tid)
            except KsmdError:  # it ended between the two reads
                continue
            if tid == self.pid and found.start_time != target.start_time:
                raise RefusedError(Reason.GONE)
            if found.state == "D":
                raise RefusedError(Reason.UNSTOPPABLE, f"thread {tid} is in state D")

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.release()
        self.total_us = self._elapsed_us()
        for number in self.resend:
            try:
                os.kill(self.pid, number)
            except ProcessLookupError:
                break
        self.resend.clear()
        if self._memory is not None:
            self._memory.close()
        if self._query is not None:
            self._query.close()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1

    @property
    def memory(self) -> Memory:
        """The target's memory, writable."""
        assert self._memory is not None
        return self._memory

    @property
    def query(self) -> VmaQuery:
        """The target's mappings, as they are while no stub is at work."""
        assert self._query is not None
        return self._query

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
        found = self._rseqs.get(tid)
        if found is None:
            try:
                configuration = ptrace.rseq_configuration(tid)
                found = configuration.address, configuration.size
            except OSError:  # a kernel without the request has no rseq to fear for ptrace (< 5.13)
                found = 0, 0
            self._rseqs[tid] = found
        return found

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

    def _rseq_within(self, batch: Batch) -> set[int]:
        """Threads whose struct rseq lies in a record.

        The kernel writes it on the way to user mode, where the run in quarantine would make the
        borrowed thread wait for itself.
        """
        busy = set()
        for tid in self.stopped.threads:
            address, size = self._rseq(tid)
            if address and batch.holding(address, size) is not None:
                busy.add(tid)
        return busy

    def refuse_stale_stub(self) -> None:
        """Raise RefusedError while an earlier tracer's stub is at work; nothing is changed."""
        found, stack = places.find(self.memory, self.query)
        xstate = for_sigreturn(ptrace.getxstate(next(iter(self.stopped.threads))))
        anchor = places.find_anchor(self.stopped, self.memory, stack, len(xstate), found)
        places.refuse_stale_stub(self.stopped, anchor)

    def run_stub(
        self,
        batch: Batch,
        contexts: Contexts,
        *,
        trials: Sequence[int] = (),
        mode: int = stub.MODE_WINDOW,
        device: int = -1,
        fail: tuple[int, int, int] = (0, 0, 0),
    ) -> tuple[Outcome, list[int]]:
        """Run the stub once: its outcome, and in setup the contexts it made (guard, track).

        *trials* are the mappings that records name by number, to be tried for flags first.
        *fail* is (step, errno, record) for tests.
        """
        found, stack = places.find(self.memory, self.query)
        thread = choose(self.stopped, self._inside_rseq() | self._rseq_within(batch))
        xstate = for_sigreturn(ptrace.getxstate(thread.tid))
        anchor = places.find_anchor(self.stopped, self.memory, stack, len(xstate), found)
        places.refuse_stale_stub(self.stopped, anchor)
        borrowed = Borrowed(self, thread, anchor, found, xstate)
        with borrowed:
            return borrowed.run(batch, contexts, trials, mode, device, fail)

    def rseq_pages(self) -> set[int]:
        """Page numbers that the kernel writes when the borrowed thread returns to user mode."""
        pages: set[int] = set()
        for tid in self.stopped.threads:
            address, size = self._rseq(tid)
            if address:
                pages.update(range(address // PAGE_SIZE, (address + size - 1) // PAGE_SIZE + 1))
        return pages
