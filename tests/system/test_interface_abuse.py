"""Callers that mean harm, or break: refused, logged once for each kind, and nobody else notices."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness import PAGE, Daemon, frames, store_mappings, until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from programs import NOBODY, CallFailedError, Puppet, Raw, lines_of

from ksmd.daemon.allowance import SHARE
from ksmd.daemon.control import KEPT_FOR_ROOT, MAX_CONNECTIONS, MAX_PER_USER
from ksmd.daemon.protocol import MAX_MESSAGE

pytestmark = pytest.mark.root

OTHER_USER = NOBODY - 1


@pytest.fixture
def daemon(open_daemons):
    return open_daemons()


def unaffected(daemon: Daemon, puppets) -> None:
    """Another user's programs share as always, and root is answered."""
    one, other = (puppets(daemon.socket, uid=OTHER_USER) for _ in range(2))
    for puppet in (one, other):
        puppet.register()
        puppet.share()
    assert bool((frames(one) == frames(other)).all())
    assert one.intact()
    assert other.intact()
    for puppet in (one, other):
        puppet.raw.hang_up()
    until(lambda: not lines_of(daemon, one) + lines_of(daemon, other), "both are forgotten")


def send_as(uid: int, path: Path, *chunks: bytes, shut: bool = False) -> socket.socket:
    """Connect as *uid* and send; the connection."""
    puppet = Puppet(path, uid=uid, pages=1)
    sock = puppet.raw.socket.dup()
    puppet.close()
    with contextlib.suppress(ConnectionError):
        for chunk in chunks:
            sock.sendall(chunk)
        if shut:
            sock.shutdown(socket.SHUT_WR)
    return sock


def closed(sock: socket.socket) -> bool:
    sock.settimeout(30)
    try:
        return sock.recv(1 << 16) == b""
    except ConnectionResetError:
        return True


