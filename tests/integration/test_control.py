"""The control socket: a real server and real callers, well-behaved and not.

Most tests turn the server's selector by hand until nothing is ready any more. That is exact: there
is no waiting, and a server that would spin is caught, because it never becomes quiet.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
from pathlib import Path

import pytest

from ksmd.client import Client, DaemonUnavailableError, RemoteError
from ksmd.daemon.connection import MAX_OUTPUT
from ksmd.daemon.control import MAX_CONNECTIONS, STALL_SECONDS, CallError, ControlServer
from ksmd.daemon.protocol import MAX_MESSAGE, MAX_REPLY, CallMessage, Decoder, encode_call
from ksmd.model.errors import Exit, KernelFeatureError, KsmdError, PrivilegeError, TargetGoneError


class Daemon:
    """A server with a fake dispatch, turned by hand or by a thread."""

    def __init__(self, path: Path) -> None:
        self.now = 0.0
        self.calls: list[tuple[str, dict]] = []
        self.waiting: list = []
        self.closed: list[int] = []
        self.selector = selectors.DefaultSelector()
        self.server = ControlServer(path, self.dispatch, self.closed.append, lambda: self.now)
        self.server.register(self.selector)
        self.path = path

    def dispatch(self, method, parameters, call):
        self.calls.append((method, parameters))
        if method == "GetApiVersion":
            return {"version": 1}
        if method == "Scan":
            self.waiting.append(call)
            return None
        if method == "Plan":
            return {"text": "x" * (MAX_MESSAGE // 2)}
        if method == "Features":
            return {"text": "x" * (MAX_REPLY - 100)}
        if method == "Unmerge":
            raise KernelFeatureError("no", "upgrade")
        if method == "Why":
            raise TargetGoneError("gone")
        if method == "Targets":
            raise CallError("NotRegistered", pid=7)
        if method == "Status":
            return {"no": b"JSON"}
        raise ZeroDivisionError

    def settle(self) -> None:
        """Do all there is to do. A server that never becomes quiet fails the test."""
        for _ in range(20_000):
            events = self.selector.select(0)
            if not events:
                return
            for key, mask in events:
                key.data(key, mask)
        pytest.fail("the server spins")

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(20)
        sock.connect(str(self.path))
        self.settle()
        return sock

    def close(self) -> None:
        self.server.close()
        self.selector.close()


@pytest.fixture
def daemon(tmp_path):
    made = Daemon(tmp_path / "run" / "control.sock")
    yield made
    made.close()


@pytest.fixture
def threaded(daemon):
    """The same, turned by a thread, for callers that block."""
    wake, stop = socket.socketpair()
    daemon.selector.register(wake, selectors.EVENT_READ, None)

    def turn():
        while True:
            for key, mask in daemon.selector.select():
                if key.data is None:
                    return
                key.data(key, mask)

    thread = threading.Thread(target=turn)
    thread.start()
    yield daemon
    stop.close()
    thread.join()
    daemon.selector.unregister(wake)
    wake.close()


def request(method: str, more: bool = False, oneway: bool = False, **parameters) -> bytes:
    return encode_call(CallMessage(f"org.ksmd.Control.{method}", parameters, more, oneway))


def replies(sock: socket.socket, count: int) -> list[dict]:
    decoder, found = Decoder(), []
    while len(found) < count:
        data = sock.recv(1 << 16)
        assert data, "the server closed the connection"
        decoder.feed(data)
        while (message := decoder.next()) is not None:
            found.append(message)
    return found


def is_closed(sock: socket.socket) -> bool:
    sock.settimeout(0)
    try:
        while sock.recv(1 << 16):
            pass
    except BlockingIOError:
        return False
    except ConnectionResetError:
        pass
    return True


# -- the socket itself -----------------------------------------------------------------------------


def test_the_socket_is_for_root_alone_and_its_directory_is_made(daemon):
    assert stat.S_IMODE(daemon.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(daemon.path.parent.stat().st_mode) == 0o755


def test_closing_removes_the_socket(tmp_path):
    daemon = Daemon(tmp_path / "s")
    daemon.close()
    assert not daemon.path.exists()


def test_a_socket_left_by_a_dead_daemon_is_replaced(tmp_path):
    path = tmp_path / "s"
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(path))
    left.listen()
    left.close()
    daemon = Daemon(path)
    sock = daemon.connect()
    sock.sendall(request("GetApiVersion"))
    daemon.settle()
    assert replies(sock, 1) == [{"parameters": {"version": 1}}]
    daemon.close()


def test_a_live_daemon_keeps_its_socket_and_its_callers(daemon):
    sock = daemon.connect()
    with pytest.raises(KsmdError, match="another ksmd answers on") as caught:
        Daemon(daemon.path)
    assert caught.value.exit_code == Exit.FAILED
    assert caught.value.hint
    daemon.settle()
    sock.sendall(request("GetApiVersion"))
    daemon.settle()
    assert replies(sock, 1) == [{"parameters": {"version": 1}}]


def test_a_live_daemon_with_a_full_queue_counts_as_live(tmp_path):
    path = tmp_path / "s"
    other = socket.socket(socket.AF_UNIX)
    other.bind(str(path))
    other.listen(0)
    callers = []
    with contextlib.suppress(BlockingIOError):
        while True:
            callers.append(socket.socket(socket.AF_UNIX))
            callers[-1].setblocking(False)
            callers[-1].connect(str(path))
    with pytest.raises(KsmdError, match="another ksmd"):
        Daemon(path)
    for sock in (other, *callers):
        sock.close()


def test_a_file_that_is_no_socket_is_never_removed(tmp_path):
    path = tmp_path / "notes"
    path.write_text("keep")
    with pytest.raises(KsmdError, match="no socket") as caught:
        Daemon(path)
    assert caught.value.exit_code == Exit.USAGE
    assert path.read_text() == "keep"


def test_a_path_too_long_for_a_socket_is_an_error_of_its_own(tmp_path):
    with pytest.raises(KsmdError, match="cannot listen"):
        Daemon(tmp_path / ("x" * 120))


def test_the_socket_of_a_successor_is_not_removed(tmp_path):
    first = Daemon(tmp_path / "s")
    (tmp_path / "s").unlink()
    second = Daemon(tmp_path / "s")
    first.close()
    assert second.path.exists()
    second.close()


# -- calls -----------------------------------------------------------------------------------------


def test_every_service_describes_itself(threaded):
    with Client(threaded.path) as client:
        info = client.call("org.varlink.service.GetInfo")
        assert info["interfaces"] == ["org.ksmd.Control", "org.varlink.service"]
        for name in info["interfaces"]:
            text = client.call("org.varlink.service.GetInterfaceDescription", interface=name)
            assert f"interface {name}" in text["description"]


@pytest.mark.parametrize(
    ("method", "parameters", "error", "said"),
    [
        ("a.b.C", {}, "InterfaceNotFound", {"interface": "a.b"}),
        ("C", {}, "InterfaceNotFound", {"interface": ""}),
        ("org.ksmd.Control.No", {}, "MethodNotFound", {"method": "org.ksmd.Control.No"}),
        ("org.ksmd.Control.Scan", {"wait": 1}, "InvalidParameter", {"parameter": "wait"}),
        ("org.ksmd.Control.Pause", {"x": None}, "InvalidParameter", {"parameter": "x"}),
        ("org.varlink.service.GetInfo", {"x": 1}, "InvalidParameter", {"parameter": "x"}),
    ],
)
def test_what_is_not_in_the_description_never_reaches_dispatch(
    daemon, method, parameters, error, said
):
    sock = daemon.connect()
    sock.sendall(encode_call(CallMessage(method, parameters)))
    daemon.settle()
    (reply,) = replies(sock, 1)
    assert reply == {"error": f"org.varlink.service.{error}", "parameters": said}
    assert daemon.calls == []


def test_null_parameters_are_absent_ones(daemon):
    sock = daemon.connect()
    sock.sendall(request("Scan", wait=None, until_settled=True))
    daemon.settle()
    assert daemon.calls == [("Scan", {"until_settled": True})]


def test_errors_of_the_daemon_reach_the_caller_as_their_own_kind(threaded):
    with Client(threaded.path) as client:
        with pytest.raises(KernelFeatureError, match="no") as kernel:
            client.call("Unmerge")
        assert (kernel.value.hint, kernel.value.exit_code) == ("upgrade", Exit.KERNEL)
        with pytest.raises(TargetGoneError):
            client.call("Why", pid=1)
        with pytest.raises(RemoteError, match="process 7 is no target") as remote:
            client.call("Targets")
        assert remote.value.name == "org.ksmd.Control.NotRegistered"


def test_a_mistake_in_one_method_ends_neither_the_daemon_nor_the_connection(threaded):
    with Client(threaded.path) as client:
        with pytest.raises(RemoteError, match="did not expect"):
            client.call("Pause")
        with pytest.raises(RemoteError, match="malformed"):
            client.call("Status")
        assert client.call("GetApiVersion") == {"version": 1}


def test_calls_are_answered_in_order_and_later_ones_wait_for_earlier_ones(daemon):
    sock = daemon.connect()
    sock.sendall(request("Scan", wait=True) + request("GetApiVersion") * 40)
    daemon.settle()
    assert [method for method, _ in daemon.calls] == ["Scan"]
    (call,) = daemon.waiting
    call.reply({"scanned": 1, "merged": 0, "settled": True, "passes": 1})
    assert len(daemon.calls) == 1, "an answer must not begin the next call by itself"
    daemon.settle()
    found = replies(sock, 41)
    assert found[0]["parameters"]["settled"] is True
    assert found[1:] == [{"parameters": {"version": 1}}] * 40


def test_progress_goes_only_to_who_asked_for_more(daemon):
    one, two = daemon.connect(), daemon.connect()
    one.sendall(request("Scan", wait=True))
    two.sendall(request("Scan", more=True, wait=True))
    daemon.settle()
    for call in daemon.waiting:
        call.reply({"passes": 1}, continues=True)
        call.reply({"passes": 2})
        call.reply({"passes": 3})
        assert call.closed
    daemon.settle()
    assert replies(one, 1) == [{"parameters": {"passes": 2}}]
    assert replies(two, 2) == [
        {"parameters": {"passes": 1}, "continues": True},
        {"parameters": {"passes": 2}},
    ]
    assert not is_closed(one)


def test_a_oneway_call_is_done_and_not_answered(daemon):
    sock = daemon.connect()
    sock.sendall(request("Unmerge", oneway=True) + request("GetApiVersion"))
    daemon.settle()
    assert replies(sock, 1) == [{"parameters": {"version": 1}}]
    assert [method for method, _ in daemon.calls] == ["Unmerge", "GetApiVersion"]


def test_stopping_answers_who_still_waits(tmp_path):
    daemon = Daemon(tmp_path / "s")
    sock = daemon.connect()
    sock.sendall(request("Scan", wait=True))
    daemon.settle()
    daemon.close()
    (reply,) = replies(sock, 1)
    assert reply["error"] == "org.ksmd.Control.Failed"
    assert is_closed(sock)
    daemon.waiting[0].reply({})  # nobody is there: nothing happens


# -- callers that misbehave ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "garbage",
    [b"GET / HTTP/1.1\r\n\r\n\0", b"\0", b"[" * 10_000 + b"\0", b"{}\0", b'{"method":1}\0'],
)
def test_who_does_not_speak_the_protocol_is_dropped_and_others_are_served(daemon, garbage):
    good, bad = daemon.connect(), daemon.connect()
    bad.sendall(garbage)
    good.sendall(request("GetApiVersion"))
    daemon.settle()
    assert is_closed(bad)
    assert replies(good, 1) == [{"parameters": {"version": 1}}]
    assert len(daemon.server) == 1
    assert daemon.closed == [2]


def test_an_endless_message_is_cut_off(daemon):
    sock = daemon.connect()
    sock.settimeout(0)
    sent = 0
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        while sent < 4 * MAX_MESSAGE:
            with contextlib.suppress(BlockingIOError):
                sent += sock.send(b"x" * 65536)
            daemon.settle()
    assert MAX_MESSAGE <= sent < 2 * MAX_MESSAGE
    assert len(daemon.server) == 0


def test_a_caller_that_never_finishes_its_message_is_dropped_and_idle_ones_are_not(daemon):
    idle, slow = daemon.connect(), daemon.connect()
    slow.sendall(b'{"method"')
    daemon.settle()
    daemon.now += STALL_SECONDS / 2
    slow.sendall(b":")
    daemon.settle()
    daemon.server.expire()
    assert len(daemon.server) == 2
    daemon.now += STALL_SECONDS / 2 + 1
    daemon.server.expire()
    assert is_closed(slow)
    assert not is_closed(idle)


def test_a_caller_that_waits_long_for_its_answer_is_not_taken_for_a_slow_one(daemon):
    sock = daemon.connect()
    sock.sendall(request("Scan", wait=True) + b'{"method"')
    daemon.settle()
    daemon.now += 100 * STALL_SECONDS
    daemon.server.expire()
    daemon.waiting[0].reply({"passes": 1})
    daemon.settle()
    daemon.server.expire()
    assert replies(sock, 1) == [{"parameters": {"passes": 1}}]
    assert not is_closed(sock)


def test_a_caller_that_does_not_read_costs_a_bounded_buffer_and_is_dropped(daemon):
    sock = daemon.connect()
    sock.sendall(request("Plan") * 100)
    daemon.settle()
    done = len(daemon.calls)
    assert done * (MAX_MESSAGE // 2) < MAX_OUTPUT, "calls were begun for one who does not read"
    daemon.now += STALL_SECONDS + 1
    daemon.server.expire()
    assert len(daemon.server) == 0


def test_a_reply_may_be_longer_than_any_call_and_than_what_may_lie_unread(threaded):
    """The status of thousands of targets: it is no stream that nobody reads."""
    with Client(threaded.path, timeout=20) as client:
        for _ in range(3):
            assert len(client.call("Features")["text"]) == MAX_REPLY - 100 > MAX_OUTPUT
        assert client.call("GetApiVersion") == {"version": 1}


def test_who_sends_many_calls_at_once_gets_no_more_turns_than_others(daemon):
    """GIVEN calls that wait in dozens WHEN the loop comes round THEN one of each is begun."""
    many, few = daemon.connect(), daemon.connect()
    many.sendall(request("GetApiVersion") * 50)
    few.sendall(request("Unmerge"))
    for _ in range(3):
        for key, mask in daemon.selector.select(0):
            key.data(key, mask)
    assert daemon.calls.count(("GetApiVersion", {})) == 3
    assert daemon.calls.count(("Unmerge", {})) == 1
    daemon.settle()
    assert len(replies(many, 50)) == 50


def test_who_reads_slowly_gets_everything(daemon):
    sock = daemon.connect()
    sock.sendall(request("Plan") * 10)
    decoder, found = Decoder(), 0
    while found < 10:
        daemon.settle()
        daemon.now += STALL_SECONDS / 2
        daemon.server.expire()
        decoder.feed(sock.recv(200_000))
        while decoder.next() is not None:
            found += 1


def test_streamed_progress_that_nobody_reads_is_cut_off(daemon):
    sock = daemon.connect()
    sock.sendall(request("Scan", more=True))
    daemon.settle()
    (call,) = daemon.waiting
    for _ in range(100):
        call.reply({"text": "x" * 100_000}, continues=True)
    assert call.closed
    assert len(daemon.server) == 0


def test_who_ends_its_sending_side_still_gets_its_answers(daemon):
    sock = daemon.connect()
    sock.sendall(request("Scan", wait=True) + request("GetApiVersion"))
    sock.shutdown(socket.SHUT_WR)
    daemon.settle()
    daemon.server.expire()
    daemon.settle()
    daemon.waiting[0].reply({"passes": 1})
    daemon.settle()
    assert replies(sock, 2) == [{"parameters": {"passes": 1}}, {"parameters": {"version": 1}}]
    assert is_closed(sock)
    assert len(daemon.server) == 0


def test_half_a_message_and_an_end_is_a_goodbye(daemon):
    sock = daemon.connect()
    sock.sendall(b'{"method":')
    sock.shutdown(socket.SHUT_WR)
    daemon.settle()
    assert is_closed(sock)
    assert (len(daemon.server), daemon.calls) == (0, [])


def test_who_leaves_while_waiting_is_forgotten_at_once(daemon):
    sock = daemon.connect()
    sock.sendall(request("Scan", wait=True))
    daemon.settle()
    sock.close()
    daemon.settle()
    assert daemon.waiting[0].closed
    assert len(daemon.server) == 0
    daemon.waiting[0].reply({})
    daemon.settle()


def test_who_leaves_in_two_steps_is_forgotten_by_the_next_sweep(daemon):
    sock = daemon.connect()
    sock.sendall(request("Scan", wait=True))
    sock.shutdown(socket.SHUT_WR)
    daemon.settle()
    sock.close()
    daemon.settle()
    daemon.server.expire()
    assert daemon.waiting[0].closed
    assert len(daemon.server) == 0


def test_three_hundred_callers_are_served_up_to_the_limit_and_the_rest_told_why(daemon):
    callers = []
    for _ in range(300):
        callers.append(daemon.connect())
    assert len(daemon.server) == MAX_CONNECTIONS
    for sock in callers[:MAX_CONNECTIONS]:
        sock.sendall(request("GetApiVersion"))
    daemon.settle()
    for sock in callers[:MAX_CONNECTIONS]:
        assert replies(sock, 1) == [{"parameters": {"version": 1}}]
    for sock in callers[MAX_CONNECTIONS:]:
        (reply,) = replies(sock, 1)
        assert reply["error"] == "org.ksmd.Control.TooManyConnections"
        assert is_closed(sock)
    for sock in callers:
        sock.close()
    daemon.settle()
    assert len(daemon.server) == 0
    assert sorted(daemon.closed) == list(range(1, MAX_CONNECTIONS + 1))


def test_the_client_tells_why_it_was_turned_away(threaded):
    clients = [Client(threaded.path, timeout=20) for _ in range(MAX_CONNECTIONS)]
    # each has been admitted once it is answered
    for client in clients:
        client.call("GetApiVersion")
    with (
        Client(threaded.path, timeout=20) as late,
        pytest.raises(RemoteError, match="connections") as told,
    ):
        late.call("GetApiVersion")
    assert told.value.name.endswith("TooManyConnections")
    for client in clients:
        client.close()


SHORT_OF_DESCRIPTORS = """
    import resource, selectors, sys
    from ksmd.daemon.control import ControlServer
    selector = selectors.DefaultSelector()
    server = ControlServer(sys.argv[1], lambda method, parameters, call: {"version": 1})
    server.register(selector)
    resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24))
    print("ready", flush=True)
    while True:
        for key, mask in selector.select(0.05):
            key.data(key, mask)
        server.expire()
