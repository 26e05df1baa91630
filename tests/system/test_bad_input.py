"""What is wrong is said in a sentence, with the exit code that the contract names; nothing is hurt.

Exit codes: 0 well, 1 failed, 2 usage or bad settings, 3 for want of privilege, 4 kernel.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from harness import (
    KSMCTL,
    KSMD,
    Daemon,
    Oracle,
    ksmctl,
    ksmd_run,
    run,
    settings_for,
    state,
    target,
)

# the child of a fork has no way to import what it needs as another user
import ksmd.cli.features
import ksmd.daemon.main
import ksmd.settings.describe
from ksmd.cli import ksmctl as ksmctl_command
from ksmd.cli import ksmd as ksmd_command

pytestmark = pytest.mark.root

BAD_SETTINGS = {
    "unknown key": (
        "version: 1\nscan:\n  pages_to_scann: 5\n",
        [":3:3: scan.pages_to_scann: ", "pages_to_scan"],
    ),
    "wrong type": ("version: 1\nscan:\n  sleep_millisecs: soon\n", [":3:20: scan.sleep_millisecs"]),
    "out of range": ("version: 1\nwindow: {deadline_ms: 0}\n", [":2:23: window.deadline_ms"]),
    "repeated key": ("version: 1\nrun: stop\nrun: merge\n", [":3:1:"]),
    "not YAML": ("version: 1\nscan: [\n", [":3:1:"]),
    "no version": ("run: stop\n", ["version"]),
    "unaligned range": (
        "version: 1\n"
        "targets:\n"
        "  - {name: a, match: {pid: 7}, regions: [{start: 0x7f0000000100, npages: 4}]}\n",
        [":3:50: targets[0].regions[0].start"],
    ),
    "overlapping ranges": (
        "version: 1\n"
        "targets:\n"
        "  - name: a\n"
        "    match: {pid: 7}\n"
        "    regions:\n"
        "      - {start: 0x7f0000000000, npages: 4}\n"
        "      - {start: 0x7f0000003000, npages: 4}\n",
        [":7:", "targets[0].regions[1]", "overlap"],
    ),
    "empty match": ("version: 1\ntargets:\n  - {name: a, match: {}}\n", [":3:", "match"]),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_wrong_settings_are_refused_with_their_place_before_anything_starts(case, tmp_path):
    text, said = BAD_SETTINGS[case]
    file, path = tmp_path / "ksmd.yaml", tmp_path / "socket"
    file.write_text(text)
    done = ksmd_run("--config", file, "--socket", path)
    print(done.stderr)
    assert done.returncode == 2
    assert all(words in done.stderr for words in [str(file), *said])
    assert "Traceback" not in done.stderr
    assert not path.exists()
    checked = ksmctl("check-config", file)
    assert checked.returncode == 2
    assert all(words in checked.stdout + checked.stderr for words in said)


def test_a_missing_settings_file_is_named(tmp_path):
    for done in (
        ksmd_run("--config", tmp_path / "none.yaml", "--socket", tmp_path / "socket"),
        ksmctl("check-config", tmp_path / "none.yaml"),
        ksmctl("estimate", "--config", tmp_path / "none.yaml"),
    ):
        assert done.returncode == 2
        assert "none.yaml: does not exist" in done.stdout + done.stderr


@pytest.mark.parametrize(
    "command",
    [
        [KSMD],
        [KSMD, "fly"],
        [KSMD, "run", "--fast"],
        [KSMCTL],
        [KSMCTL, "scan", "--now"],
        [KSMCTL, "unmerge", "--pid", "me"],
        [KSMCTL, "estimate"],
        [KSMCTL, "why"],
    ],
    ids=lambda command: " ".join(map(str, [Path(command[0]).name, *command[1:]])),
)
def test_a_wrong_command_line_is_a_usage_error(command):
    done = run(*command)
    assert done.returncode == 2
    assert "usage:" in done.stderr


def test_without_a_daemon_every_verb_that_needs_one_says_so(tmp_path):
    for verb in (["status"], ["scan"], ["unmerge"], ["pause"], ["resume"], ["targets"], ["why", 1]):
        done = ksmctl("--socket", tmp_path / "none", *verb)
        assert done.returncode == 1
        assert f"ksmd is not running: nobody answers at {tmp_path / 'none'}" in done.stderr


def test_a_process_that_is_no_target_is_an_error_of_the_call_only(victims, daemons):
    pair = [victims(pages=64) for _ in range(2)]
    daemon = daemons(settings_for(*pair))
    daemon.scan()
    for verb in (["unmerge", "--wait", "--pid", os.getpid()], ["why", os.getpid()]):
        done = daemon.run_ctl(*verb)
        assert done.returncode == 1
        assert f"process {os.getpid()} is no target of ksmd" in done.stderr
    assert Oracle(*pair).share() == 1


# -- privilege -------------------------------------------------------------------------------------


def as_nobody(work: Callable[[], int]) -> tuple[int, str]:
    """Run *work* in a forked child as uid 65534: its exit code, and what it said on stderr.

    Forked, not executed: another user may have no way to this interpreter. So what is imported on
    the way must be loaded by now: ksmd.settings.describe, by which settings are read where no other
    process can be had for it, and what the version of numpy is found with.
    """
    version("numpy")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.dup2(writer, 2)
            sys.stderr = os.fdopen(2, "w", buffering=1)
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            os._exit(work())
        finally:
            os._exit(99)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


def test_without_root_the_daemon_does_not_start_and_says_what_is_missing(tmp_path):
    tmp_path.chmod(0o777)
    path = str(tmp_path / "socket")
    code, said = as_nobody(lambda: ksmd_command.main(["run", "--socket", path]))
    assert (code, "root" in said) == (3, True), said
    assert not Path(path).exists()


def test_root_without_capabilities_is_refused_for_want_of_privilege(tmp_path):
    done = run("setpriv", "--bounding-set=-all", KSMD, "run", "--socket", tmp_path / "socket")
    print(done.stderr)
    assert done.returncode == 3
    assert "CAP_" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "socket").exists()


def test_other_users_may_not_command_the_daemon(victims, daemons):
    pair = [victims(pages=64) for _ in range(2)]
    daemon = daemons(settings_for(*pair))
    daemon.scan()
    for parent in daemon.socket.parents[:4]:
        parent.chmod(0o755)
    for verb in ("status", "unmerge", "pause"):
        command = ["--socket", str(daemon.socket), verb]
        code, said = as_nobody(lambda command=command: ksmctl_command.main(command))
        assert (code, "root" in said) == (3, True), said
    assert Oracle(*pair).share() == 1


# -- the socket ------------------------------------------------------------------------------------


def test_a_second_daemon_does_not_start_and_leaves_the_first_alone(victims, daemons):
    pair = [victims(pages=256) for _ in range(2)]
    oracle = Oracle(*pair)
    daemon = daemons(settings_for(*pair))
    daemon.scan()
    before = daemon.helpers()
    for _ in range(2):
        done = ksmd_run("--config", daemon.config, "--socket", daemon.socket)
        print(done.stderr)
        assert done.returncode == 1
        assert str(daemon.socket) in done.stderr
        assert "Traceback" not in done.stderr
    assert daemon.helpers() == before
    assert daemon.status()["pages_sharing"] == 256
    assert oracle.share() == 1
    assert daemon.stop() == 0
    assert all(victim.check() for victim in pair)


def test_a_socket_of_another_program_is_left_alone(tmp_path):
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        done = ksmd_run("--socket", path)
        assert done.returncode == 1
        assert str(path) in done.stderr
        with socket.socket(socket.AF_UNIX) as caller:
            caller.connect(str(path))


def test_a_file_in_the_place_of_the_socket_is_left_alone(tmp_path):
    path = tmp_path / "socket"
    path.write_text("mine")
    done = ksmd_run("--socket", path)
    assert done.returncode == 2  # a wrong --socket
    assert str(path) in done.stderr
    assert path.read_text() == "mine"


def test_a_socket_that_a_killed_daemon_left_is_taken_over(daemons, tmp_path):
    first = daemons({"version": 1})
    first.process.kill()
    first.process.wait()
    assert first.socket.exists()
    second = Daemon(first.socket.parent, {"version": 1})
    try:
        assert second.status()["run"] == "merge"
        assert second.stop() == 0
    finally:
        second.close()


# -- what lies about -------------------------------------------------------------------------------


def test_nothing_is_imported_from_the_directory_it_is_started_in(victims, daemons, tmp_path):
    hostile = tmp_path / "hostile"
    for name in ("ksmd", "json", "socket", "ctypes", "struct", "subprocess", "logging"):
        (hostile / name).mkdir(parents=True)
        (hostile / name / "__init__.py").write_text("raise SystemExit('imported from here')\n")
    pair = [victims(pages=64) for _ in range(2)]
    daemon = daemons(settings_for(*pair), cwd=hostile)
    daemon.scan()
    assert Oracle(*pair).share() == 1
    daemon.kill_helper("ksmd-tracer")
    assert daemon.give_back()["pages"] == 128
    assert "imported from here" not in daemon.log()


def test_rubbish_on_the_socket_ends_that_connection_only(victims, daemons):
    pair = [victims(pages=64) for _ in range(2)]
    daemon = daemons(settings_for(*pair))
    for rubbish in (
        b"\0" * 100,
        b"GET / HTTP/1.1\r\n\r\n\0",
        b"[]\0",
        b'{"method": 5}\0',
        json.dumps({"method": "org.ksmd.Control.Unmerge", "parameters": {"pid": "all"}}).encode()
        + b"\0",
        b"\xff" * 70000,
    ):
        with socket.socket(socket.AF_UNIX) as caller:
            caller.settimeout(60)
            caller.connect(str(daemon.socket))
            caller.sendall(rubbish)
            caller.shutdown(socket.SHUT_WR)
            while caller.recv(65536):
                pass
    daemon.scan()
    assert Oracle(*pair).share() == 1


def test_a_pid_in_the_settings_that_is_dead_is_no_error(victims, daemons, tmp_path):
    dead = subprocess.Popen(["/bin/true"])
    dead.wait()
    one = victims(pages=64)
    odd = {"name": "odd", "match": {"pid": dead.pid}, "domain": "d"}
    daemon = daemons({"version": 1, "targets": [target(one), odd]})
    daemon.scan()
    assert daemon.status()["refusals"] == {"gone": 1}
    assert state(one.pid) == "S"
    assert ksmctl("estimate", "--pid", dead.pid).returncode == 1


assert ksmd.cli.features  # imported for as_nobody
assert ksmd.daemon.main
