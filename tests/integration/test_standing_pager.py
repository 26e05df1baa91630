"""A pager that is a service of its own: daemons come and go, and a crash loses nothing.

The service manager is played by victims.manager: it keeps what it is told to, and passes it on.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from victims.manager import ServiceManager

from ksmd.daemon import adopt
from ksmd.guard import client, door
from ksmd.guard.client import Pager
from ksmd.guard.held import KeptExtent
from ksmd.kernel import memfd, userfaultfd

pytestmark = pytest.mark.root

PAGES = 16
PATIENCE = 10.0


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[ServiceManager]:
    made = ServiceManager(tmp_path)
    yield made
    made.close()


def take(manager: ServiceManager) -> Pager:
    found = adopt.find_pager(manager.name)
    assert found is not None
    return found


def die(pager: Pager) -> None:
    """Let go of the pager as a daemon that is killed does."""
    pager.leave()


def test_it_waits_for_daemons_and_outlives_each_with_nothing_to_guard(
    manager: ServiceManager, extent: memfd.ExtentMap
) -> None:
    pid = manager.start()
    for _ in range(2):
        pager = take(manager)
        assert (pager.standing, pager.pid) == (True, pid)
        assert pager.ids == []
        assert pager.kept == []  # what the one before kept serves nobody
        pager.keep(KeptExtent(extent.inode, os.dup(extent.fd_ro), 0, extent.length))
        assert pager.close()
        assert manager.runs()
    pager = take(manager)
    pager.keep(KeptExtent(extent.inode, os.dup(extent.fd_ro), 0, extent.length))
    die(pager)
    time.sleep(0.3)
    pager = take(manager)
    assert pager.kept == []
    pager.close()


def test_every_daemon_leaves_the_key_of_its_digests_to_the_next(
    manager: ServiceManager, contexts: tuple[int, int]
) -> None:
    manager.start()
    first = take(manager)
    first.guard(5, contexts[0])
    key = first.key
    die(first)
    second = take(manager)
    assert second.key == key
    second.drop(5)
    second.close()


def test_sigterm_ends_it_when_nothing_is_guarded_and_not_before(
    manager: ServiceManager, contexts: tuple[int, int]
) -> None:
    manager.start()
    pager = take(manager)
    pager.guard(5, contexts[0], track=contexts[1])
    die(pager)
    manager.term()
    time.sleep(0.3)
    assert manager.runs()
    heir = take(manager)
    assert heir.ids == [5]
    heir.drop(5)
    until(lambda: not manager.runs())  # although a daemon is there
    heir.close()


def test_no_other_signal_ends_it(manager: ServiceManager) -> None:
    pid = manager.start()
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        os.kill(pid, number)
    take(manager).close()
    assert manager.runs()


def test_an_idle_one_sleeps(manager: ServiceManager) -> None:
    pid = manager.start()

    def switches() -> int:
        status = Path(f"/proc/{pid}/status").read_text()
        return sum(int(line.split()[1]) for line in status.splitlines() if "ctxt_switches" in line)

    time.sleep(0.2)
    before = switches()
    time.sleep(2.5)
    assert switches() - before <= 2


def test_when_both_are_killed_the_next_pager_gets_back_all_that_the_two_held(
    manager: ServiceManager, contexts: tuple[int, int], extent: memfd.ExtentMap
) -> None:
    manager.start()
    pager = take(manager)
    pager.guard(5, contexts[0], track=contexts[1], about={"pid": 77})
    pager.extend({5: [(0x1000, 0x5000), (0x9000, 0xA000)]})
    pager.settle({5: [(0x1000, 0x3000)]})
    pager.keep(KeptExtent(extent.inode, os.dup(extent.fd_ro), 0, extent.length, {"number": 3}))
    key = pager.key
    until(lambda: {"guard-5", "track-5", f"extent-{extent.inode}"} < set(manager.kept))
    manager.kill()
    die(pager)

    manager.start()
    heir = take(manager)
    assert heir.ids == [5]
    assert heir.about(5) == {"pid": 77}
    assert heir.unsettled == [5]
    assert list(heir._holds.targets[5].owed) == [(0x3000, 0x5000), (0x9000, 0xA000)]
    assert heir.highest == 5
    assert heir.key == key
    (kept,) = heir.kept
    assert (kept.inode, kept.offset, kept.length) == (extent.inode, 0, extent.length)
    assert kept.about == {"number": 3}
    for fd in heir.contexts(5):
        assert not userfaultfd.is_dead(fd)
        os.close(fd)
    mapping = Path(f"/proc/{heir.pid}/smaps").read_text().partition("ksmd-test-held")[2]
    assert int(mapping.partition("Rss:")[2].split()[0]) == 4 * PAGES
    assert "lo" in mapping.partition("VmFlags:")[2].splitlines()[0].split()
    heir.close(force=True)


def test_what_was_let_go_of_is_not_kept_by_the_manager_either(
    manager: ServiceManager, contexts: tuple[int, int], extent: memfd.ExtentMap
) -> None:
    manager.start()
    pager = take(manager)
    pager.guard(5, contexts[0], track=contexts[1])
    pager.keep(KeptExtent(extent.inode, os.dup(extent.fd_ro), 0, extent.length))
    until(lambda: len(manager.kept) == 5)
    pager.drop(5)
    pager.release(extent.inode)
    until(lambda: set(manager.kept) == {"notes-0", "notes-1"})
    manager.kill()
    die(pager)
    manager.start()
    heir = take(manager)
    assert (heir.ids, heir.kept, heir.highest) == ([], [], 5)
    heir.close()


def test_a_daemon_that_lives_moves_over_to_the_next_pager_of_the_manager(
    manager: ServiceManager, contexts: tuple[int, int], extent: memfd.ExtentMap
) -> None:
    old = manager.start()
    pager = take(manager)
    pager.guard(5, contexts[0], track=contexts[1], about={"pid": 77})
    pager.extend({5: [(0x1000, 0x5000)]})
    pager.keep(KeptExtent(extent.inode, os.dup(extent.fd_ro), 0, extent.length))
    until(lambda: len(manager.kept) == 5)
    manager.kill()
    new: list[int] = []
    later = threading.Timer(0.3, lambda: new.append(manager.start()))
    later.start()
    pager.restart()
    later.join()
    assert pager.standing
    assert [pager.pid] == new != [old]
    told = pager.stats()
    assert (told["contexts"], told["extents"]) == (1, 1)
    assert pager.ids == [5]
    assert pager.unsettled == [5]
    die(pager)
    heir = take(manager)  # and what it was told anew is as complete
    assert heir.about(5) == {"pid": 77}
    assert list(heir._holds.targets[5].owed) == [(0x1000, 0x5000)]
    heir.close(force=True)


def test_without_another_one_in_time_the_daemon_starts_its_own(
    manager: ServiceManager, contexts: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "SUCCESSOR", 0.3)
    manager.start()
    pager = take(manager)
    pager.guard(5, contexts[0], about={"pid": 77})
    until(lambda: "guard-5" in manager.kept)
    manager.kill()
    pager.restart()
    assert not pager.standing
    assert pager.stats()["contexts"] == 1
    # the manager's comes late: it must not read the events of contexts that another one serves
    manager.start()
    late = Pager.adopt(door.knock(manager._process.pid), manager._process.pid, manager.name)
    assert late.stats()["contexts"] == 0
    until(lambda: set(manager.kept) == {"notes-0", "notes-1"})
    late.close()
    pager.close(force=True)


def test_a_daemon_that_starts_while_the_manager_restarts_its_pager_waits_for_it(
    manager: ServiceManager, contexts: tuple[int, int]
) -> None:
    manager.start()
    pager = take(manager)
    pager.guard(5, contexts[0], about={"pid": 77})
    until(lambda: "guard-5" in manager.kept)
    manager.kill()
    die(pager)
    later = threading.Timer(0.5, manager.start)
    later.start()
    heir = take(manager)
    later.join()
    assert (heir.standing, heir.ids) == (True, [5])
    heir.close(force=True)


@pytest.mark.parametrize(
    ("whose", "step"),
    [(door, "knock"), (adopt, "_claim"), (Pager, "_await_all"), (Pager, "_tell_key")],
    ids=["before the knock", "before the claim", "half way through", "with the key untold"],
)
def test_a_daemon_whose_pager_is_killed_while_it_is_taken_over_waits_for_the_next(
    whose: object,
    step: str,
    manager: ServiceManager,
    contexts: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    manager.start()
    pager = take(manager)
    pager.guard(5, contexts[0], about={"pid": 77})
    until(lambda: "guard-5" in manager.kept)
    die(pager)
    later = threading.Timer(0.5, manager.start)
    does = getattr(whose, step)

    def killed_first(*arguments: object) -> object:
        if not later.is_alive():
            monkeypatch.undo()
            manager.kill()
            later.start()
        return does(*arguments)

    monkeypatch.setattr(whose, step, killed_first)
    heir = take(manager)
    if not heir.alive():  # noticed at the next message
        heir.restart()
    later.join()
    assert (heir.standing, heir.ids) == (True, [5])
    assert heir.stats()["contexts"] == 1
    assert door.pagers(manager.name) == [heir.pid]
    heir.close(force=True)


def test_the_guard_stands_although_a_daemon_came_first_with_a_pager_that_holds_nothing(
    manager: ServiceManager, contexts: tuple[int, int]
) -> None:
    manager.start()
    pager = take(manager)
    pager.guard(5, contexts[0], about={"pid": 77})
    until(lambda: "guard-5" in manager.kept)
    manager.kill()
    die(pager)
    own = Pager(manager.name)
    own.start()
    pid = manager.start()
    late = Pager.adopt(door.knock(pid), pid, manager.name)
    assert late.ids == [5]
    assert not userfaultfd.is_dead(contexts[0])
    die(late)
    die(own)
    heir = take(manager)
    assert (heir.pid, heir.ids) == (pid, [5])
    heir.close(force=True)
    own.kill()


def test_what_an_orphaned_pager_guards_goes_to_the_one_that_stands_by(
    manager: ServiceManager, contexts: tuple[int, int]
) -> None:
    own = Pager(manager.name)
    own.start()
    own.guard(5, contexts[0], track=contexts[1], about={"pid": 77})
    orphan = own.pid
    die(own)
    pid = manager.start()
    heir = take(manager)
    assert (heir.pid, heir.standing, heir.ids) == (pid, True, [5])
    assert heir.stats()["contexts"] == 1
    until(lambda: door.pagers(manager.name) == [pid])
    assert orphan != pid
    heir.close(force=True)
    own.kill()


def test_the_verb_becomes_the_pager_and_loads_nothing_big(tmp_path: Path) -> None:
    name = tmp_path / "ksmd.sock"
    program = Path(sys.executable).with_name("ksmd")
    with subprocess.Popen([program, "pager", "--socket", name]) as process:
        try:
            until(lambda: door.standing(str(name)) == [process.pid])
            until(lambda: Path(f"/proc/{process.pid}/comm").read_text() == "ksmd-pager\n")
            maps = Path(f"/proc/{process.pid}/maps").read_text()
            for big in ("numpy", "pydantic", "psutil"):
                assert big not in maps
            process.terminate()
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()


def test_giving_back_with_no_pager_or_an_empty_one_is_no_failure(manager: ServiceManager) -> None:
    program = Path(sys.executable).with_name("ksmd")
    command = [program, "pager", "--give-back", "--socket", manager.name]
    assert subprocess.run(command, check=False).returncode == 0
    manager.start()
    assert subprocess.run(command, check=False).returncode == 0
    assert manager.runs()