"""


def test_a_server_out_of_file_descriptors_recovers(tmp_path):
    path, log = tmp_path / "s", tmp_path / "log"
    with log.open("wb") as errors_of_it:
        child = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(SHORT_OF_DESCRIPTORS), str(path)],
            stdout=subprocess.PIPE,
            stderr=errors_of_it,
        )
    try:
        assert child.stdout.readline() == b"ready\n"
        clients, errors = [], []
        for _ in range(60):
            client = Client(path, timeout=20)
            clients.append(client)
            try:
                client.call("GetApiVersion")
            except RemoteError as error:
                errors.append(error.name)
        assert len(errors) > 30
        assert set(errors) == {"org.ksmd.Control.TooManyConnections"}
        for client in clients:
            client.close()
        for _ in range(200):
            with Client(path, timeout=20) as client, contextlib.suppress(RemoteError):
                assert client.call("GetApiVersion") == {"version": 1}
                break
        else:
            pytest.fail("nobody was served any more")
        assert child.poll() is None
        assert log.read_text().splitlines() == ["cannot accept callers: Too many open files"]
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


# -- the client ------------------------------------------------------------------------------------


def test_the_client_streams_progress_and_ends_with_the_result(threaded):
    def scan():
        while not threaded.waiting:
            pass
        call = threaded.waiting[0]
        for passes in (1, 2):
            call.reply({"passes": passes}, continues=True)
        call.reply({"passes": 3})

    thread = threading.Thread(target=scan)
    thread.start()
    with Client(threaded.path, timeout=20) as client:
        assert [reply["passes"] for reply in client.stream("Scan", wait=True)] == [1, 2, 3]
    thread.join()


def test_no_daemon_says_how_to_start_one(tmp_path):
    with pytest.raises(DaemonUnavailableError, match="not running") as caught:
        Client(tmp_path / "nothing")
    assert "systemctl start ksmd" in caught.value.hint
    assert caught.value.exit_code == Exit.FAILED


def test_a_daemon_that_does_not_answer_is_named_as_such(daemon):
    client = Client(daemon.path, timeout=0.05)
    with pytest.raises(DaemonUnavailableError, match="did not answer"):
        client.call("GetApiVersion")
    client.close()


def test_a_service_that_is_no_ksmd_is_named_as_such(tmp_path):
    other = socket.socket(socket.AF_UNIX)
    other.bind(str(tmp_path / "s"))
    other.listen()
    for answer, words in ((b"HTTP/1.1 400\0", "no ksmd"), (b"", "closed the connection")):
        client = Client(tmp_path / "s", timeout=20)
        peer, _ = other.accept()
        peer.sendall(answer)
        peer.close()
        with pytest.raises(DaemonUnavailableError, match=words):
            client.call("Status")
        client.close()
    other.close()


def as_nobody(path: Path) -> str:
    """Call the daemon as another user; what the client says."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        answer = "served"
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            Client(path, timeout=20).call("GetApiVersion")
        except PrivilegeError as error:
            answer = f"{int(error.exit_code)} {error}"
        except BaseException as error:
            answer = repr(error)
        os.write(writer, answer.encode())
        os.kill(os.getpid(), signal.SIGKILL)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    os.waitpid(pid, 0)
    return said


@pytest.mark.root
def test_other_users_are_kept_out_twice():
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        daemon = Daemon(Path(name) / "s")
        try:
            assert as_nobody(daemon.path).startswith("3 ")
            daemon.path.chmod(0o666)
            timer = threading.Thread(target=lambda: daemon.selector.select(20) and daemon.settle())
            timer.start()
            assert as_nobody(daemon.path) == "3 only root may control ksmd"
            timer.join()
            assert daemon.calls == []
        finally:
            daemon.close()
