"""What the service manager is told, what it hands over, and how the journal gets its fields."""

from __future__ import annotations

import io
import logging
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from ksmd.daemon import journal, listening
from ksmd.daemon.notify import Manager
from ksmd.kernel import sdnotify
from ksmd.kernel.sdnotify import Inherited
from ksmd.model.errors import UsageError


@pytest.fixture
def manager(tmp_path: Path):
    """A manager's socket, and what arrives there."""
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind(str(path))
        end.settimeout(5)
        yield path, lambda: end.recv(4096).decode(), end


def test_each_state_is_told_as_sd_notify_has_it(manager) -> None:
    path, received, _ = manager
    told = Manager(str(path))
    told.ready()
    assert received() == "READY=1"
    told.reloading()
    first, second = received().split("\n")
    assert first == "RELOADING=1"
    assert int(second.removeprefix("MONOTONIC_USEC=")) > 0
    told.stopping()
    assert received() == "STOPPING=1"
    told.extend(1.5)
    assert received() == "EXTEND_TIMEOUT_USEC=1500000"


def test_a_status_is_one_line_and_is_told_again_only_when_it_is_another(manager) -> None:
    path, received, _ = manager
    told = Manager(str(path))
    for text in ("saving\n 1 MiB", "saving 1 MiB", "saving 2 MiB"):
        told.status(text)
    told.ready()
    assert [received() for _ in range(3)] == [
        "STATUS=saving 1 MiB", "STATUS=saving 2 MiB", "READY=1",
    ]  # fmt: skip


def test_the_watchdog_is_fed_four_times_in_its_time_and_not_more(manager) -> None:
    path, received, end = manager
    now = [0.0]
    told = Manager(str(path), watchdog_secs=8.0, clock=lambda: now[0])
    for now[0] in (0.0, 0.5, 1.9, 2.0, 3.9, 4.0):
        told.alive()
    assert [received() for _ in range(3)] == ["WATCHDOG=1"] * 3
    end.setblocking(False)
    with pytest.raises(BlockingIOError):
        received()
    Manager(str(path), watchdog_secs=0.0).alive()  # a unit without WatchdogSec=
    with pytest.raises(BlockingIOError):
        received()


def test_a_stored_descriptor_arrives_with_its_name(manager) -> None:
    path, _, end = manager
    read, write = os.pipe()
    sdnotify.send(str(path), sdnotify.store("guard-7"), write)
    os.close(write)
    text, fds, _, _ = socket.recv_fds(end, 4096, 4)
    assert text.decode().split("\n") == ["FDSTORE=1", "FDPOLL=0", "FDNAME=guard-7"]
    os.write(fds[0], b"x")
    assert os.read(read, 1) == b"x"
    sdnotify.send(str(path), sdnotify.forget("guard-7"))
    assert end.recv(4096) == b"FDSTOREREMOVE=1\nFDNAME=guard-7"
    for fd in (read, *fds):
        os.close(fd)


def test_an_abstract_address_is_understood() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind(f"\0ksmd-test-{os.getpid()}")
        end.settimeout(5)
        Manager(f"@ksmd-test-{os.getpid()}").ready()
        assert end.recv(100) == b"READY=1"


def test_without_a_manager_or_with_a_dead_one_nothing_is_said_and_nothing_fails(tmp_path) -> None:
    for address in ("", str(tmp_path / "nobody")):
        told = Manager(address, watchdog_secs=1.0)
        assert told.present is bool(address)
        told.ready()
        told.status("x")
        told.alive()
        assert told.restarting("a.service") is False


