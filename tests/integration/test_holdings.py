"""What a daemon with a pager of its own has its service manager keep, and what the next one gets.

The service manager is played by the test: it keeps what it is told to keep, and passes it on.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ksmd.daemon import adopt
from ksmd.guard import door
from ksmd.guard.client import Pager
from ksmd.guard.held import KeptExtent
from ksmd.guard.stored import Stored
from ksmd.kernel import memfd
from ksmd.kernel.sdnotify import Inherited

pytestmark = pytest.mark.root

PAGES = 16
NOTES = {"notes-0", "notes-1"}


class ServiceManager:
    """Keeps descriptors for the daemons that are called *name*, one after the other."""

    def __init__(self, directory: Path) -> None:
        self.name = f"/run/test-{secrets.token_hex(4)}.sock"
        self._kept: dict[str, int] = {}
        self._address = str(directory / "notify")
        self._end = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._end.bind(self._address)
        self._end.setblocking(False)

    @property
    def kept(self) -> set[str]:
        """What is kept now; with more than was said, each name once."""
        with contextlib.suppress(BlockingIOError):
            while True:
                text, fds, _, _ = socket.recv_fds(self._end, 4096, 4)
                told = dict(line.split("=", 1) for line in text.decode().split("\n"))
                name = told["FDNAME"]
                if "FDSTORE" in told:
                    assert name not in self._kept, "stored twice"
                    (self._kept[name],) = fds
                elif name in self._kept:
                    os.close(self._kept.pop(name))
        return set(self._kept)

    def stored(self) -> Stored:
        """What the next daemon inherits."""
        assert self.kept is not None
        inherited = [Inherited(name, os.dup(fd)) for name, fd in self._kept.items()]
        return Stored(self._address, inherited)

    def close(self) -> None:
        for pid in door.pagers(self.name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        assert self.kept is not None
        for fd in self._kept.values():
            os.close(fd)
        self._end.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[ServiceManager]:
    made = ServiceManager(tmp_path)
    yield made
    made.close()


@pytest.fixture
def pager(manager: ServiceManager) -> Iterator[Pager]:
    """The first daemon's."""
    made = Pager(manager.name)
    assert not made.recall(manager.stored())
    made.start()
    yield made
    made.kill()


def of_another_process() -> tuple[subprocess.Popen[str], int]:
    """A guard context of a process that lives until it is killed; the context is ours."""
    code = (
        "import socket, sys, time\n"
        "from ksmd.kernel import userfaultfd\n"
        "fd = userfaultfd.create(userfaultfd.open_device())\n"
        "userfaultfd.api(fd, userfaultfd.GUARD_FEATURES)\n"
        "socket.send_fds(socket.socket(fileno=int(sys.argv[1])), [b'x'], [fd])\n"
        "time.sleep(600)\n"
    )
    mine, its = socket.socketpair()
    with mine, its:
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(its.fileno())], pass_fds=(its.fileno(),), text=True
        )
        _, (fd,), _, _ = socket.recv_fds(mine, 1, 1)
    return process, fd


def fill(pager: Pager, contexts: tuple[int, int], extent: memfd.ExtentMap) -> None:
    pager.guard(5, contexts[0], track=contexts[1], about={"pid": 77})
    pager.extend({5: [(0x1000, 0x5000), (0x9000, 0xA000)]})
    pager.settle({5: [(0x1000, 0x3000)]})
    pager.keep(KeptExtent(extent.inode, os.dup(extent.fd_ro), 0, extent.length, {"number": 3}))


def test_the_next_daemon_gets_back_what_all_processes_held_when_they_were_killed(
    manager: ServiceManager, pager: Pager, contexts: tuple[int, int], extent: memfd.ExtentMap
) -> None:
    fill(pager, contexts, extent)
    assert manager.kept == NOTES | {"guard-5", "track-5", f"extent-{extent.inode}"}
    key = pager.key
    pager.kill()
    pager.leave()

    assert adopt.find_pager(manager.name) is None
    heir = Pager(manager.name)
    assert heir.recall(manager.stored())
    told = heir.stats()
    assert (told["contexts"], told["extents"]) == (1, 1)
    assert heir.ids == heir.unsettled == [5]
    assert heir.about(5) == {"pid": 77}
    assert list(heir._holds.targets[5].owed) == [(0x3000, 0x5000), (0x9000, 0xA000)]
    assert (heir.highest, heir.key) == (5, key)
    (kept,) = heir.kept
    assert (kept.inode, kept.offset, kept.length) == (extent.inode, 0, extent.length)
    assert kept.about == {"number": 3}
    assert manager.kept == NOTES | {"guard-5", "track-5", f"extent-{extent.inode}"}
    heir.close(force=True)
    assert manager.kept == set()


