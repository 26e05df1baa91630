"""The tracer process: every ptrace call of ksmd, made by its one thread.

It serves one request at a time from the daemon, over the first channel that it inherits:

* ``inspect``  stop, read the seccomp filters, let go
* ``check``    stop, see that no other tracer or stub is at work, let go
* ``setup``    make the two userfaultfd contexts of a target and hand them over
* ``windows``  carry out batches of records, one after the other, each in another target

What became of a window goes to the second channel as soon as it is over, and is looked at when all
are: the daemon is not woken in between, and knows, should we die, how far we came.

It may be killed at any instruction; the targets then go on by themselves. It uses that: when a
thread does not stop long after the deadline, or a stub does not end, the process leaves, because
that makes the kernel let go of every tracee at once. The daemon starts another.

All signals but SIGALRM, which says that, are blocked: nothing may end a window half way by choice.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, Final, NoReturn

from ksmd.kernel import channel, libc, risks, userfaultfd
from ksmd.model.errors import KsmdError, TargetGoneError
from ksmd.model.process import TargetId
from ksmd.model.refusal import Reason
from ksmd.model.window import Op
from ksmd.remap import places, stub, wire
from ksmd.remap.admit import admit
from ksmd.remap.alive import AliveWord
from ksmd.remap.borrowed import Contexts, Outcome, StubLostError
from ksmd.remap.session import Session
from ksmd.remap.stop import DeadlineError, LateError, RefusedError, Stopped
from ksmd.remap.wire import EXIT_ORPHANED, EXIT_STUB_LATE, EXIT_UNSTOPPABLE

#: How long a stub may take, in seconds. Two orders above the longest window measured.
_STUB_SECONDS: Final = 2.0

#: By so much the alarm comes after the deadline, which is kept without it: for what hangs in /proc.
_GRACE_SECONDS: Final = 0.01

_PR_SET_PDEATHSIG: Final = 1

#: A header, records, and file descriptors that are handed over.
_Reply = tuple[dict[str, Any], bytes, list[int]]


def _alarm(_number: int, _frame: FrameType | None) -> None:
    raise DeadlineError


def _arm(seconds: float) -> None:
    signal.setitimer(signal.ITIMER_REAL, seconds)


def _end_with_the_daemon(number: int = signal.SIGKILL) -> None:
    """Have the kernel end us when the daemon's main thread has ended; not any more with 0.

    One that hangs (SIGSTOP, a frozen cgroup) when the daemon ends would keep its target stopped,
    and might carry out much later, for nobody, what it was asked for.
    """
    libc.prctl(_PR_SET_PDEATHSIG, number)


@contextlib.contextmanager
def _outliving_the_daemon() -> Iterator[None]:
    """Go on while the daemon ends, and end after it: for as long as a stop takes.

    A thread that was stopped, and not looked at yet, may stand in a call that answers EINTR to that
    (see stop.py). After that nothing has to be mended any more.
    """
    daemon = os.getppid()
    _end_with_the_daemon(0)
    try:
        yield
    finally:
        _end_with_the_daemon()
        if os.getppid() != daemon:
            os._exit(EXIT_ORPHANED)


class Tracer:
    """The request loop."""

    def __init__(self, end: socket.socket, results: socket.socket) -> None:
        self._end = end
        self._results = results
        self._alive = AliveWord()

    def serve(self) -> None:
        """Answer requests until the daemon is gone."""
        while True:
            try:
                header, payload, fds = channel.receive(self._end)
            except channel.PeerGoneError:
                return
            try:
                if header["do"] == "windows":
                    reply, out = self._windows(header["windows"], payload, fds)
                else:
                    reply, _, out = self._answer(header, payload, fds)
                channel.send(self._end, reply, fds=tuple(out))
            except channel.PeerGoneError:
                return
            finally:
                for fd in fds:
                    os.close(fd)
            for fd in out:
                os.close(fd)

    def _windows(
        self, headers: list[dict[str, Any]], payload: bytes, fds: list[int]
    ) -> tuple[dict[str, Any], list[int]]:
        record = fd = 0
        for header in headers:
            records, held = record + header["size"], fd + header["fds"]
            reply, data, _ = self._answer(header, payload[record:records], fds[fd:held])
            channel.send(self._results, reply, data)
            record, fd = records, held
        return {}, []

    def _answer(self, header: dict[str, Any], payload: bytes, fds: list[int]) -> _Reply:
        target = TargetId(header["pid"], header["start_time"])
        try:
            return self._carry_out(target, header, payload, fds)
        except RefusedError as error:
            if error.reason is Reason.GONE:
                places.forget(target.pid)
            return {"refused": error.reason, "detail": error.detail}, b"", []
        except TargetGoneError:
            places.forget(target.pid)
            return {"refused": Reason.GONE, "detail": ""}, b"", []
        except (ProcessLookupError, ChildProcessError):  # killed between two of our calls
            return {"refused": Reason.GONE, "detail": "killed in the stop window"}, b"", []
        except StubLostError as error:
            return {"refused": Reason.POISONED, "detail": f"the stub met {error}"}, b"", []
        except KsmdError as error:
            return {"refused": Reason.WINDOW_FAILED, "detail": str(error)}, b"", []
        finally:
            _arm(0)

    def _carry_out(
        self, target: TargetId, header: dict[str, Any], payload: bytes, fds: list[int]
    ) -> _Reply:
        _arm(_STUB_SECONDS)
        try:
            places.look_ahead(target)
        except DeadlineError:
            raise RefusedError(Reason.UNSTOPPABLE, "its code cannot be read in time") from None
        batch = wire.Batch(payload)
        seconds = header["deadline_ms"] / 1000
        with _outliving_the_daemon():
            _arm(seconds + _GRACE_SECONDS)
            try:
                session = Session(target, time.monotonic() + seconds)
            except LateError as error:
                self._let_go(error.stopped)
            except DeadlineError:
                self._give_up()
        try:
            _arm(_STUB_SECONDS)
            with session:
                reply = self._with_session(session, header, batch, fds)
        except DeadlineError:
            os._exit(EXIT_STUB_LATE)
        reply[0]["stop_us"] = session.stop_us
        reply[0]["total_us"] = session.total_us
        return reply

    def _let_go(self, stopped: Stopped) -> NoReturn:
        """Let a target go of which some thread stops too late."""
        _arm(_STUB_SECONDS)
        try:
            stopped.release()
        except DeadlineError:
            self._give_up()
        raise RefusedError(Reason.UNSTOPPABLE)

    def _give_up(self) -> NoReturn:
        """Let go of threads that do not stop, by our end, and at once: no stub is at work.

        The daemon gets the fuse to close.
        """
        with contextlib.suppress(OSError, channel.PeerGoneError):
            if self._alive.fuse >= 0:
                channel.send(self._end, {"leaving": True}, fds=(self._alive.fuse,))
        os._exit(EXIT_UNSTOPPABLE)

    def _with_session(
        self, session: Session, header: dict[str, Any], batch: wire.Batch, fds: list[int]
    ) -> _Reply:
        match header["do"]:
            case "inspect":
                return {"filters": list(session.seccomp_filters().values())}, b"", []
            case "check":
                session.refuse_stale_stub()
                return {}, b"", []
            case "setup":
                return self._setup(session)
            case "window":
                return self._window(session, header, batch, fds)
        raise ValueError(f"unknown request {header['do']!r}")

    def _setup(self, session: Session) -> _Reply:
        device = userfaultfd.open_device()
        try:
            outcome, taken = session.run_stub(
                wire.Batch(), Contexts(self._alive.fd), mode=stub.MODE_SETUP, device=device
            )
        finally:
            os.close(device)
        _refuse_stub_error(outcome)
        return {"threads": outcome.threads}, b"", taken

    def _window(
        self, session: Session, header: dict[str, Any], batch: wire.Batch, fds: list[int]
    ) -> _Reply:
        if batch.op >= Op.UNMERGE:
            _refuse_pins(session.pid)
        dropped, trials = admit(session, batch, header["inode"])
        outcome = Outcome(batch.tobytes(), threads=len(session.stopped.threads))
        if len(dropped) < len(batch):
            contexts = Contexts(self._alive.fd, *fds)
            fail = tuple(header.get("fail", (0, 0, 0)))
            outcome, _ = session.run_stub(batch, contexts, trials=trials, fail=fail)
            if not outcome.kept:
                _refuse_stub_error(outcome)
        reply = {
            "dropped": dropped,
            "kept": outcome.kept,
            "threads": outcome.threads,
            "times": outcome.times,
        }
        return reply, outcome.records, []


def _refuse_stub_error(outcome: Outcome) -> None:
    """Turn the stub's own error (before any record was touched) into a refusal."""
    if not outcome.error:
        return
    number = -outcome.error
    reason = Reason.FD_TABLE if number == 24 else Reason.WINDOW_FAILED  # EMFILE
    raise RefusedError(reason, os.strerror(number))


def _refuse_pins(pid: int) -> None:
    """Pages that were written since a merge cannot be tested for pins one by one; see stub.c."""
    found = risks.pin_risks(pid)
    if found:
        raise RefusedError(Reason.PINNED_PROCESS, "; ".join(found))


def main(arguments: list[str]) -> int:
    """Run as ``python -m ksmd.remap.tracer FD FD``."""
    end, results = (socket.socket(fileno=int(number)) for number in arguments[1:])
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - {signal.SIGALRM})
    signal.signal(signal.SIGALRM, _alarm)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, it would not tell of stops (stop.py)
    libc.set_name("ksmd-tracer")
    _end_with_the_daemon()
    with contextlib.suppress(KsmdError):  # without CAP_SYS_RESOURCE: stubs survive our death
        risks.set_oom_score_adj(os.getpid(), -900)
    libc.trim_heap()  # start-up has left some lying
    tracer = Tracer(end, results)
    with contextlib.suppress(channel.PeerGoneError):  # the daemon died meanwhile
        channel.send(end, {"ready": os.getpid()})
        tracer.serve()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
