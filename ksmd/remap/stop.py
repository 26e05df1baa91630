"""Stop every task of a process, and let them go as if nothing had been.

Stopping goes to a fixpoint: threads started meanwhile are stopped as well. A stop alone already
disturbs some system calls (epoll_wait and its kin answer EINTR instead of being restarted), so each
thread is mended the moment it stops: a tracer that dies later leaves no EINTR behind.

A thread that does not stop in time (its processor is busy, or it waits in the kernel) ends the
window: the others go on at once, and it follows as soon as it stops. One that does not even then
(vfork parents, dead storage) makes the tracer process leave, which is the only way to give up a
thread that has been asked to stop and has not (:class:`DeadlineError`).
"""

from __future__ import annotations

import errno
import os
import signal
import time
from dataclasses import dataclass, field
from typing import Final

from ksmd.kernel import procfs, ptrace
from ksmd.kernel.ptrace import Registers
from ksmd.model.errors import TargetGoneError
from ksmd.model.refusal import Reason
from ksmd.remap.frame import ERESTART_RESTARTBLOCK, NR_RESTART_SYSCALL

_WALL: Final = 0x40000000
#: How long a thread that did not stand still may take to stop after all, or, when it was killed, to
#: end: it has to leave the kernel first.
_LATE_SECONDS: Final = 0.5
_LATE_POLL_SECONDS: Final = 0.0005
_PF_USER_WORKER: Final = 0x4000
_USER_CS: Final = 0x33

#: Calls that answer EINTR to a bare stop: epoll_wait, epoll_pwait, epoll_pwait2, rt_sigtimedwait,
#: semop, semtimedop, io_getevents, io_pgetevents, io_uring_enter, and with a socket timeout
#: recvfrom, accept, accept4, sendto, sendmsg, recvmsg, recvmmsg, sendmmsg, connect.
_EINTR_CALLS: Final = frozenset(
    {232, 281, 441, 128, 65, 220, 208, 333, 426, 45, 43, 288, 44, 46, 47, 299, 307, 42}
)


class RefusedError(Exception):
    """The target is let go unchanged, for *reason*."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class DeadlineError(Exception):
    """The alarm went off, or a thread can be given up by the tracer's end alone."""


class LateError(Exception):
    """Some thread did not stop in time. ``stopped`` is for the caller to release."""

    def __init__(self, stopped: Stopped) -> None:
        super().__init__(stopped)
        self.stopped = stopped


@dataclass(slots=True)
class Thread:
    """A stopped thread. ``signal`` is what it was about to receive; detaching delivers it."""

    tid: int
    event: int
    signal: int
    registers: Registers

    @property
    def in_syscall(self) -> bool:
        """Whether it stopped inside a system call."""
        return self.registers.signed("orig_rax") >= 0


@dataclass(slots=True)
class Stopped:
    """A process whose tasks all stand still. Made by :func:`stop`; ended by :meth:`release`.

    ``attached``: every thread that is ours to let go or to reap, the stopped ones included.
    """

    pid: int
    threads: dict[int, Thread] = field(default_factory=dict)
    attached: set[int] = field(default_factory=set)

    def release(self) -> None:
        """Detach every thread, with the signal that it was about to receive.

        Then those follow that do not stand still. A thread that was killed is reaped: until its
        tracer has waited for it, no parent hears of its death. The first thread comes last: it is
        reported when all others are gone. DeadlineError where one neither stops nor ends.
        """
        order = sorted(self.attached, key=lambda tid: (tid == self.pid, tid))
        late = [tid for tid in order if tid not in self.threads or not _detach(self.threads[tid])]
        deadline = time.monotonic() + _LATE_SECONDS
        for tid in late:
            _reap(self.pid, tid, deadline)
        self.attached.clear()
        self.threads.clear()

    def lost(self, tid: int) -> None:
        """Forget a thread whose end was reported to us."""
        self.attached.discard(tid)
        self.threads.pop(tid, None)


def _detach(thread: Thread) -> bool:
    """Let a stopped thread go; False where it does not stand still for us."""
    try:
        ptrace.detach(thread.tid, thread.signal)
    except ProcessLookupError:
        return False
    return True