@pytest.mark.parametrize(
    ("jobs", "restarts"),
    [
        (" 812 ksmd.service restart running\n", True),
        (" 812 ksmd.service stop running\n", False),
        ("", False),
        (" 812 other.service restart waiting\n 813 ksmd.service stop running\n", False),
    ],
)
def test_a_restart_is_told_from_a_stop_by_the_job_of_the_unit(
    tmp_path: Path, monkeypatch, jobs: str, restarts: bool
) -> None:
    fake = tmp_path / "systemctl"
    fake.write_text(f"#!/bin/sh\nprintf '%s' '{jobs}'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert Manager("@somebody").restarting("ksmd.service") is restarts


def test_a_restart_that_cannot_be_asked_for_is_a_stop(tmp_path: Path, monkeypatch) -> None:
    fake = tmp_path / "systemctl"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr("ksmd.daemon.notify._ASK_SECONDS", 0.2)
    for script in ("exit 1", "echo ' 1 ksmd.service restart running'; exec sleep 5"):
        fake.write_text(f"#!/bin/sh\n{script}\n")
        fake.chmod(0o755)
        assert Manager("@somebody").restarting("ksmd.service") is False


def test_a_manager_that_does_not_read_holds_nobody_up(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("ksmd.daemon.notify._SEND_SECONDS", 0.01)
    path = tmp_path / "full"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind(str(path))
        told = Manager(str(path))
        queue = int(Path("/proc/sys/net/unix/max_dgram_qlen").read_text())
        for number in range(queue + 200):
            told.status(str(number))


def test_what_the_manager_said_is_not_passed_on_to_children() -> None:
    environ = {
        "NOTIFY_SOCKET": "/run/x", "WATCHDOG_USEC": "2000000", "WATCHDOG_PID": str(os.getpid()),
        "LISTEN_FDS": "0", "LISTEN_PID": str(os.getpid()), "LISTEN_FDNAMES": "", "HOME": "/root",
        "STATE_DIRECTORY": "/var/lib/x",
    }  # fmt: skip
    told = Manager.take(environ)
    assert environ == {"HOME": "/root"}
    assert told.present
    assert told.watchdog_secs == 2.0
    assert told.state_directory == Path("/var/lib/x")


def test_what_is_meant_for_another_process_is_not_taken() -> None:
    told = Manager.take({"WATCHDOG_USEC": "5", "WATCHDOG_PID": "1", "LISTEN_FDS": "1",
                         "LISTEN_PID": "1"})  # fmt: skip
    assert told.watchdog_secs == 0
    assert told.inherited == ()


def test_inherited_descriptors_come_with_their_names_and_are_not_passed_on(tmp_path) -> None:
    """In a process of its own, for they are the descriptors from 3 on."""
    code = (
        "import os, fcntl\n"
        "from ksmd.daemon.notify import Manager\n"
        "os.environ['LISTEN_PID'] = str(os.getpid())\n"
        "for one in Manager.take(os.environ).inherited:\n"
        "    print(one.name, one.fd, fcntl.fcntl(one.fd, fcntl.F_GETFD))\n"
    )
    script = f'exec 3</dev/null 4</dev/null; exec {sys.executable} -c "$1"'
    environ = os.environ | {"LISTEN_FDS": "3", "LISTEN_FDNAMES": "control:guard"}
    done = subprocess.run(
        ["bash", "-c", script, "bash", code],
        env=environ,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == ["control 3 1", "guard 4 1"]  # and 5 is not open
    assert "descriptor 5, which is not open" in done.stderr


# -- the control socket -------------------------------------------------------------------------


def test_the_socket_named_control_is_taken(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(tmp_path / "s"))
        made.listen()
        given = (Inherited("guard-1", 0), Inherited("control", os.dup(made.fileno())))
        taken = listening.inherited(given)
        assert taken is not None
        with taken:
            assert taken.getsockname() == str(tmp_path / "s")
            assert not taken.getblocking()
    assert listening.inherited((Inherited("guard-1", 0),)) is None
    two = (Inherited("control", 0), Inherited("control", 1))
    with pytest.raises(UsageError, match="2 sockets"):
        listening.inherited(two)


@pytest.mark.parametrize("what", ["a pipe", "a datagram socket", "no listener", "an INET socket"])
def test_what_is_no_listening_unix_stream_is_refused(what: str) -> None:
    if what == "a pipe":
        other, fd = os.pipe()
        os.close(other)
    else:
        family = socket.AF_INET if what == "an INET socket" else socket.AF_UNIX
        kind = socket.SOCK_DGRAM if what == "a datagram socket" else socket.SOCK_STREAM
        made = socket.socket(family, kind)
        if family == socket.AF_INET:
            made.listen()
        fd = made.detach()
    try:
        with pytest.raises(UsageError, match=f"inherited descriptor {fd} is no"):
            listening.inherit(fd)
    finally:
        if what == "a pipe":
            os.close(fd)


# -- the journal ----------------------------------------------------------------------------------


def record(level: int, message: str, **values: journal.Value) -> logging.LogRecord:
    made = logging.LogRecord("ksmd.x", level, "/x.py", 7, message, (), None, "f")
    vars(made).update(journal.fields(**values))
    return made


def parsed(data: bytes) -> dict[str, str]:
    """A datagram of the native protocol, as journald reads it."""
    found = {}
    while data:
        line, _, rest = data.partition(b"\n")
        name, equal, value = line.partition(b"=")
        if not equal:
            (size,) = struct.unpack("<Q", rest[:8])
            value, rest = rest[8 : 8 + size], rest[9 + size :]
        found[name.decode()] = value.decode()
        data = rest
    return found


def test_a_record_reaches_the_journal_with_priority_and_fields(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind(str(tmp_path / "journal"))
        end.settimeout(5)
        handler = journal.JournalHandler(str(tmp_path / "journal"))
        handler.emit(record(logging.WARNING, "two\nlines=1", target_pid=42, domain="d\nPRIORITY=0"))
        found = parsed(end.recv(1 << 16))
    assert found["MESSAGE"] == "two\nlines=1"
    assert found["PRIORITY"] == "4"
    assert found["KSMD_TARGET_PID"] == "42"
    assert found["KSMD_DOMAIN"] == "d\nPRIORITY=0"  # what others named cannot forge a field
    assert found["SYSLOG_IDENTIFIER"] == "ksmd-main"


def test_a_journal_that_is_gone_gets_lines_with_priorities(tmp_path: Path) -> None:
    stream = io.StringIO()
    handler = journal.JournalHandler(str(tmp_path / "none"), stream)
    handler.emit(record(logging.ERROR, "one\ntwo"))
    assert stream.getvalue() == "<3>one\n<3>two\n"


@pytest.mark.parametrize(
    ("level", "number"),
    [(logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6),
     (logging.DEBUG, 7)],
)  # fmt: skip
def test_priorities_are_those_of_syslog(level: int, number: int) -> None:
    assert journal.priority(level) == number


def test_the_journal_is_known_by_the_stream_that_the_manager_named(tmp_path: Path) -> None:
    with (tmp_path / "stderr").open("w") as stream:
        found = os.fstat(stream.fileno())
        named = {"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"}
        assert journal.leads_to_journal(stream, named)
        assert not journal.leads_to_journal(stream, {"JOURNAL_STREAM": f"{found.st_dev}:1"})
        assert not journal.leads_to_journal(stream, {})
    assert not journal.leads_to_journal(io.StringIO(), named)