MALFORMED = {
    "no JSON": b"hello\0",
    "no object": b"[1]\0",
    "no method": b"{}\0",
    "a repeated name": b'{"method":"a","method":"b"}\0',
    "too deep": b'{"method":"a","parameters":' + b'{"a":' * 40 + b"1" + b"}" * 41 + b"\0",
    "no UTF-8": b'{"method":"\xff"}\0',
    "NaN": b'{"method":"a","parameters":{"a":NaN}}\0',
    "huge": b"x" * (MAX_MESSAGE + 2),
    "huge number": b'{"method":"a","parameters":{"a":' + b"9" * 5000 + b"}}\0",
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_what_is_no_message_ends_the_connection_and_nothing_else(kind, daemon, puppets):
    for _ in range(3):
        with send_as(NOBODY, daemon.socket, MALFORMED[kind]) as sock:
            assert closed(sock)
    said = [line for line in daemon.log().splitlines() if "dropping pid" in line]
    assert len(said) == 1, said
    unaffected(daemon, puppets)


def test_slow_and_half_closed_callers_hold_up_nobody(daemon, puppets):
    begun = [send_as(NOBODY, daemon.socket, b'{"method":"org.ksmd') for _ in range(5)]
    begun += [send_as(NOBODY, daemon.socket, b'{"method":"', shut=True) for _ in range(5)]
    unread = send_as(NOBODY, daemon.socket)
    unread.setblocking(False)
    call = b'{"method":"org.ksmd.Control.Features"}\0'
    with contextlib.suppress(BlockingIOError, ConnectionError):
        while True:
            unread.send(call * 100)
    unaffected(daemon, puppets)
    slow, half = begun[:5], begun[5:]
    assert all(closed(sock) for sock in half)
    assert all(closed(sock) for sock in slow)
    until(lambda: len(sockets(daemon)) == 0, "all are dropped")
    assert daemon.log().count("it stalled") == 1
    assert "Traceback" not in daemon.log()
    for sock in [*begun, unread]:
        sock.close()


def sockets(daemon: Daemon) -> list[str]:
    """Give the connections that the daemon's process holds (of unix(7), those with its path)."""
    held = {os.fspath(fd.readlink()) for fd in Path(f"/proc/{daemon.pid}/fd").iterdir()}
    lines = Path("/proc/net/unix").read_text().splitlines()
    ends = [line.split() for line in lines if line.endswith(f" {daemon.socket}")]
    connected = "03"
    return [end[6] for end in ends if end[5] == connected and f"socket:[{end[6]}]" in held]


def test_a_half_closed_caller_gets_its_answer(daemon):
    call = b'{"method":"org.ksmd.Control.GetApiVersion"}\0'
    with send_as(NOBODY, daemon.socket, call, shut=True) as sock:
        sock.settimeout(30)
        assert sock.recv(1 << 16) == b'{"parameters":{"version":1}}\0'


_CROWD = """
import os, socket, sys
uid, count, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
os.setgroups([]); os.setresgid(uid, uid, uid); os.setresuid(uid, uid, uid)
held, refused = [], 0
for _ in range(count):
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(60)
    try:
        sock.connect(path)
        sock.sendall(b'{"method":"org.ksmd.Control.GetApiVersion"}\\0')
        answer = sock.recv(4096)
    except OSError:
        answer = b""
    if b'"version":1' in answer:
        held.append(sock)
    else:
        refused += 1
print(len(held), refused, flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def crowd(uid: int, count: int, path: Path):
    """Have *uid* open many connections and keep them: (served, refused)."""
    process = subprocess.Popen(
        [sys.executable, "-c", _CROWD, str(uid), str(count), str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (8000, 8000)),  # noqa: PLW1509
    )
    try:
        assert process.stdout is not None
        served, refused = map(int, process.stdout.readline().split())
        yield served, refused
    finally:
        process.communicate()


def test_thousands_of_connections_of_one_user_leave_room_for_the_others(daemon, puppets):
    with crowd(NOBODY, 3000, daemon.socket) as (served, refused):
        assert served == MAX_PER_USER
        assert refused == 3000 - MAX_PER_USER
        unaffected(daemon, puppets)
        assert daemon.log().count("turned away") == 1
    until(lambda: Puppet(daemon.socket).raw.call("GetApiVersion"), "there is room again")


def test_all_users_together_leave_room_for_root(daemon):
    most = MAX_CONNECTIONS - KEPT_FOR_ROOT
    with contextlib.ExitStack() as stack:
        served = 0
        for number in range(most // MAX_PER_USER + 2):
            got, _ = stack.enter_context(crowd(60000 + number, MAX_PER_USER, daemon.socket))
            served += got
        assert served == most
        assert daemon.status()["targets"] == []


def test_running_out_of_file_descriptors_harms_nobody_who_is_merged(daemon, puppets):
    """GIVEN a daemon with few descriptors WHEN programs use them up THEN it lives and recovers."""
    one, other = (puppets(daemon.socket, uid=OTHER_USER) for _ in range(2))
    for puppet in (one, other):
        puppet.register()
        puppet.share()
    used = len(list(Path(f"/proc/{daemon.pid}/fd").iterdir()))
    before = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (used + 12, before[1]))
    greedy = [Puppet(daemon.socket, pages=4) for _ in range(12)]
    try:
        failed = 0
        for puppet in greedy:
            try:
                puppet.register()
                puppet.share()
            except (CallFailedError, ConnectionError):
                failed += 1
        assert failed > 0
        assert one.intact()
        assert other.intact()
        assert bool((frames(one) == frames(other)).all())
    finally:
        for puppet in greedy:
            puppet.close()
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, before)
    until(lambda: daemon.run_ctl("status").returncode == 0, "it accepts callers again")
    unaffected(daemon, puppets)
    assert "Traceback" not in daemon.log()
    assert daemon.log().count("cannot accept callers") <= 1


# -- how much of the daemon's time -----------------------------------------------------------------


def cpu(daemon: Daemon) -> float:
    return time.clock_gettime(~daemon.pid << 3 | 2)  # clock_getcpuclockid(3)


@pytest.mark.slow
def test_a_users_scans_are_limited_to_a_share_of_the_daemons_time(daemon, puppets):
    """GIVEN a program that scans without end WHEN its allowance is used up THEN it gets a share.

    The clock of the daemon's own CPU time tells, whatever else the host does.
    """
    greedy = puppets(daemon.socket, pages=40_000)
    greedy.register()
    scanner = greedy.raw.call("CreateScan")["scan"]
    asking = puppets(daemon.socket)

    def refused() -> CallFailedError | None:
        assert greedy.raw.call("Scan", scan=scanner, pages_to_scan=1 << 20)["scanned"] > 0
        return outcome(asking.raw, "Status", {})

    failure = until(refused, "it has had its burst", patience=120)
    assert (failure.name, failure.parameters["seconds"] > 0) == ("RateLimited", True)
    daemon.ctl("pause")  # the daemon's own passes are nobody's share
    begun, used = time.monotonic(), cpu(daemon)
    while time.monotonic() - begun < 8:
        assert greedy.raw.call("Scan", scan=scanner, pages_to_scan=4000)["scanned"] == 4000
    spent = (cpu(daemon) - used) / (time.monotonic() - begun)
    print(f"{spent:.2f} of the time")
    assert spent < 1.5 * SHARE, spent
    daemon.ctl("resume")
    until(lambda: outcome(asking.raw, "Status", {}) is None, "it is served again")
    unaffected(daemon, puppets)
    assert greedy.intact()


_FLOOD = """
import os, selectors, socket, sys
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
calls = sys.argv[2].encode().ljust(len(sys.argv[2]) + 1, bytes(1)) * 200
selector = selectors.DefaultSelector()
for _ in range(32):
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(sys.argv[1])
    sock.setblocking(False)
    selector.register(sock, selectors.EVENT_READ | selectors.EVENT_WRITE, [b""])
print("all are connected", flush=True)
while True:
    for key, mask in selector.select():
        try:
            if mask & selectors.EVENT_READ:
                key.fileobj.recv(1 << 20)
            rest = key.data[0] or calls
            key.data[0] = rest[key.fileobj.send(rest):]
        except BlockingIOError:
            pass
"""


@pytest.mark.parametrize(
    "call",
    [
        '{"method":"org.ksmd.Control.GetApiVersion"}',
        '{"method":"org.varlink.service.GetInterfaceDescription",'
        '"parameters":{"interface":"org.ksmd.Control"}}',
        '{"method":"org.ksmd.Control.Status"}',
    ],
    ids=["GetApiVersion", "GetInterfaceDescription", "Status"],
)
def test_calls_without_end_hold_up_neither_merges_nor_what_is_given_back(call, daemon, puppets):
    """GIVEN a user who calls over all connections that he may have THEN others are unaffected."""
    flood = subprocess.Popen(
        [sys.executable, "-c", _FLOOD, str(daemon.socket), call], stdout=subprocess.PIPE, text=True
    )
    try:
        assert flood.stdout is not None
        assert flood.stdout.readline() == "all are connected\n"
        unaffected(daemon, puppets)
        one, other = (puppets(daemon.socket, uid=0, pages=4096) for _ in range(2))
        for puppet in (one, other):
            puppet.register()
            puppet.share()
        assert bool((frames(one) == frames(other)).all())
        for puppet in (one, other):
            puppet.raw.hang_up()
        until(lambda: not store_mappings(one.pid) + store_mappings(other.pid), "unmerged", 1.0)
        assert flood.poll() is None
        assert one.intact()
        assert other.intact()
    finally:
        flood.kill()
        flood.communicate()


# -- who may do what -------------------------------------------------------------------------------


def test_nobody_registers_memory_of_another_process(daemon, puppets):
    victim, caller = puppets(None, uid=NOBODY), puppets(daemon.socket)
    sma = caller.raw.call("CreateSharedMemoryArea")["sma"]
    for pid in (victim.pid, 1, daemon.pid, os.getpid()):
        failure = caller.raw.failure(
            "RegisterMemoryRegion", sma=sma, addr=victim.address, npages=1, pid=pid
        )
        assert failure.name == "PermissionDenied"
        assert caller.raw.failure("Why", pid=pid).name == "PermissionDenied"
    assert daemon.status()["targets"] == []
    assert daemon.log().count("RegisterMemoryRegion") == 1


def test_root_cannot_register_the_daemon_itself_nor_what_is_no_process(daemon):
    root = Raw.connect(daemon.socket)
    sma = root.call("CreateSharedMemoryArea")["sma"]
    for pid in (daemon.pid, *daemon.helpers().values(), 2, 0, -1, 1 << 22, 1 << 63, 99999999):
        failure = root.failure("RegisterMemoryRegion", sma=sma, addr=PAGE, npages=1, pid=pid)
        assert failure.name in {"InvalidRegion", "TargetGone"}, pid
    assert daemon.status()["targets"] == []


@pytest.mark.parametrize(
    "method", ["Unmerge", "Pause", "Resume", "Reload", "Plan", "GetInfoThread", "Scan"]
)
def test_a_user_may_not_do_what_is_the_operators(method, daemon, puppets):
    puppet = puppets(daemon.socket)
    failure = puppet.raw.failure(method)
    assert failure.name == "PermissionDenied"
    assert puppet.raw.call("GetApiVersion") == {"version": 1}


def test_a_user_names_no_trust_domain_and_sees_no_other_process(daemon, puppets):
    one, other = puppets(daemon.socket), puppets(daemon.socket, uid=OTHER_USER)
    other.register()
    for domain in (f"uid:{OTHER_USER}", "d", "", "x" * 100):
        sma = one.raw.call("CreateSharedMemoryArea")["sma"]
        failure = one.raw.failure(
            "RegisterMemoryRegion", sma=sma, addr=one.address, npages=1, domain=domain
        )
        assert failure.name == "PermissionDenied"
    one.register(domain=f"uid:{NOBODY}")
    one.share()
    other.share()
    for method in ("Targets", "Status"):
        assert [line["pid"] for line in one.raw.call(method)["targets"]] == [one.pid]
    assert len(daemon.status()["targets"]) == 2


def test_members_of_the_sockets_group_may_read_everything(open_daemons, puppets):
    """As the exporter does, which is not root."""
    daemon = open_daemons(socket_mode="0660", socket_group=str(OTHER_USER))
    found = daemon.socket.stat()
    assert (found.st_mode & 0o777, found.st_gid) == (0o660, OTHER_USER)
    reader, root = puppets(daemon.socket, uid=OTHER_USER), puppets(daemon.socket, uid=0)
    root.register()
    root.share()
    assert [line["pid"] for line in reader.raw.call("Status")["targets"]] == [root.pid]
    assert reader.raw.failure("Pause").name == "PermissionDenied"
    with pytest.raises(PermissionError):
        puppets(daemon.socket, uid=NOBODY)


def test_the_sockets_mode_follows_a_reload(open_daemons, puppets):
    daemon = open_daemons()
    puppet = puppets(daemon.socket)
    daemon.configure({"version": 1})
    daemon.ctl("pause")
    Raw.connect(daemon.socket).call("Reload")
    assert daemon.socket.stat().st_mode & 0o777 == 0o600
    assert puppet.raw.call("GetApiVersion") == {"version": 1}


def test_a_user_registers_a_limited_number_of_regions(open_daemons, puppets):
    daemon = open_daemons(limits={"regions_per_user": 5})
    one, other = puppets(daemon.socket), puppets(daemon.socket)
    for first in range(3):
        one.register(first, 1)
    for first in range(2):
        other.register(first, 1)
    for puppet in (one, other):
        failure = puppet.raw.failure(
            "RegisterMemoryRegion",
            sma=puppet.sma,
            addr=puppet.address + 20 * PAGE,
            npages=1,
        )
        assert failure.name == "LimitReached"
    stranger = puppets(daemon.socket, uid=OTHER_USER)
    stranger.register(0, 1)
    one.raw.call("RemoveMemoryRegion", sma=one.sma)
    other.register(3, 1)


def test_areas_and_scanners_of_a_connection_are_limited(daemon, puppets):
    puppet = puppets(daemon.socket)
    for method in ("CreateSharedMemoryArea", "CreateScan"):
        for _ in range(64):
            with contextlib.suppress(CallFailedError):
                puppet.raw.call(method)
        assert puppet.raw.failure(method).name == "LimitReached"
    assert puppets(daemon.socket).raw.call("CreateScan")


# -- processes that are not who they were ----------------------------------------------------------


def with_pid(pid: int, start):
    """Start processes by *start* until one has *pid*: (it, True), or (None, False)."""
    Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
    process = start()
    if process.pid == pid:
        return process
    process.close()
    return None


@pytest.mark.parametrize("area_first", [True, False], ids=["after its area", "before"])
def test_a_pid_that_is_used_again_is_not_who_connected(area_first, daemon):
    """GIVEN a caller that has ended WHEN its pid is another's THEN that is not registered."""
    for _ in range(50):
        caller = Puppet(daemon.socket)
        sma = caller.raw.call("CreateSharedMemoryArea")["sma"] if area_first else 0
        raw = Raw(caller.raw.socket.dup())
        caller.close()
        victim = with_pid(caller.pid, lambda: Puppet(None, pages=64))
        if victim is not None:
            break
        raw.close()
    else:
        pytest.fail("no process got the pid of one that had ended")
    try:
        assert victim.pid == caller.pid
        if not area_first:
            assert raw.failure("CreateSharedMemoryArea").name == "TargetGone"
        else:
            given = {"sma": sma, "addr": victim.address, "npages": 64}
            assert raw.failure("RegisterMemoryRegion", **given).name == "NoSuchArea"
            again = raw.failure("CreateSharedMemoryArea")
            assert again.name == "TargetGone"
        assert raw.failure("Why", pid=victim.pid).name == "TargetGone"
        assert daemon.status()["targets"] == []
        assert victim.intact()
    finally:
        victim.close()
        raw.close()


def test_a_set_user_id_program_is_not_its_caller(daemon, puppets):
    """GIVEN a registered process WHEN it becomes root by exec THEN nothing of it is scanned.

    Root's memory must not be compared with what the user that started it chooses.
    """
    program = daemon.socket.parent / "sleep"
    shutil.copy("/bin/sleep", program)
    program.chmod(0o4755)
    puppet = puppets(daemon.socket)
    puppet.register()
    puppet.share()
    assert lines_of(daemon, puppet)
    puppet.ask(f"exec {program} 1000")
    status = Path(f"/proc/{puppet.pid}/status")
    until(lambda: "Uid:\t65534\t0\t0\t0" in status.read_text(), "it is root now")
    daemon.scan()
    assert lines_of(daemon, puppet) == []
    failure = puppet.raw.failure("CreateSharedMemoryArea")
    assert failure.name == "PermissionDenied"


# -- fuzzed ----------------------------------------------------------------------------------------

numbers = st.one_of(
    st.integers(-(1 << 80), 1 << 80),
    st.integers(0, 200),
    st.sampled_from([0, 1, -1, PAGE, 1 << 47, (1 << 47) - PAGE, 1 << 63, (1 << 64) - PAGE]),
)
METHODS = {
    "CreateSharedMemoryArea": (),
    "CreateScan": (),
    "RegisterMemoryRegion": ("sma", "addr", "npages", "domain", "pid"),
    "RemoveMemoryRegion": ("sma", "wait"),
    "Share": ("sma",),
    "Scan": ("scan", "pages_to_scan", "max_pages_to_merge", "flags", "wait"),
    "Why": ("pid", "address", "start"),
}
NAMED = {
    "PermissionDenied", "InvalidRegion", "InvalidParameter", "NoSuchArea", "NoSuchScan",
    "NothingRegistered", "LimitReached", "RateLimited", "NotRegistered",
}  # fmt: skip


@st.composite
def calls(draw):
    """Give a method with parameters, most of them nearly right."""
    method = draw(st.sampled_from(sorted(METHODS)))
    values = {
        "sma": st.one_of(st.integers(1, 80), numbers),
        "scan": st.one_of(st.integers(1, 20), numbers),
        "addr": st.one_of(st.integers(0, 70).map(lambda page: ("page", page)), numbers),
        "npages": st.one_of(st.integers(1, 64), numbers),
        "domain": st.one_of(st.none(), st.just("uid:65534"), st.text(max_size=80)),
        "pid": st.one_of(st.none(), st.just("own"), numbers),
        "address": st.one_of(st.none(), numbers),
        "wait": st.one_of(st.none(), st.booleans()),
    }
    given = {name: draw(values.get(name, numbers)) for name in METHODS[method]}
    if draw(st.integers(0, 9)) == 0 and given:
        given[draw(st.sampled_from(sorted(given)))] = draw(
            st.one_of(st.text(max_size=5), st.booleans(), st.lists(st.integers(), max_size=2))
        )
    return method, given


def outcome(raw: Raw, method: str, given: dict) -> CallFailedError | None:
    try:
        raw.call(method, **given)
    except CallFailedError as error:
        return error
    return None


def test_whatever_a_program_asks_for_is_answered_and_harms_nobody(daemon, puppets):
    puppet = puppets(daemon.socket, pages=64)
    twin = puppets(daemon.socket, pages=64)
    twin.register()
    twin.share()

    @settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(calls(), min_size=1, max_size=8))
    def ask(sequence) -> None:
        for method, parameters in sequence:
            given = dict(parameters)
            if isinstance(given.get("addr"), tuple):
                given["addr"] = puppet.address + given["addr"][1] * PAGE
            if given.get("pid") == "own":
                given["pid"] = puppet.pid
            error = outcome(puppet.raw, method, given)
            assert error is None or error.name in NAMED, (method, given, error)
            if error is not None and error.name == "RateLimited":
                time.sleep(float(error.parameters["seconds"]))

    ask()
    assert puppet.intact()
    assert twin.intact()
    assert puppet.raw.call("GetApiVersion") == {"version": 1}
    assert "Traceback" not in daemon.log(), daemon.log()
    others = [line for line in daemon.status()["targets"] if line["pid"] != twin.pid]
    assert {line["pid"] for line in others} <= {puppet.pid}
    puppet.raw.hang_up()
    unaffected(daemon, puppets)