def test_what_is_let_go_of_leaves_the_store_and_an_empty_daemon_leaves_nothing(
    manager: ServiceManager, pager: Pager, contexts: tuple[int, int], extent: memfd.ExtentMap
) -> None:
    fill(pager, contexts, extent)
    pager.drop(5)
    assert manager.kept == NOTES | {f"extent-{extent.inode}"}
    pager.release(extent.inode)
    assert manager.kept == NOTES
    assert pager.close()
    assert manager.kept == set()


def test_the_context_of_a_process_that_has_ended_is_not_taken_back(
    manager: ServiceManager, pager: Pager, contexts: tuple[int, int], extent: memfd.ExtentMap
) -> None:
    fill(pager, contexts, extent)
    process, fd = of_another_process()
    pager.guard(6, fd)
    os.close(fd)
    assert "guard-6" in manager.kept
    pager.kill()
    pager.leave()
    process.kill()
    process.wait()
    heir = Pager(manager.name)
    assert heir.recall(manager.stored())
    assert heir.ids == [5]
    assert heir.highest == 6  # and no number is used twice
    assert manager.kept == NOTES | {"guard-5", "track-5", f"extent-{extent.inode}"}
    heir.close(force=True)


def test_a_daemon_that_leaves_its_pager_leaves_the_store_as_it_is(
    manager: ServiceManager, pager: Pager, contexts: tuple[int, int], extent: memfd.ExtentMap
) -> None:
    fill(pager, contexts, extent)
    before = manager.kept
    assert not pager.close()  # for a restart: the pager holds on
    assert manager.kept == before
    heir = adopt.find_pager(manager.name)
    assert heir is not None
    assert not heir.recall(manager.stored())  # the pager had it all, and nothing is stored again
    assert manager.kept == before
    heir.drop(5)
    heir.release(extent.inode)
    assert heir.close()
    assert manager.kept == set()


def test_what_a_pager_was_not_told_yet_is_told_by_the_next_daemon(
    manager: ServiceManager, pager: Pager, contexts: tuple[int, int], extent: memfd.ExtentMap
) -> None:
    """A daemon that was killed while it told a new pager of everything."""
    fill(pager, contexts, extent)
    pager.kill()
    pager.leave()
    half = Pager(manager.name)
    half.start()
    process, fd = of_another_process()
    half.guard(9, fd)
    os.close(fd)
    half.leave()

    heir = adopt.find_pager(manager.name)
    assert heir is not None
    assert heir.recall(manager.stored())
    assert sorted(heir.ids) == [5, 9]
    assert heir.stats()["contexts"] == 2
    named = {"guard-5", "track-5", "guard-9", f"extent-{extent.inode}"}
    assert manager.kept == NOTES | named
    process.kill()
    process.wait()
    heir.close(force=True)


def test_a_pager_that_stands_by_itself_takes_all_and_nothing_stays_in_our_store(
    manager: ServiceManager, pager: Pager, contexts: tuple[int, int], extent: memfd.ExtentMap
) -> None:
    fill(pager, contexts, extent)
    pager.kill()
    pager.leave()
    command = door.command(door.STANDING, manager.name)
    with subprocess.Popen(command) as standing:
        try:
            while not door.standing(manager.name):
                pass
            heir = None
            while heir is None:  # it has its name before it has its door
                heir = adopt.find_pager(manager.name)
            assert heir.recall(manager.stored())
            assert (heir.pid, heir.standing, heir.ids) == (standing.pid, True, [5])
            assert heir.stats()["contexts"] == 1
            assert manager.kept == set()
            # should it die for good, all is stored again
            standing.kill()
            standing.wait()
            heir.standing = False
            heir.restart()
            assert manager.kept == NOTES | {"guard-5", "track-5", f"extent-{extent.inode}"}
            heir.close(force=True)
        finally:
            standing.kill()


def test_without_a_manager_nothing_is_said_and_nothing_found(
    contexts: tuple[int, int], manager: ServiceManager
) -> None:
    alone = Pager(manager.name)
    assert not alone.recall(Stored())
    alone.start()
    alone.guard(5, contexts[0])
    assert manager.kept == set()
    alone.close(force=True)