def _reap(pid: int, tid: int, deadline: float) -> None:
    """Wait for the end of a thread that did not stand still: it was killed. If it stops, let it go.

    DeadlineError where it does neither: it stands in a freezer of its cgroup, say, and the tracer's
    own end lets go of it.
    """
    while True:
        try:
            found, status = os.waitpid(tid, _WALL | os.WNOHANG)
        except ChildProcessError:
            return
        if found and not os.WIFSTOPPED(status):
            return
        thread = _arrived(pid, tid, status) if found else None
        if thread is not None and _detach(thread):
            return
        if time.monotonic() > deadline:
            raise DeadlineError
        time.sleep(_LATE_POLL_SECONDS)


#: The original number of a system call that sits in restart_syscall now, by (pid, tid).
_restarting: dict[tuple[int, int], int] = {}


def remembered_call(pid: int, tid: int) -> int | None:
    """Give the number of the call that thread is restarting, where an earlier stop saw it."""
    return _restarting.get((pid, tid))


def forget_calls(pid: int) -> None:
    """Drop what is remembered of a process that is gone."""
    for key in [key for key in _restarting if key[0] == pid]:
        del _restarting[key]


def _pending(pid: int, tid: int) -> int:
    """Unblocked signals that wait for the thread, as a mask."""
    own, shared, blocked = procfs.task_status(pid, tid).masks("SigPnd", "ShdPnd", "SigBlk")
    return (own | shared) & ~blocked


def _mend(pid: int, thread: Thread) -> None:
    """Undo what the stop itself did to the thread's system call."""
    registers = thread.registers
    if thread.event != ptrace.EVENT_STOP:
        return
    number, result = registers.signed("orig_rax"), registers.signed("rax")
    if result == -errno.EINTR and number in _EINTR_CALLS and not _pending(pid, thread.tid):
        registers.set(rax=number, rip=registers.field("rip") - 2, orig_rax=-1)
        ptrace.setregs(thread.tid, registers)
    elif result == -ERESTART_RESTARTBLOCK and number != NR_RESTART_SYSCALL:
        _restarting[pid, thread.tid] = number


def _seize(stopped: Stopped, tid: int) -> bool:
    """Seize and interrupt one thread; False when it has ended."""
    try:
        ptrace.seize(tid)
    except ProcessLookupError:
        return False
    except PermissionError:
        return _seize_refused(stopped.pid, tid)
    stopped.attached.add(tid)
    try:
        ptrace.interrupt(tid)
    except ProcessLookupError:
        return False
    return True


def _seize_refused(pid: int, tid: int) -> bool:
    try:
        state = procfs.task_stat(pid, tid).state
        tracer = procfs.status_fields(pid, tid)["TracerPid"]
    except Exception as error:
        if not procfs.tasks(pid):
            raise RefusedError(Reason.GONE) from error
        return False
    if state in "ZX":  # a leader that has exited, a thread on its way out
        return False
    if tracer != "0":
        raise RefusedError(Reason.TRACED, f"tracer {tracer}")
    raise RefusedError(Reason.PRIVILEGE, f"ptrace seize of {tid}")


def _collect(stopped: Stopped, waiting: set[int]) -> None:
    """Take in whoever of *waiting* has stopped or ended by now."""
    while waiting:
        try:
            tid, status = os.waitpid(-1, _WALL | os.WNOHANG)
        except ChildProcessError:
            waiting.clear()
            return
        if not tid:
            return
        waiting.discard(tid)
        if os.WIFSTOPPED(status):
            thread = _arrived(stopped.pid, tid, status)
            if thread is not None:
                stopped.threads[tid] = thread
        else:
            stopped.lost(tid)


def _await(stopped: Stopped, waiting: set[int], until: float) -> None:
    """Take in all of *waiting*. LateError when they have not all stopped by then.

    No alarm is to come here: it might fall between a thread's report and the note of it.
    """
    while True:
        _collect(stopped, waiting)
        if not waiting:
            return
        left = until - time.monotonic()
        if left <= 0:
            raise LateError(stopped)
        signal.sigtimedwait({signal.SIGCHLD}, left)  # blocked, so that none is missed


