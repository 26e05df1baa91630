"""Targets come and go, run other programs, are stopped, debugged, or lose their first thread."""

from __future__ import annotations

import getpass
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from harness import (
    Oracle,
    descriptors,
    settings_for,
    state,
    store_mappings,
    target,
    tracer_of,
    until,
)
from victims import binary

from ksmd.client import Client

pytestmark = pytest.mark.root

ENOUGH = 0.95


def check_all(victims) -> None:
    for victim in victims:
        assert victim.check(), victim.report()


def anon(*victims) -> dict:
    return {"version": 1, "targets": [target(victim, regions="anon") for victim in victims]}


def test_processes_that_cannot_be_targets_are_refused_by_name(victims, daemons):
    pair = [victims(pages=128) for _ in range(2)]
    dead = subprocess.Popen(["/bin/true"])
    dead.wait()
    daemon = daemons(settings_for(*pair))
    daemon.kill_helper("ksmd-tracer")
    daemon.scan()  # starts another
    helpers = daemon.helpers()
    pager = helpers["ksmd-pager"]
    (shadow,) = Path(f"/proc/{pager}/task/{pager}/children").read_text().split()
    ours = [daemon.pid, *helpers.values(), int(shadow)]
    time.sleep(1.5)  # it looks for its own processes once a second
    extra = {"name": "odd", "match": {"pid": [dead.pid, 2, *ours]}, "domain": "d"}
    daemon.configure({"version": 1, "targets": [*map(target, pair), extra]})
    daemon.send(signal.SIGHUP)
    daemon.await_log("settings read again")
    daemon.scan()
    refused = daemon.status()["refusals"]
    print(refused)
    assert refused["gone"] == 1
    assert refused["kernel-thread"] == 1
    assert refused["ourselves"] == len(ours) == 4
    assert {line["pid"] for line in daemon.status()["targets"]} == {v.pid for v in pair}
    assert Oracle(*pair).share() == 1
    check_all(pair)


def test_a_zombie_is_refused_by_name(victims, daemons):
    pair = [victims(pages=64) for _ in range(2)]
    zombie = subprocess.Popen(["/bin/true"])
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
    odd = {"name": "odd", "match": {"pid": zombie.pid}, "domain": "d"}
    daemon = daemons({"version": 1, "targets": [*map(target, pair), odd]})
    daemon.scan()
    assert daemon.status()["refusals"]["zombie"] == 1
    assert Oracle(*pair).share() == 1
    zombie.wait()


def test_every_key_of_match_must_hold_and_newcomers_are_found(victims, daemons):
    user = getpass.getuser()
    match = {"exe": str(binary()), "comm": "ksmd-victim", "cmdline": "--seed 5( |$)", "user": user}
    settings = {"version": 1, "targets": [{"name": "some", "match": match, "domain": "d"}]}
    mine = [victims(pages=256, seed=5)]
    others = [victims(pages=256, seed=5, uid=65534), victims(pages=256, seed=6)]
    daemon = daemons(settings)
    daemon.scan()
    assert [line["pid"] for line in daemon.status()["targets"]] == [mine[0].pid]
    mine.append(victims(pages=256, seed=5))
    oracle = Oracle(*mine)
    daemon.scan()
    assert {line["pid"] for line in daemon.status()["targets"]} == {v.pid for v in mine}
    assert oracle.share() >= ENOUGH
    assert [store_mappings(other.pid) for other in others] == [[], []]
    check_all([*mine, *others])


def test_execve_ends_what_was_merged_and_the_new_program_merges_anew(actors, daemons):
    pair = [actors(512) for _ in range(2)]
    before = pair[0].ask("sum")
    daemon = daemons(anon(*pair))
    daemon.scan()
    assert Oracle(*pair).share() >= ENOUGH
    for _ in range(3):
        pair[0].exec()
        assert store_mappings(pair[0].pid) == []
        assert pair[0].ask("sum") == before
        oracle = Oracle(*pair)
        daemon.scan()
        assert oracle.share() >= ENOUGH, daemon.status()
        assert daemon.status_of(pair[0])["merging_pages"] >= 512
        assert [actor.ask("sum") for actor in pair] == [before, before]
    assert pair[0].ask("dontneed 5 10") == {"errno": 0, "bad": 0}
    assert daemon.stop() == 0
    assert pair[1].ask("sum") == before


