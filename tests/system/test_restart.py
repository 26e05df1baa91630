"""A daemon that starts over what an earlier one left merged, whatever ended that one.

What is shared is counted here from the victims' page tables (frames), never from a daemon's word.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import (
    CROWDED,
    KSMD,
    PATIENCE,
    Arena,
    Daemon,
    Held,
    Oracle,
    check_but_for_eintr,
    descriptors,
    frames,
    layout,
    settings_for,
    store_mappings,
    until,
)

from ksmd.client import Client
from ksmd.guard import door
from ksmd.kernel import channel, libc, pageentries, userfaultfd
from ksmd.kernel.pagemap import PageMap
from ksmd.model.errors import KsmdError

pytestmark = pytest.mark.root

#: The background scan of a new daemon waits here before it merges, so that counts can be exact.
CALM = {"scan": {"sleep_millisecs": 600_000}}
KILLS = int(os.environ.get("KSMD_SOAK_KILLS", "4"))


class Lives:
    """One daemon after the other behind the same socket."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._daemon: Daemon | None = None
        self.logs: list[str] = []
        self._pagers: dict[int, Held] = {}

    def start(self, settings: Any, **options: Any) -> Daemon:
        """Start the next one."""
        self._daemon = Daemon(self._directory, settings, **options)
        self.pager()
        return self._daemon

    @property
    def daemon(self) -> Daemon:
        """The latest one."""
        assert self._daemon is not None
        return self._daemon

    def pager(self) -> Held:
        """Give the pager that guards now."""
        name = str(self._directory / "ksmd.sock")
        # one that held nothing when its daemon was killed may be on its way out
        until(lambda: len(door.pagers(name)) == 1, "one pager")
        (pid,) = door.pagers(name)
        if pid not in self._pagers:
            self._pagers[pid] = Held(pid)
        return self._pagers[pid]

    def kill(self, *, tracer: bool = False) -> None:
        """SIGKILL the daemon; the tracer just before it, if asked for."""
        helpers = self.daemon.helpers()
        held = Held(helpers["ksmd-tracer"]) if tracer and "ksmd-tracer" in helpers else None
        if held is not None:
            held.end()
        self.daemon.process.kill()
        self.buried()

    def start_in_vain(self, seconds: float) -> None:
        """Start one with the latest settings, and SIGKILL it on its way up, or soon after."""
        log = self._directory / "vain.log"
        daemon = self.daemon
        with log.open("wb") as out:
            process = subprocess.Popen(
                [KSMD, "run", "--config", str(daemon.config), "--socket", str(daemon.socket)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        time.sleep(seconds)
        process.kill()
        process.wait()
        self.logs.append(log.read_text())

    def stop(self) -> int:
        """Have the daemon stop as its settings say; its exit code."""
        code = self.daemon.stop()
        self.buried()
        return code

    def buried(self) -> None:
        """Note the end of a daemon that was killed."""
        self.daemon.process.wait(PATIENCE)
        self.logs.append(self.daemon.log())

    def close(self) -> None:
        """End everything."""
        if self._daemon is not None and self._daemon.process.poll() is None:
            self.stop()
        for number, log in enumerate(self.logs):
            print(f"-- life {number} --\n{log}")
        for pid in door.pagers(str(self._directory / "ksmd.sock")):
            self._pagers.setdefault(pid, Held(pid))
        for held in self._pagers.values():
            held.end()


@pytest.fixture
def lives(tmp_path: Path) -> Iterator[Lives]:
    lives = Lives(tmp_path)
    yield lives
    lives.close()


@pytest.fixture
def pair(victims):
    return [victims(pages=1024, offset=offset, layout="runs:long") for offset in (3, 77)]


def check_all(victims) -> None:
    for victim in victims:
        assert victim.check(), victim.report()


def shared(*victims: Arena) -> tuple[int, int]:
    """Count (pages_shared, pages_sharing) by frames: pages of ours that are the store's."""
    seen: list[np.ndarray] = []
    for victim in victims:
        start, npages = victim.region
        with PageMap(victim.pid) as pagemap:
            entries = pagemap.entries(start >> 12, npages)
        seen.append(pageentries.pfn(entries)[pageentries.is_file(entries)])
    every = np.concatenate(seen)
    return len(np.unique(every)), len(every) - len(np.unique(every))


def said(daemon: Daemon) -> tuple[int, int]:
    """Give (pages_shared, pages_sharing) as the daemon tells them."""
    status = daemon.status()
    return status["pages_shared"], status["pages_sharing"]


def store_files(pid: int) -> list[str]:
    """Name the extents that a process holds open."""
    return [link for link in descriptors(pid).values() if link.startswith("/memfd:ksmd-d ")]


def rings(pid: int) -> int:
    """Count the io_uring descriptors of a process."""
    return sum("[io_uring]" in link for link in descriptors(pid).values())


# -- one restart, looked at closely ---------------------------------------------------------------


def test_after_a_kill_the_next_daemon_counts_what_is_shared_at_once(pair, lives):
    settings = settings_for(*pair) | CALM
    daemon = lives.start(settings)
    daemon.scan()
    pair[0].command("write 10 5")  # broken by CoW
    pair[1].ask("dontneed 100 50")
    pair[1].command("restore 100 20")  # pages of its own; 30 stay absent
    before, pager = shared(*pair), lives.pager()
    assert before[1] > 900
    lives.kill()
    assert shared(*pair) == before
    daemon = lives.start(settings)
    assert said(daemon) == shared(*pair) == before
    assert lives.pager() is pager, "the pager did not stay the same"
    assert not daemon.status()["cow_breaks"], "what was written before counts as news"
    print(f"{before} of {2 * pair[0].pages} pages, adopted")
    pair[0].command("restore 10 5")
    pair[1].command("restore 120 30")
    check_all(pair)


def test_after_a_kill_the_next_daemon_merges_on_into_the_same_store(pair, victims, lives):
    lives.start(settings_for(*pair)).scan()
    inodes = {line for victim in pair for line in store_mappings(victim.pid)}
    lives.kill()
    third = victims(pages=1024, offset=200, layout="runs:long")
    three = [*pair, third]
    daemon = lives.start(settings_for(*three))
    oracle = Oracle(*three)
    daemon.scan()
    assert oracle.share() > 0.95
    assert said(daemon) == shared(*three)
    same = np.intersect1d(frames(third), frames(pair[0]))
    assert len(same) > 900, "the newcomer shares nothing with those who were adopted"
    pair[0].command("write 0 64")
    pair[0].command("restore 0 64")
    daemon.scan()
    assert oracle.share() > 0.95, "what was broken and is equal again was not merged again"
    check_all(three)
    print(f"{len(inodes)} extents adopted; the newcomer shares {len(same)} frames")


def test_after_a_kill_the_next_daemon_gives_everything_back(pair, lives):
    settings = settings_for(*pair) | CALM
    tables = [descriptors(victim.pid) for victim in pair]
    lives.start(settings).scan()
    lives.kill()
    daemon = lives.start(settings)
    pager = lives.pager()
    assert store_files(pager.pid)
    daemon.give_back()
    assert [store_mappings(victim.pid) for victim in pair] == [[], []]
    assert said(daemon) == shared(*pair) == (0, 0)
    assert not store_files(pager.pid), "the pager holds extents that nobody maps"
    assert not store_files(daemon.pid)
    assert (rings(daemon.pid), rings(pager.pid)) == (1, 1), "pins of the dead daemon are left"
    check_all(pair)
    assert [descriptors(victim.pid) for victim in pair] == tables
    assert lives.stop() == 0
    assert pager.gone(PATIENCE), "the pager stays although it holds nothing"


def catches(pid: int, number: signal.Signals) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


def test_a_daemon_that_is_told_to_stop_while_it_starts_gives_back_what_it_adopts(pair, lives):
    daemon = lives.start(settings_for(*pair))
    daemon.scan()
    lives.kill()
    command = [KSMD, "run", "--config", daemon.config, "--socket", daemon.socket]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not catches(process.pid, signal.SIGTERM):
            time.sleep(0.005)
        process.terminate()
        _, told = process.communicate(timeout=PATIENCE)
    lives.logs.append(told)
    assert process.returncode == 0
    assert "adopted what an earlier ksmd left: 2 targets" in told
    assert told.index("stopping") < told.index("ready on"), "the signal came too late"
    assert [store_mappings(victim.pid) for victim in pair] == [[], []]
    assert not door.pagers(str(daemon.socket)), "the pager stays although it holds nothing"
    check_all(pair)


def test_what_is_dropped_reads_as_zeros_between_two_daemons_and_ever_after(pair, lives):
    settings = settings_for(*pair)
    lives.start(settings).scan()
    for _ in range(2):
        for victim in pair:
            victim.begin("hammer 6")
        lives.kill()
        daemon = lives.start(settings)
        for victim in pair:
            assert "bad=0 stale=0" in victim.finish()
            assert victim.ask("dontneed 30 60") == {"bad": 0}
            victim.command("restore 30 60")
            assert victim.ask("fork") == {"child": 0, "bad": 0}
        daemon.scan()
        check_all(pair)


def test_children_that_fork_made_stay_guarded_over_two_restarts(actors, lives):
    two = [actors(512) for _ in range(2)]
    settings = settings_for(*two)
    whole = two[0].ask("sum")
    lives.start(settings).scan()
    child = two[0].ask("fork")["pid"]
    lives.kill()
    late = two[1].ask("fork")["pid"]  # while nobody owns the pager
    lives.start(settings)
    lives.kill()
    daemon = lives.start(settings)
    for actor, pid in zip(two, (child, late), strict=True):
        assert actor.ask("child sum") == actor.ask("sum") == whole
        assert actor.ask("child dontneed 100 100") == {"errno": 0, "bad": 0}
        assert store_mappings(pid)
    daemon.give_back()
    assert [actor.ask("sum") for actor in two] == [whole] * 2


def test_with_on_stop_keep_a_daemon_is_replaced_without_unmerging(pair, lives):
    settings = settings_for(*pair, on_stop="keep") | CALM
    lives.start(settings).scan()
    before = [frames(victim) for victim in pair]
    pager = lives.pager()
    assert lives.stop() == 0
    assert not pager.gone()
    daemon = lives.start(settings)
    assert all(np.array_equal(frames(v), b) for v, b in zip(pair, before, strict=True))
    assert said(daemon) == shared(*pair)
    daemon.give_back()
    check_all(pair)


def test_a_target_that_no_rule_selects_any_more_is_unmerged_first(pair, victims, lives):
    third = victims(pages=1024, offset=200, layout="runs:long")
    lives.start(settings_for(*pair, third)).scan()
    lives.kill()
    daemon = lives.start(settings_for(*pair), paused=False)
    until(lambda: not store_mappings(third.pid), "the third has its pages back")
    daemon.scan()
    assert {line["pid"] for line in daemon.status()["targets"]} == {v.pid for v in pair}
    assert shared(third) == (0, 0)
    assert shared(*pair)[1] > 900
    check_all([*pair, third])


def test_a_target_of_another_domain_now_leaves_the_old_one_first(pair, lives):
    settings = settings_for(*pair)
    lives.start(settings).scan()
    lives.kill()
    settings["targets"][0]["domain"] = "other"
    daemon = lives.start(settings, paused=False)
    until(lambda: not store_mappings(pair[0].pid), "the first has its pages back")
    daemon.scan()
    assert not np.intersect1d(frames(pair[0]), frames(pair[1])).any()
    assert {line["domain"] for line in daemon.status()["targets"]} == {"d", "other"}
    check_all(pair)


def test_with_run_unmerge_the_next_daemon_gives_all_back_by_itself(pair, lives):
    lives.start(settings_for(*pair)).scan()
    lives.kill()
    lives.start(settings_for(*pair, run="unmerge"))
    until(lambda: not any(store_mappings(victim.pid) for victim in pair), "all is given back")
    check_all(pair)


def test_targets_that_ended_or_called_exec_meanwhile_are_let_go(actors, lives):
    three = [actors(512) for _ in range(3)]
    lives.start(settings_for(*three)).scan()
    lives.kill()
    three[0].stop()
    three[1].exec()
    daemon = lives.start(settings_for(*three[1:]))
    merged = {line["pid"]: line["merging_pages"] for line in daemon.status()["targets"]}
    assert not merged.get(three[1].pid)
    assert merged[three[2].pid] > 400
    assert three[0].pid not in merged
    daemon.scan()
    oracle = Oracle(*three[1:])
    assert oracle.share() > 0.95
    daemon.give_back()
    assert store_files(lives.pager().pid) == []


def test_the_pager_leaves_with_the_last_target_and_is_not_looked_for_in_vain(pair, lives):
    settings = settings_for(*pair)
    lives.start(settings).scan()
    pager = lives.pager()
    lives.kill()
    for victim in pair:
        victim.stop()
    assert pager.gone(PATIENCE)
    daemon = lives.start(None)
    assert said(daemon) == (0, 0)


def test_a_daemon_that_only_rests_is_not_robbed_of_its_pager(pair, lives):
    settings = settings_for(*pair)
    daemon = lives.start(settings)
    daemon.scan()
    held = Held(daemon.pid)
    held.send(signal.SIGSTOP)
    try:
        daemon.socket.unlink()  # as when a service manager removes the directory
        (pid,) = door.pagers(str(daemon.socket))
        end = door.knock(pid)
        assert end is not None
        with end:
            channel.send(end, {"do": "claim"})
            end.settimeout(PATIENCE)
            answer, _, _ = channel.receive(end)
        assert not answer["ok"]
        assert "another daemon owns" in answer["error"]
    finally:
        held.send(signal.SIGCONT)
    check_all(pair)


# -- a store that does not hold what was put into it ----------------------------------------------

SCRIBBLER = """
import ctypes, pathlib, sys, threading, time
sys.argv = ["ksmd", *sys.argv[1:]]
order = pathlib.Path({order!r})
def scribble():
    while not order.exists():
        time.sleep(0.02)
    lines = [line for line in open("/proc/self/maps") if "/memfd:ksmd-d " in line]
    spans = [[int(word, 16) for word in line.split()[0].split("-")] for line in lines]
    start, end = max(spans, key=lambda span: span[1] - span[0])
    assert not ctypes.CDLL(None).mprotect(ctypes.c_void_p(start), end - start, 3)
    ctypes.memset(end - 4096, 0x55, 8)
    order.with_suffix(".done").touch()
threading.Thread(target=scribble, daemon=True).start()
from ksmd.cli.ksmd import main
main()
"""


def test_an_extent_that_was_changed_is_never_merged_from_again(pair, tmp_path, lives, monkeypatch):
    order = tmp_path / "order"
    program = tmp_path / "scribbler"
    program.write_text(f"#!{sys.executable}\n" + SCRIBBLER.format(order=str(order)).lstrip())
    program.chmod(0o755)
    settings = settings_for(*pair)
    with monkeypatch.context() as patch:
        patch.setattr("harness.KSMD", str(program))
        lives.start(settings).scan()
    order.touch()
    until(order.with_suffix(".done").exists, "the faulty daemon has written to its store")
    assert pair[0].ask("sum")["bad"], "the fault did not reach the store"
    lives.kill()
    daemon = lives.start(settings)
    daemon.await_log("does not hold what was put into it")
    until(lambda: not any(store_mappings(v.pid) for v in pair), "nobody maps it any more")
    for victim in pair:
        victim.command(f"restore 0 {victim.pages}")
    check_all(pair)
    daemon.scan()
    assert shared(*pair)[1] > 900
    check_all(pair)


# -- two deaths: nobody guards --------------------------------------------------------------------


@pytest.mark.parametrize("first", ["daemon", "pager"])
def test_when_pager_and_daemon_both_die_the_next_daemon_says_so_and_gives_the_pages_back(
    pair, victims, lives, first
):
    lone = victims("compute", pages=256)
    settings = settings_for(*pair)
    lives.start(settings_for(*pair, lone)).scan()
    pager = lives.pager()
    for victim in pair:
        assert victim.ask("dontneed 10 20") == {"bad": 0}  # stays untouched over both deaths
    if first == "daemon":
        lives.kill()
        pager.send(signal.SIGKILL)
    else:
        Held(lives.daemon.pid).send(signal.SIGSTOP)  # it would start another
        pager.send(signal.SIGKILL)
        assert pager.gone(PATIENCE)
        lives.kill()
    assert pager.gone(PATIENCE)
    assert any(store_mappings(victim.pid) for victim in pair)
    daemon = lives.start(settings)
    for victim in pair:
        daemon.await_log(f"pid {victim.pid} maps ")
        daemon.await_log(f"pid {victim.pid} has its pages back")
    until(lambda: not any(store_mappings(v.pid) for v in (*pair, lone)), "all is given back")
    assert "that nobody guards" in daemon.log()
    for victim in pair:
        state = [victim.ask(f"read {page}")["zero"] for page in range(10, 30)]
        assert state == [1] * 20, "what was dropped under guard came back"
        victim.command("restore 10 20")
    check_all([*pair, lone])
    daemon.scan()
    assert shared(*pair)[1] > 900, "they are merged again, under guard"
    assert not daemon.status()["refusals"].get("unguarded")
    for victim in pair:
        assert victim.ask("hammer 0.5")["bad"] == 0
    check_all([*pair, lone])


def test_the_guarded_targets_of_another_daemon_are_not_touched(pair, daemons, lives):
    other = daemons(settings_for(*pair))
    other.scan()
    before = [frames(victim) for victim in pair]
    daemon = lives.start(None)
    daemon.scan()
    assert "nobody guards" not in daemon.log()
    assert all(np.array_equal(frames(v), b) for v, b in zip(pair, before, strict=True))


def test_a_child_whom_the_dying_pager_told_nobody_of_is_found_and_unmerged(actors, lives):
    two = [actors(512) for _ in range(2)]
    settings = settings_for(*two)
    daemon = lives.start(settings)
    daemon.scan()
    whole = two[0].ask("sum")
    pager = lives.pager()
    pager.send(signal.SIGSTOP)
    over = threading.Event()
    thief = threading.Thread(target=_take_one_fork, args=(daemon.pid, over))
    thief.start()
    child = two[0].ask("fork")["pid"]  # waits until somebody has read the event
    thief.join()
    assert over.is_set()
    assert store_mappings(child)
    pager.send(signal.SIGKILL)
    daemon.await_log(f"pid {child} maps ")
    until(lambda: not store_mappings(child), "the child has pages of its own")
    assert two[0].ask("child sum") == whole
    assert two[0].ask("child dontneed 0 100") == {"errno": 0, "bad": 0}
    assert two[0].ask("sum") == whole
    assert store_mappings(two[0].pid), "its parent is guarded, and stays merged"


def _take_one_fork(daemon: int, over: threading.Event) -> None:
    """Read one FORK in the pager's place, and let go of the child, as a pager that dies does."""
    pidfd = os.pidfd_open(daemon)
    contexts = [
        libc.pidfd_getfd(pidfd, int(fd))
        for fd, link in descriptors(daemon).items()
        if "[userfaultfd]" in link
    ]
    deadline = time.monotonic() + PATIENCE
    while not over.is_set() and time.monotonic() < deadline:
        for context in contexts:
            for message in userfaultfd.read_messages(context):
                if message.event == userfaultfd.EVENT_FORK:
                    os.close(message.fd)
                    over.set()
    for fd in (*contexts, pidfd):
        os.close(fd)


# -- kills without end ----------------------------------------------------------------------------


def _work(socket: Path, over: threading.Event) -> None:
    """Have a daemon merge and unmerge back to back, until it is gone."""
    while not over.is_set():
        with contextlib.suppress(KsmdError), Client(socket, PATIENCE) as ksmd:
            for method in ("Resume", "Pause", "Scan", "Unmerge"):
                ksmd.call(method, **({"wait": True} if method in ("Scan", "Unmerge") else {}))


def test_killed_at_random_moments_daemons_adopt_all_and_no_target_notices(victims, lives):
    four = [victims(pages=1024, layout="mixed") for _ in range(2)]
    four += [victims("all", pages=256), victims("write", pages=256)]
    tables = [descriptors(victim.pid) for victim in four]
    spaces = [layout(victim.pid) for victim in four]
    settings = settings_for(*four) | CROWDED | CALM
    chance = random.Random(int(os.environ.get("KSMD_SOAK_SEED", "1")))
    adopted: list[int] = []
    eintr: dict[int, int] = {}
    lives.start(settings)
    kill = 0
    # a few kills may all meet the same moment, by chance
    while kill < KILLS or (len(set(adopted)) < 2 and kill < 5 * KILLS):
        over = threading.Event()
        worker = threading.Thread(target=_work, args=(lives.daemon.socket, over))
        worker.start()
        over.wait(chance.uniform(0.0, 1.5))
        with_tracer = chance.random() < 0.3
        lives.kill(tracer=with_tracer)
        print(f"kill {kill}{' after its tracer' if with_tracer else ''}")
        over.set()
        worker.join()
        check_but_for_eintr(four, eintr, may_grow=with_tracer)
        for victim in four[:2]:
            page = chance.randrange(900)
            assert victim.ask(f"dontneed {page} 40") == {"bad": 0}
            victim.command(f"restore {page} 40")
            assert victim.ask("fork") == {"child": 0, "bad": 0}
        if chance.random() < 0.3:
            lives.start_in_vain(chance.uniform(0.5, 4.0))
        lives.start(settings)
        idle = four[:2]  # the others write at any moment
        counted = sum(shared(*idle))
        lines = {line["pid"]: line for line in lives.daemon.status()["targets"]}
        told = sum(lines[v.pid]["merging_pages"] for v in idle if v.pid in lines)
        assert told == counted, f"kill {kill}"
        adopted.append(counted)
        check_but_for_eintr(four, eintr, may_grow=False)
        kill += 1
    half = sum("windows were under way" in log for log in lives.logs)
    print(
        f"{kill} kills, {half} of them met within a window; merged pages found again: {adopted};"
        f" EINTR: {sum(eintr.values())}"
    )
    assert len(set(adopted)) > 1, "every kill met the same state"
    daemon = lives.daemon
    daemon.allow_again()
    daemon.scan()
    check_but_for_eintr(four, eintr, may_grow=False)
    pager = lives.pager()
    until(lambda: not daemon.run_ctl("unmerge", "--wait").returncode, "all is given back")
    assert [store_mappings(victim.pid) for victim in four] == [[]] * 4
    assert [descriptors(victim.pid) for victim in four] == tables
    assert [layout(victim.pid) for victim in four] == spaces
    # a child that fork made may use the store for a moment yet
    until(lambda: not store_files(pager.pid), "the store is given back")
    check_but_for_eintr(four, eintr, may_grow=False)
    assert lives.stop() == 0
    assert pager.gone(PATIENCE)


# -- a pager that stands by itself ----------------------------------------------------------------


@pytest.fixture
def standing(tmp_path: Path, lives: Lives) -> Iterator[subprocess.Popen[bytes]]:
    """``ksmd pager`` for the daemons of *lives*, as a service manager runs it."""
    name = str(tmp_path / "ksmd.sock")
    process = subprocess.Popen([KSMD, "pager", "--socket", name])
    until(lambda: door.standing(name) == [process.pid], "the pager")
    yield process
    process.kill()
    process.wait()


def give_back(lives: Lives) -> int:
    """Run what a service manager runs before it stops the pager; the exit code."""
    command = [KSMD, "pager", "--give-back", "--socket", lives.daemon.socket]
    return subprocess.run(command, timeout=PATIENCE, check=False).returncode


def test_a_pager_that_stands_by_itself_serves_every_daemon_and_on_stop_means_what_it_says(
    pair, standing, lives
):
    settings = settings_for(*pair)
    lives.start(settings).scan()
    assert lives.pager().pid == standing.pid
    assert shared(*pair)[1] > 900
    lives.kill()
    for victim in pair:
        assert victim.ask("dontneed 10 20") == {"bad": 0}
    daemon = lives.start(settings)
    assert said(daemon) == shared(*pair)
    assert lives.stop() == 0
    assert not any(store_mappings(victim.pid) for victim in pair)
    assert standing.poll() is None
    for victim in pair:
        victim.command("restore 10 20")
    check_all(pair)
    standing.terminate()
    assert standing.wait(PATIENCE) == 0


def test_what_a_daemon_left_is_given_back_without_another_daemon(pair, standing, lives):
    lives.start(settings_for(*pair, on_stop="keep")).scan()
    assert lives.stop() == 0
    assert shared(*pair)[1] > 900
    assert give_back(lives) == 0
    assert not any(store_mappings(victim.pid) for victim in pair)
    assert store_files(standing.pid) == []
    check_all(pair)


def test_what_cannot_be_given_back_keeps_its_pager_whoever_tells_it_to_leave(pair, standing, lives):
    lives.start(settings_for(*pair, on_stop="keep")).scan()
    assert lives.stop() == 0
    standing.terminate()
    with pytest.raises(subprocess.TimeoutExpired):
        standing.wait(1)
    for victim in pair:
        assert victim.ask("dontneed 10 20") == {"bad": 0}
        assert [victim.ask(f"read {page}")["zero"] for page in range(10, 30)] == [1] * 20
        victim.command("restore 10 20")
    assert give_back(lives) == 0
    assert standing.wait(PATIENCE) == 0
    check_all(pair)


def test_a_daemon_that_lives_gives_back_when_its_pager_is_to_stop(pair, standing, lives):
    daemon = lives.start(settings_for(*pair))
    daemon.scan()
    assert shared(*pair)[1] > 900
    assert give_back(lives) == 0
    assert not any(store_mappings(victim.pid) for victim in pair)
    assert daemon.status()["paused"]
    standing.terminate()
    assert standing.wait(PATIENCE) == 0
    check_all(pair)
    until(lambda: door.pagers(str(daemon.socket)), "a pager of its own")
    with Client(daemon.socket) as client:
        client.call("Resume")
    daemon.scan()
    assert shared(*pair)[1] > 900
    check_all(pair)