def _arrived(pid: int, tid: int, status: int) -> Thread | None:
    """Make the record of a thread that reports a stop, and mend it; None when it was killed."""
    event = status >> 16
    try:
        thread = Thread(tid, event, 0 if event else os.WSTOPSIG(status), ptrace.getregs(tid))
        _mend(pid, thread)
    except (ProcessLookupError, TargetGoneError):
        return None
    return thread


def stop(pid: int, until: float) -> Stopped:
    """Stop every task of *pid*, to a fixpoint, *until* when (time.monotonic).

    The caller has set an alarm for later than that. What this raises, it raises after letting go of
    what had stopped; but for LateError, and DeadlineError, after which the tracer process must end.
    """
    stopped = Stopped(pid)
    known: set[int] = set()
    try:
        # as many as stand still, which are all alive: then they are all there are
        while not known or procfs.task_count(pid) != len(stopped.threads):
            new = [tid for tid in procfs.tasks(pid) if tid not in known]
            if not new:
                break
            known.update(new)
            waiting: set[int] = set()
            for tid in new:
                if time.monotonic() > until:  # there are very many
                    raise LateError(stopped)
                if _seize(stopped, tid):
                    waiting.add(tid)
                # each is mended as soon as it stops, whatever the others do
                _collect(stopped, waiting)
            _await(stopped, waiting, until)
        _refuse_filtered(stopped)
        if not stopped.threads:
            raise RefusedError(Reason.GONE)
    except (LateError, DeadlineError):
        raise
    except BaseException:
        stopped.release()
        raise
    return stopped


def _refuse_filtered(stopped: Stopped) -> None:
    """Refuse a target with a seccomp filter that stays awake: it might kill it for the stub."""
    if ptrace.may_suspend_seccomp():
        return
    for tid in stopped.threads:
        try:
            mode = procfs.status_fields(stopped.pid, tid).get("Seccomp", "0")
        except TargetGoneError:  # killed while it was stopped
            continue
        if mode != "0":
            why = "ksmd is filtered itself, or lacks CAP_SYS_ADMIN: ksmd.safety(7)"
            raise RefusedError(Reason.SECCOMP, why)


def choose(stopped: Stopped, rseq_busy: set[int]) -> Thread:
    """Choose the thread that does the work: best one inside a system call.

    Kernel-made workers have no user mode to run in; a thread inside a restartable sequence
    (*rseq_busy*) would miss its abort; a thread at a signal stop keeps its signal for itself.
    """
    fit = []
    for thread in stopped.threads.values():
        if thread.event != ptrace.EVENT_STOP or thread.tid in rseq_busy:
            continue
        if thread.registers.field("cs") != _USER_CS:
            raise RefusedError(Reason.ARCHITECTURE, "a thread runs 32-bit code")
        if thread.tid != stopped.pid and _is_worker(stopped.pid, thread.tid):
            continue
        fit.append(thread)
        if thread.in_syscall:
            return thread
    if not fit:
        raise RefusedError(Reason.NO_THREAD)
    return fit[0]


def _is_worker(pid: int, tid: int) -> bool:
    return bool(procfs.task_stat(pid, tid).flags & _PF_USER_WORKER)


@dataclass(frozen=True, slots=True)
class Identity:
    """What the stub has to know of its thread: a ``marker`` for it, and ``pid`` and ``tid``.

    The numbers are those by which the thread knows itself, in a pid namespace of its own perhaps.
    """

    marker: int
    pid: int
    tid: int


def identify(pid: int, tid: int) -> Identity:
    """Choose a signal that does nothing when it is not caught, and is not caught here.

    Nor may it wait already, blocked, for someone who will ask for it (sigwait, signalfd).
    """
    status = procfs.task_status(pid, tid)
    caught, own, shared = status.masks("SigCgt", "SigPnd", "ShdPnd")
    used = caught | own | shared
    for number in (signal.SIGURG, signal.SIGWINCH, signal.SIGCHLD):
        if not used >> (number - 1) & 1:
            return Identity(int(number), status.own("NStgid", pid), status.own("NSpid", tid))
    raise RefusedError(Reason.NO_THREAD, "every signal that could mark progress is in use")