def test_execve_in_the_middle_of_scans_harms_nobody(actors, daemons):
    three = [actors(256) for _ in range(3)]
    before = three[0].ask("sum")
    daemon = daemons(anon(*three))
    over = threading.Event()

    def keep_scanning() -> None:
        with Client(daemon.socket, 60) as ksmd:
            while not over.is_set():
                ksmd.call("Scan", wait=True)

    scanner = threading.Thread(target=keep_scanning)
    scanner.start()
    try:
        for _ in range(60):
            three[0].exec()
            assert three[0].ask("sum") == before
    finally:
        over.set()
        scanner.join()
    daemon.scan()
    assert Oracle(*three).share() >= ENOUGH
    assert [actor.ask("sum") for actor in three] == [before] * 3


def strace(pid: int) -> subprocess.Popen:
    return subprocess.Popen(
        ["strace", "-f", "-o", "/dev/null", "-p", str(pid)],
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )


def gdb(pid: int) -> subprocess.Popen:
    return subprocess.Popen(
        ["gdb", "-q", "-nx", "-p", str(pid)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


@pytest.mark.parametrize("attach", [strace, gdb])
def test_a_process_under_a_debugger_is_refused_and_merged_after_it_let_go(victims, daemons, attach):
    pair = [victims(pages=128) for _ in range(2)]
    oracle = Oracle(*pair)
    debugger = attach(pair[0].pid)
    try:
        until(lambda: tracer_of(pair[0].pid) == debugger.pid, "the debugger is attached")
        daemon = daemons(settings_for(*pair))
        daemon.scan()
        assert daemon.status_of(pair[0])["refused"] == "traced"
        assert daemon.status()["refusals"]["traced"] == 1
        assert store_mappings(pair[0].pid) == []
        assert tracer_of(pair[0].pid) == debugger.pid
    finally:
        if attach is gdb:
            debugger.communicate(b"detach\nquit\n", timeout=60)
        debugger.terminate()
        debugger.communicate()
    until(lambda: tracer_of(pair[0].pid) == 0, "the debugger is gone")
    daemon.scan()
    assert daemon.status_of(pair[0])["refused"] == ""
    assert oracle.share() == 1
    check_all(pair)


def test_a_process_that_a_debugger_took_after_the_merge_is_given_back_when_it_lets_go(
    victims, daemons
):
    pair = [victims(pages=128) for _ in range(2)]
    daemon = daemons(settings_for(*pair))
    daemon.scan()
    debugger = strace(pair[0].pid)
    try:
        until(lambda: tracer_of(pair[0].pid) == debugger.pid, "the debugger is attached")
        done = daemon.run_ctl("unmerge", "--wait")
        assert done.returncode == 1
        assert "tracer" in done.stderr
        assert store_mappings(pair[0].pid)
        assert pair[0].ask("dontneed 4 4") == {"bad": 0}
    finally:
        debugger.terminate()
        debugger.communicate()
    daemon.give_back()
    assert store_mappings(pair[0].pid) == []
    check_all(pair)


def test_a_process_whose_first_thread_has_ended_is_merged_like_any_other(actors, daemons):
    pair = [actors(256, leaderless=True), actors(256)]
    until(lambda: state(pair[0].pid) == "Z", "the first thread has ended")
    before = pair[0].ask("sum")
    oracle = Oracle(*pair)
    tables = [descriptors(actor.pid) for actor in pair]
    daemon = daemons(settings_for(*pair))
    daemon.scan()
    assert daemon.status_of(pair[0])["refused"] == ""
    assert oracle.share() == 1
    assert pair[0].ask("sum") == before
    assert pair[0].ask("dontneed 3 5") == {"errno": 0, "bad": 0}
    daemon.give_back()
    assert store_mappings(pair[0].pid) == []
    assert [descriptors(actor.pid) for actor in pair] == tables
    assert pair[1].ask("sum") == before
    assert [actor.quit() for actor in pair] == [0, 0]
