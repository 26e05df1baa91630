"""A pager that is found and taken over: by whom it lets itself, and what it has kept for him."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ksmd.core.integrity import ContentDigest
from ksmd.guard import client, door
from ksmd.guard.client import Pager
from ksmd.guard.held import KeptExtent
from ksmd.guard.line import PagerRefusedError
from ksmd.kernel import iouring, libc, memfd
from ksmd.model.errors import KsmdError
from ksmd.model.units import PAGE_SIZE

pytestmark = pytest.mark.root

PAGES = 64
PATIENCE = 60.0


@pytest.fixture
def name(tmp_path: Path) -> str:
    return str(tmp_path / "socket")


@pytest.fixture
def pager(name: str) -> Iterator[Pager]:
    pager = Pager(name)
    pager.start()
    yield pager
    pager.close(force=True)
    for pid in door.pagers(name):
        os.kill(pid, signal.SIGKILL)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def knock(pager: Pager) -> Pager:
    end = door.knock(pager.pid)
    assert end is not None
    return Pager.adopt(end, pager.pid, pager.name)


def vmpin(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmPin:")[2].split()[0])


# -- the door --------------------------------------------------------------------------------------


def test_a_pager_is_found_by_its_name_and_by_no_other(pager: Pager, name: str) -> None:
    nameless = Pager()
    nameless.start()
    try:
        assert door.pagers(name) == [pager.pid]
        assert door.pagers(name + "x") == []
    finally:
        nameless.close(force=True)


def test_while_its_daemon_lives_a_pager_belongs_to_nobody_else(pager: Pager) -> None:
    with pytest.raises(PagerRefusedError, match="another daemon owns"):
        knock(pager)
    assert pager.stats()["contexts"] == 0


@pytest.mark.parametrize("mark", ["7", door.STANDING])
def test_who_only_looks_like_a_pager_is_not_believed(mark: str, name: str) -> None:
    code = "import os, time; os.setuid(65534); print(flush=True); time.sleep(600)"
    words = [sys.executable, "-c", code, "-P", "-m", door.MODULE, mark, name]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as nobody:
        try:
            assert nobody.stdout is not None
            nobody.stdout.readline()
            assert door.pagers(name) == door.standing(name) == []  # nor waited for
            assert door.knock(nobody.pid) is None
        finally:
            nobody.kill()
    assert door.knock(nobody.pid) is None


def test_a_process_that_is_no_pager_has_no_door() -> None:
    with subprocess.Popen(["sleep", "600"]) as other:
        try:
            assert door.knock(other.pid) is None
        finally:
            other.kill()


def test_nonsense_at_the_door_does_not_end_the_pager(pager: Pager) -> None:
    pidfd = os.pidfd_open(pager.pid)
    outer = libc.pidfd_getfd(pidfd, door.OUTER)
    for raw in (b"x", b"\xff\xff\xff\xff", b"\x02\0\0\0[]", b"\x02\0\0\0{}"):
        os.write(outer, raw)
    before = pager.stats()["fds"]
    until(lambda: pager.stats()["fds"] == before)
    for fd in (outer, pidfd):
        os.close(fd)
    assert pager.alive()


# -- what it has kept ------------------------------------------------------------------------------


def test_everything_said_of_targets_and_extents_comes_back(
    pager: Pager, contexts: tuple[int, int], extent: memfd.ExtentMap
) -> None:
    guard, track = contexts
    label = {"number": 7, "pins": [[1, 2]]}
    pager.guard(41, guard, track=track, about={"pid": 4711})
    pager.extend({41: [(0x1000000, 0x1002000)]})
    pager.guard(42, guard)
    pager.drop(42)
    pager.keep(KeptExtent(extent.inode, extent.fd_ro, 4 * PAGE_SIZE, 60 * PAGE_SIZE, label))
    assert not pager.close()
    heir = knock(pager)
    try:
        assert heir.ids == [41]
        assert heir.highest == 42, "an id could be used twice"
        assert heir.about(41) == {"pid": 4711}
        assert heir.unsettled == [41]
        heir.settle_all(41)
        assert heir.unsettled == []
        assert heir.key == pager.key
        (kept,) = heir.kept
        assert (kept.inode, kept.offset, kept.length) == (extent.inode, 4 << 12, 60 << 12)
        assert kept.about == label
        again = memfd.map_existing(kept.fd, PAGES)
        assert bytes(libc.view(again.address, again.length)) == b"k" * extent.length
        assert again.inode == extent.inode
        memfd.release(again)
        mine = heir.contexts(41)
        for fd, original in zip(mine, contexts, strict=True):
            assert os.path.sameopenfile(fd, original)
            os.close(fd)
        heir.release(extent.inode)
        heir.drop(41)
        assert heir.close()
    finally:
        heir.close(force=True)


def test_after_an_adoption_another_pager_is_told_all_again(
    pager: Pager, contexts: tuple[int, int], extent: memfd.ExtentMap
) -> None:
    guard, track = contexts
    pager.guard(5, guard, track=track, about={"pid": 1})
    pager.keep(KeptExtent(extent.inode, extent.fd_ro, 0, extent.length, {"number": 1}))
    with iouring.PinRing() as ring:
        pager.hold_rings(ring.named)
        key = pager.key
        pager.close()
        heir = knock(pager)
    fds = [*heir.rings.values(), *(kept.fd for kept in heir.kept)]
    try:
        heir.restart()
        assert heir.stats()["extents"] == 1
        heir.close()
        third = knock(heir)
        fds += [*third.rings.values(), *(kept.fd for kept in third.kept)]
        try:
            assert (third.ids, third.about(5), third.key) == ([5], {"pid": 1}, key)
            assert [kept.about for kept in third.kept] == [{"number": 1}]
            assert list(third.rings) == list(heir.rings)
        finally:
            third.close(force=True)
    finally:
        heir.close(force=True)
        for fd in fds:
            os.close(fd)


def test_a_pager_of_another_version_is_replaced_when_it_is_adopted(
    pager: Pager, contexts: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    guard, track = contexts
    pager.guard(5, guard, track=track, about={"pid": 1})
    old = pager.pid
    pager.close()
    monkeypatch.setattr(client, "__version__", "another")
    heir = knock(pager)
    try:
        assert heir.pid != old
        assert door.pagers(pager.name) == [heir.pid]
        assert heir.ids == [5]
        assert heir.stats()["contexts"] == 1
    finally:
        heir.close(force=True)


def test_what_a_daemon_said_last_counts_although_it_died_before_it_was_heard(
    name: str, contexts: tuple[int, int]
) -> None:
    guard, track = contexts
    pager = Pager(name)
    pager.start()
    pid = pager.pid
    os.kill(pid, signal.SIGSTOP)
    daemon = os.fork()
    if not daemon:
        try:
            pager.guard(9, guard, track=track, about={"pid": 2})  # waits for an answer
        finally:
            os._exit(1)
    time.sleep(0.3)
    os.kill(daemon, signal.SIGKILL)
    os.waitpid(daemon, 0)
    pager._line.detach()  # the daemon's own end was a copy of ours
    end = door.knock(pid)
    assert end is not None
    os.kill(pid, signal.SIGCONT)
    heir = Pager.adopt(end, pid, name)
    try:
        assert heir.ids == [9]
        assert heir.about(9) == {"pid": 2}
    finally:
        heir.close(force=True)
        assert pager._process is not None
        pager._process.wait()


# -- pins ------------------------------------------------------------------------------------------


def test_pins_of_a_dead_daemon_hold_until_its_heir_takes_them_off(
    pager: Pager, contexts: tuple[int, int], extent: memfd.ExtentMap
) -> None:
    pager.guard(1, contexts[0], track=contexts[1])
    before = vmpin(os.getpid())
    with iouring.PinRing() as ring:
        slots = ring.slots(ring.pin(extent.address, extent.length))
        ring.pin(extent.address, PAGE_SIZE)  # the daemon dies before it tells of this one
        pager.hold_rings(ring.named)
    pager.close()
    assert vmpin(os.getpid()) == before + PAGES * 4 + 4, "the pager holds no pins"
    heir = knock(pager)
    try:
        with iouring.PinRing() as ring:
            ring.adopt(heir.rings)
            token = ring.adopt_pin(slots)
            assert vmpin(os.getpid()) == before + PAGES * 4 + 4
            ring.drop_unknown()
            assert vmpin(os.getpid()) == before + PAGES * 4, "a pin that nobody names is left"
            assert len(ring.named) == 2
            ring.unpin(token)
            assert vmpin(os.getpid()) == before
            assert len(ring.named) == 1, "an adopted ring without a pin is kept"
            assert heir.rings.keys() - ring.named.keys()
            heir.hold_rings(ring.named)
            assert heir.rings == ring.named
    finally:
        heir.close(force=True)


def test_adopted_rings_take_no_new_pins(extent: memfd.ExtentMap) -> None:
    first = iouring.PinRing()
    old = first.pin(extent.address, PAGE_SIZE)
    with iouring.PinRing() as ring:
        ring.adopt({name: os.dup(fd) for name, fd in first.named.items()})
        adopted = ring.adopt_pin(first.slots(old))
        new = ring.pin(extent.address, PAGE_SIZE)
        assert {name for name, _ in ring.slots(new)}.isdisjoint(first.named)
        ring.unpin(adopted)  # the ring may hold pins that nobody named: it stays
        assert len(ring.named) == 2
        with pytest.raises(KeyError):
            ring.adopt_pin([(12345, 0)])
    first.close()


# -- extents ---------------------------------------------------------------------------------------


def test_what_is_not_sealed_is_no_extent() -> None:
    fd = os.memfd_create("ksmd-test", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, memfd.FILE_SIZE)
    with pytest.raises(KsmdError, match="is none"):
        memfd.map_existing(fd, 1)
    os.close(fd)
    reader, writer = os.pipe()
    with pytest.raises(KsmdError):
        memfd.map_existing(reader, 1)
    for fd in (reader, writer):
        os.close(fd)


def test_an_adopted_extent_cannot_be_written_by_us_either(extent: memfd.ExtentMap) -> None:
    again = memfd.map_existing(os.dup(extent.fd_ro), PAGES)
    assert again.address % (2 << 20) == 0
    with pytest.raises(PermissionError):
        libc.mprotect(again.address, again.length, libc.PROT_READ | libc.PROT_WRITE)
    memfd.release(again)


def test_one_bit_a_swap_of_pages_or_another_label_changes_the_digest() -> None:
    key, about = b"k" * 32, {"number": 1, "pins": [(5, 6)]}
    pages = bytearray(os.urandom(4 * PAGE_SIZE))

    def digest(
        content: bytes | bytearray, *, step: int = 4, key: bytes = key, about: object = about
    ) -> str:
        found = ContentDigest(key, about)  # type: ignore[arg-type]
        for at in range(0, len(content), step * PAGE_SIZE):
            found.update(memoryview(content)[at : at + step * PAGE_SIZE])
        return found.value()

    right = digest(pages)
    assert digest(pages, step=1) == right
    assert digest(pages, about={"pins": [[5, 6]], "number": 1}) == right, "JSON makes lists"
    flipped = bytearray(pages)
    flipped[5000] ^= 1
    swapped = pages[PAGE_SIZE : 2 * PAGE_SIZE] + pages[:PAGE_SIZE] + pages[2 * PAGE_SIZE :]
    others = {
        digest(flipped),
        digest(swapped),
        digest(pages[PAGE_SIZE:]),
        digest(pages, key=b"x" * 32),
        digest(pages, about=about | {"number": 2}),
    }
    assert right not in others
    assert len(others) == 5
    found = ContentDigest(key, about)
    found.update(memoryview(pages))
    assert found.matches(right)
    assert not found.matches(digest(flipped))


def test_a_pager_with_nothing_to_guard_leaves_with_its_daemon_whatever_it_keeps(
    name: str, extent: memfd.ExtentMap
) -> None:
    pager = Pager(name)
    pager.start()
    watch = os.pidfd_open(pager.pid)
    pager.keep(KeptExtent(extent.inode, extent.fd_ro, 0, extent.length))
    pager._line.detach()  # as a daemon that is killed
    ready, _, _ = select.select([watch], [], [], PATIENCE)
    os.close(watch)
    assert ready
    assert door.pagers(name) == []
    pager.close(force=True)
