"""Whatever callers do, in any order: the server answers who behaves, and forgets who has left."""

from __future__ import annotations

import contextlib
import selectors
import socket
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksmd.daemon.control import STALL_SECONDS, CallError, ControlServer
from ksmd.daemon.protocol import MAX_REPLY, CallMessage, Decoder, encode_call
from ksmd.model.errors import TargetGoneError

CALLERS = 4
METHODS = ("GetApiVersion", "Scan", "Monitor", "Why", "Targets", "Plan", "Nonsense")


def message(method: str, more: bool, oneway: bool) -> bytes:
    parameters = {"pid": 1} if method == "Why" else {}
    return encode_call(CallMessage(f"org.ksmd.Control.{method}", parameters, more, oneway))


CALLS = st.tuples(st.sampled_from(METHODS), st.booleans(), st.booleans())
GOOD = st.builds(message, st.sampled_from(METHODS), st.booleans(), st.booleans())
BYTES = st.one_of(
    GOOD,
    st.lists(GOOD, max_size=40).map(b"".join),
    GOOD.flatmap(lambda data: st.integers(0, len(data)).map(lambda end: data[:end])),
    st.binary(max_size=50),
    st.sampled_from([b"\0", b"{}\0", b"[" * 100, b"x" * 70_000]),
)
WHO = st.integers(0, CALLERS - 1)
ACTIONS = st.one_of(
    st.tuples(st.just("send"), WHO, BYTES),
    st.tuples(st.just("send"), WHO, BYTES),
    st.tuples(st.just("read"), WHO, st.integers(1, 1 << 20)),
    st.tuples(st.sampled_from(["end", "leave"]), WHO, st.none()),
    st.tuples(st.sampled_from(["answer", "progress", "fail"]), WHO, st.none()),
    st.tuples(st.just("wait"), WHO, st.floats(0, 2 * STALL_SECONDS)),
)


class Server:
    """A server, turned by hand, whose longer calls are answered when the test says so."""

    def __init__(self, path: Path) -> None:
        self.now = 0.0
        self.path = path
        self.waiting: list = []
        self.closed: list[int] = []
        self.selector = selectors.DefaultSelector()
        self.server = ControlServer(
            path, self.dispatch, self.closed.append, lambda: self.now, mode=0o666
        )
        self.server.register(self.selector)

    def dispatch(self, method, parameters, call):
        match method:
            case "GetApiVersion":
                return {"version": 1}
            case "Scan" | "Monitor":
                self.waiting.append(call)
                return None
            case "Plan":
                return {"text": "x" * 300_000}
            case "Why":
                raise TargetGoneError("gone")
            case "Targets":
                raise CallError("NotRegistered", pid=7)
        raise AssertionError(f"{method} is in no description")

    def settle(self) -> None:
        for _ in range(5_000):
            events = self.selector.select(0)
            if not events:
                return
            for key, mask in events:
                key.data(key, mask)
        pytest.fail("the server spins")

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(self.path))
        sock.setblocking(False)
        self.settle()
        return sock


def do(server: Server, callers: list, action: str, who: int, value) -> None:
    if action in {"send", "read", "end", "leave"}:
        sock = callers[who] = callers[who] or server.connect()
        with contextlib.suppress(OSError):
            match action:
                case "send":
                    sock.send(value)
                case "read":
                    sock.recv(value)
                case "end":
                    sock.shutdown(socket.SHUT_WR)
                case "leave":
                    callers[who] = None
                    sock.close()
    if action == "wait":
        server.now += value
        server.server.expire()
    elif action in {"answer", "progress", "fail"} and server.waiting:
        call = server.waiting[who % len(server.waiting)]
        if action == "fail":
            call.error("Failed", message="", hint="", exit_code=1)
        else:
            call.reply({"passes": 1}, continues=action == "progress")
        server.waiting = [one for one in server.waiting if not one.closed]


@settings(max_examples=300)
@given(st.lists(ACTIONS, max_size=40))
def test_whatever_callers_do_who_behaves_is_answered_and_who_left_is_forgotten(actions):
    with tempfile.TemporaryDirectory() as directory:
        server = Server(Path(directory) / "s")
        callers: list[socket.socket | None] = [None] * CALLERS
        try:
            for action, who, value in actions:
                do(server, callers, action, who, value)
                server.settle()
            good = server.connect()
            good.send(message("GetApiVersion", False, False))
            server.settle()
            assert good.recv(1000) == b'{"parameters":{"version":1}}\0'
            for sock in filter(None, callers):
                sock.close()
            server.settle()
            server.server.expire()
            assert len(server.server) == 1
            good.close()
            server.settle()
            assert len(server.server) == 0
            assert all(call.closed for call in server.waiting)
            # each connection is told of once, whichever way it ended
            assert sorted(server.closed) == list(range(1, len(server.closed) + 1))
        finally:
            server.server.close()
            server.selector.close()


STEPS = st.one_of(
    st.tuples(st.just("call"), WHO, st.lists(CALLS, min_size=1, max_size=30)),
    st.tuples(st.just("call"), WHO, st.lists(CALLS, min_size=1, max_size=30)),
    st.tuples(st.just("read"), WHO, st.integers(1, 1 << 18)),
    st.tuples(st.just("end"), WHO, st.none()),
    st.tuples(st.sampled_from(["answer", "progress"]), WHO, st.none()),
)


class Patient:
    """A caller that speaks the protocol, and counts what it is owed."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.owed = 0
        self.ended = self.gone = False
        self._decoder = Decoder(MAX_REPLY)

    def call(self, calls) -> None:
        if self.ended:
            return
        for method, more, oneway in calls:
            with contextlib.suppress(BlockingIOError):
                data = message(method, more, oneway)
                assert self.socket.send(data) == len(data)
                self.owed += not oneway

    def read(self, most: int) -> bool:
        """Read once; whether there was anything."""
        try:
            data = self.socket.recv(most)
        except BlockingIOError:
            return False
        self.gone = self.gone or not data
        self._decoder.feed(data)
        while (reply := self._decoder.next()) is not None:
            self.owed -= not reply.get("continues", False)
        return bool(data)

    def end(self) -> None:
        self.ended = True
        self.socket.shutdown(socket.SHUT_WR)


@settings(max_examples=200)
@given(st.lists(STEPS, max_size=30))
def test_every_call_gets_its_one_answer_however_they_are_mixed(steps):
    """GIVEN callers who keep to the protocol THEN none is dropped, and none waits for ever."""
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        server = Server(Path(directory) / "s")
        stack.callback(server.selector.close)
        stack.callback(server.server.close)
        callers = [Patient(stack.enter_context(server.connect())) for _ in range(CALLERS)]
        for action, who, value in steps:
            caller = callers[who]
            match action:
                case "call":
                    caller.call(value)
                case "read" if not caller.gone:
                    caller.read(value)
                case "end" if not caller.ended:
                    caller.end()
                case "answer" | "progress":
                    do(server, [], action, who, None)
            server.settle()
        busy = True
        while busy:
            for call in server.waiting:
                call.reply({"passes": 1})
            busy, server.waiting = bool(server.waiting), []
            server.settle()
            for caller in callers:
                busy |= not caller.gone and caller.read(1 << 16)
            server.settle()
        for caller in callers:
            assert (caller.owed, caller.gone) == (0, caller.ended)
        assert len(server.server) == sum(not caller.ended for caller in callers)
