"""The daemon's side of the tracer: ask for windows, understand the answers, replace the dead."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ksmd.kernel import channel, priority, userfaultfd
from ksmd.kernel.patience import Patience
from ksmd.model.errors import KernelFeatureError
from ksmd.model.process import TargetId
from ksmd.model.refusal import Reason
from ksmd.model.tables import RESULT, STUB_RECORD
from ksmd.model.units import HUGE_PAGE_SIZE
from ksmd.model.window import Advice, Op, WindowRequest, WindowResult
from ksmd.remap import stub
from ksmd.remap.wire import EXIT_UNSTOPPABLE

_REPLY_SECONDS: Final = 10.0
#: Bytes of records in one request, or of one window's: what goes to the tracer, and comes back
#: before we read it, must go into sockets whose buffers are what anybody may have.
_MOST_BYTES: Final = 1 << 17
_FLAGGED: Final = {
    Advice.DONTFORK: Reason.DONTFORK,
    Advice.DONTDUMP: Reason.DONTDUMP,
    Advice.WIPEONFORK: Reason.WIPEONFORK,
}


@dataclass(frozen=True, slots=True)
class TargetContexts:
    """A target's userfaultfd contexts, held by us: guard (G) and quarantine (A)."""

    guard: int
    track: int


class Order(NamedTuple):
    """A window to carry out; ``store`` is the extent's read-only descriptor.

    Its records are of one kind. Without ``contexts`` it can only unmerge, where nobody guards what
    is merged. ``fail`` is (step, errno, record), for tests.
    """

    request: WindowRequest
    contexts: TargetContexts | None
    store: int = -1
    fail: tuple[int, int, int] = (0, 0, 0)

    @property
    def fds(self) -> tuple[int, ...]:
        """What the tracer is handed."""
        held = () if self.contexts is None else (self.contexts.track, self.contexts.guard)
        return (*held, self.store) if self.store >= 0 else held


class RefusedTargetError(Exception):
    """The target as a whole is refused. ``lost``: the tracer ended, perhaps with a stub at work."""

    def __init__(self, reason: Reason, detail: str = "", *, lost: bool = False) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail
        self.lost = lost


def _nothing() -> None:
    """Do nothing meanwhile."""


class Engine:
    """Owns the tracer process. One request at a time; a lost tracer is replaced at the next one.

    A tracer ends with the thread that started it.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._awaited = False  # it was begun, and has not said yet that it serves
        self._ours, theirs = channel.pair()
        self._results, other = channel.pair()
        theirs.close()
        other.close()
        self._over: list[tuple[dict[str, Any], bytes]] = []

    def begin(self) -> None:
        """Start a tracer; :meth:`start` waits for it."""
        self.close()
        self._ours, theirs = channel.pair()
        self._results, results = channel.pair()
        self._results.setblocking(False)
        with theirs, results:
            ends = theirs.fileno(), results.fileno()
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "ksmd.remap.tracer", *map(str, ends)],
                pass_fds=ends,
                start_new_session=True,
            )
        with contextlib.suppress(OSError):  # without CAP_SYS_NICE stops take longer on a busy host
            priority.go_before_others(self._process.pid)
        self._awaited = True

    def start(self) -> None:
        """Start a tracer, unless one was begun, and wait until it can serve."""
        if not self._awaited:
            self.begin()
        self._awaited = False
        try:
            Patience(_REPLY_SECONDS, self.pid).receive(self._ours)
        except (channel.PeerGoneError, TimeoutError) as error:
            self.close()  # what it says after all would pass for the answer to a request
            raise KernelFeatureError(
                "the tracer process did not start", "run `ksmctl features` to see what is missing"
            ) from error

    @property
    def pid(self) -> int:
        """The tracer's pid, 0 when none runs."""
        return self._process.pid if self._process is not None else 0

    def close(self) -> None:
        """End the tracer, if one runs."""
        self._ours.close()
        self._results.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        self._awaited = False

    def _exchange(
        self,
        header: dict[str, Any],
        payload: bytes = b"",
        fds: tuple[int, ...] = (),
        meanwhile: Callable[[], None] = _nothing,
    ) -> tuple[dict[str, Any], bytes, list[int]]:
        """Send one request and give its answer; PeerGoneError or TimeoutError for a lost tracer."""
        if self._process is None or self._process.poll() is not None:
            self.start()
        patience = Patience(_REPLY_SECONDS, self.pid)
        patience.send(self._ours, header, payload, fds)
        try:
            for _ in header.get("windows", ()):
                meanwhile()
        finally:  # whatever comes of that, the answer is this request's
            answer = self._await(patience)
        return answer

    def _await(self, patience: Patience) -> tuple[dict[str, Any], bytes, list[int]]:
        """Wait for an answer: for the tracer's time from the last window on that is over."""
        while True:
            try:
                return patience.receive(self._ours)
            except TimeoutError:
                before = len(self._over)
                self._take_results()
                if len(self._over) == before:
                    raise
                patience = Patience(_REPLY_SECONDS, self.pid)

    def _ask(self, header: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
        """Send one request; a refusal of the target is raised as RefusedTargetError."""
        try:
            reply, _, out = self._exchange(header)
        except (channel.PeerGoneError, TimeoutError):
            raise self._lost() from None
        if "leaving" in reply:
            raise self._left(out)
        if "refused" in reply:
            raise RefusedTargetError(Reason(reply["refused"]), reply["detail"])
        return reply, out

    def _left(self, out: list[int]) -> RefusedTargetError:
        """See a tracer off that has left us its fuse: its end must not wait for that."""
        error = self._lost()
        for fd in out:
            os.close(fd)
        return error

    def _lost(self) -> RefusedTargetError:
        """Explain the end of a tracer. Its targets have been let go by the kernel."""
        assert self._process is not None
        try:
            status = self._process.wait(1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        self._process = None
        if status == EXIT_UNSTOPPABLE:
            return RefusedTargetError(Reason.UNSTOPPABLE)
        detail = f"the tracer ended with status {status}"
        return RefusedTargetError(Reason.WINDOW_FAILED, detail, lost=True)

    def check(self, target: TargetId, deadline_ms: float) -> None:
        """See that nothing of an earlier window is at work in *target*: one stop, no change.

        RefusedTargetError where something is, or where it cannot be seen now.
        """
        self._ask(self._header("check", target, deadline_ms))

    def seccomp_filters(
        self, target: TargetId, deadline_ms: float
    ) -> list[list[list[tuple[int, int, int, int]]]]:
        """Give the classic BPF programs of every thread that has some; one stop, no change."""
        header = self._header("inspect", target, deadline_ms)
        reply, _ = self._ask(header)
        return [
            [[(c, t, f, k) for c, t, f, k in program] for program in programs]
            for programs in reply["filters"]
        ]

    def setup(self, target: TargetId, deadline_ms: float) -> TargetContexts:
        """Make the two contexts of *target*: one stop. They are ours to close."""
        _, (guard, track) = self._ask(self._header("setup", target, deadline_ms))
        try:
            userfaultfd.api(guard, userfaultfd.GUARD_FEATURES)
            userfaultfd.api(track, userfaultfd.TRACK_FEATURES)
        except OSError as error:
            os.close(guard)
            os.close(track)
            raise RefusedTargetError(Reason.NO_GUARD, f"UFFDIO_API: {error.strerror}") from error
        return TargetContexts(guard, track)

    def window(self, order: Order) -> WindowResult:
        """Carry out one stop window."""
        return self.windows([order])[0]

    def windows(
        self, orders: Sequence[Order], meanwhile: Callable[[], None] = _nothing
    ) -> list[WindowResult]:
        """Carry out stop windows one after the other, each of another target.

        *meanwhile* is called as often as there are some, while the tracer is at work, which does
        not wait for it.
        """
        results: list[WindowResult] = []
        while left := orders[len(results) :]:  # where a tracer leaves, the next one does the rest
            results += self._windows(_fitting(left), meanwhile)
        return results

    def _windows(
        self, orders: Sequence[Order], meanwhile: Callable[[], None]
    ) -> list[WindowResult]:
        """Have a tracer carry *orders* out: all, or up to the one by which it ended."""
        packed = [_packed(order.request.records) for order in orders]
        headers = [
            self._window_header(order, places)
            for order, (places, _) in zip(orders, packed, strict=True)
        ]
        payload = b"".join(records.tobytes() for _, records in packed)
        fds = tuple(fd for order in orders for fd in order.fds)
        error: RefusedTargetError | None = None
        try:
            answer, _, out = self._exchange(
                {"do": "windows", "windows": headers}, payload, fds, meanwhile
            )
            if "leaving" in answer:
                error = self._left(out)
        except (channel.PeerGoneError, TimeoutError):
            error = self._lost()
        finally:
            self._take_results()
            replies, self._over = self._over, []
        results = [
            _result(order.request, places, reply, data)
            for order, (places, _), (reply, data) in zip(orders, packed, replies, strict=False)
        ]
        if error is not None and len(results) < len(orders):
            request = orders[len(results)].request  # the tracer was at work on it
            results.append(_refused(request, error.reason, error.detail, lost=error.lost))
        return results

    def _take_results(self) -> None:
        """Take in what became of windows that are over, for which nobody is woken."""
        with contextlib.suppress(BlockingIOError, channel.PeerGoneError):
            while True:
                reply, data, _ = channel.receive(self._results)
                self._over.append((reply, data))

    def _window_header(self, order: Order, places: NDArray[np.intp]) -> dict[str, Any]:
        request = order.request
        header = self._header("window", request.target, request.deadline_ms)
        header |= {"inode": request.extent_inode, "fds": len(order.fds)}
        header |= {"size": len(places) * STUB_RECORD.itemsize}
        if order.fail[0]:
            header["fail"] = (*order.fail[:2], int(np.flatnonzero(places == order.fail[2])[0]))
        return header

    @staticmethod
    def _header(do: str, target: TargetId, deadline_ms: float) -> dict[str, Any]:
        return {
            "do": do,
            "pid": target.pid,
            "start_time": target.start_time,
            "deadline_ms": deadline_ms,
        }


def _fitting(orders: Sequence[Order]) -> Sequence[Order]:
    """Give those of *orders*, from the first one on, that fit into one request."""
    sizes = [len(order.request.records) * STUB_RECORD.itemsize for order in orders]
    return orders[: max(1, sum(size <= _MOST_BYTES for size in accumulate(sizes)))]


def _refused(
    request: WindowRequest, reason: Reason, detail: str, *, lost: bool = False
) -> WindowResult:
    return WindowResult(request.target, request.records, refused=reason, detail=detail, lost=lost)


def _result(
    request: WindowRequest, places: NDArray[np.intp], reply: dict[str, Any], data: bytes
) -> WindowResult:
    """Understand the reply to one window, whose records were packed by *places*."""
    if "refused" in reply:
        return _refused(request, Reason(reply["refused"]), reply["detail"])
    records = request.records
    results = np.empty(len(records), RESULT)
    found = np.frombuffer(data, STUB_RECORD)
    for name in ("result", "stage"):  # one by one is faster than both as a structure
        results[name][places] = found[name]
    done = (results["result"] == 0) & (results["stage"] == stub.STAGE_DONE)
    dropped = {int(places[int(at)]): Reason(reason) for at, reason in reply["dropped"].items()}
    reasons = {
        index: dropped.get(index) or _reason(int(records["op"][index]), *results[index].tolist())
        for index in np.flatnonzero(~done).tolist()
    }
    return WindowResult(
        request.target,
        records,
        results,
        done,
        reasons,
        refused=Reason.POISONED if reply["kept"] else None,
        threads=reply["threads"],
        stop_us=reply["stop_us"],
        total_us=reply["total_us"],
        timings=reply["times"],
    )


def _packed(records: NDArray[np.void]) -> tuple[NDArray[np.intp], NDArray[np.void]]:
    """Pack records for the stub, by address: what was in each place, and the packed ones.

    Each gets its place in the quarantine; where it is long, congruent with its own, so that huge
    pages are moved whole.
    """
    if np.any(records["op"] != records["op"][:1]):
        raise ValueError("the records of one window are of one kind")
    order = np.argsort(records["start"], kind="stable")
    mine = records[order]
    packed = np.zeros(len(mine), STUB_RECORD)
    for name in ("start", "length", "offset", "op"):
        packed[name] = mine[name]
    packed["flags"] = mine["advice"]
    packed["result"] = -errno.ENODATA
    lengths = mine["length"].astype(np.int64)
    packed["aside"] = np.cumsum(lengths) - lengths
    for at in np.flatnonzero(lengths >= HUGE_PAGE_SIZE).tolist():
        ahead = (int(mine["start"][at]) - int(packed["aside"][at])) % HUGE_PAGE_SIZE
        packed["aside"][at:] += np.uint64(ahead)
    return order, packed


def _reason(op: int, result: int, stage: int) -> Reason:
    """Name what kept a record from being carried out."""
    if stage >= stub.STUCK:
        return Reason.POISONED
    if -result > stub.FLAGGED:
        flags = -result - stub.FLAGGED
        named = (reason for flag, reason in _FLAGGED.items() if flag & flags)
        return next(named, Reason.WINDOW_FAILED)  # a mapping that could not be tried: sealed, say
    match -result:
        case -1:
            return Reason.CHANGED
        case errno.EBUSY | errno.EEXIST | errno.ENOENT:
            return Reason.PINNED_PAGE
        case errno.EINVAL if op in (Op.MERGE, Op.ZERO):
            return Reason.LOCKED
        case errno.ENOMEM:
            return Reason.VMA_BUDGET
    return Reason.WINDOW_FAILED
