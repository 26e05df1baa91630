"""Reading other processes: what is read is true, and nothing in them changes by it."""

from __future__ import annotations

import mmap
import time

import numpy as np
import pytest
from kernel_victims import Victim

from ksmd.kernel import libc, procfs, proctext, risks
from ksmd.kernel import memory as readers
from ksmd.kernel.pagemap import PageMap, exclusive, is_present
from ksmd.model.errors import KsmdError, TargetGoneError
from ksmd.model.units import PAGE_SHIFT, PAGE_SIZE

pytestmark = pytest.mark.root


class Memory(readers.Memory):
    """One that may use both readers, as for a program without a userfaultfd."""

    def __init__(self, pid: int, *, writable: bool = False) -> None:
        super().__init__(pid, writable=writable)
        self.may_pin = True


NPAGES = 512
FILLED = f"at = anon({NPAGES + 1} * PAGE); fill(at, {NPAGES}); reply(at)\n"


def _expected(npages: int = NPAGES) -> bytes:
    return b"".join(bytes([(1 + i) % 255 + 1]) * PAGE_SIZE for i in range(npages))


def _pss_kib(pid: int) -> int:
    return int(proctext.parse_fields(procfs.read_process(pid, "smaps_rollup"))["Pss"].split()[0])


@pytest.mark.parametrize("reader", ["read_into", "read_exclusive_into"])
def test_both_readers_give_the_targets_bytes(reader: str) -> None:
    with Victim(FILLED) as victim, Memory(victim.pid) as memory:
        buffer = bytearray(NPAGES * PAGE_SIZE)
        assert getattr(memory, reader)(victim.ready, memoryview(buffer)) == len(buffer)
        assert buffer == _expected()


@pytest.mark.parametrize("reader", ["read_into", "read_exclusive_into"])
def test_a_read_stops_at_a_hole(reader: str) -> None:
    with Victim(FILLED) as victim, Memory(victim.pid) as memory:
        victim.ask(f"libc.munmap(ctypes.c_void_p({victim.ready} + 5 * PAGE), PAGE)")
        view = memoryview(bytearray(16 * PAGE_SIZE))
        assert getattr(memory, reader)(victim.ready, view) == 5 * PAGE_SIZE
        assert bytes(view[: 5 * PAGE_SIZE]) == _expected(5)
        assert getattr(memory, reader)(victim.ready + 5 * PAGE_SIZE, view) == 0


OWN_FAULTS = """
fd = libc.syscall(323, 0o2004000)
one = (ctypes.c_uint64 * 3)(0xAA, 0, 0)
assert libc.ioctl(fd, ctypes.c_ulong(0xC018AA3F), one) == 0, ctypes.get_errno()
at = anon(8 * PAGE)
other = (ctypes.c_uint64 * 4)(at, 8 * PAGE, 1, 0)
assert libc.ioctl(fd, ctypes.c_ulong(0xC020AA00), other) == 0, ctypes.get_errno()
reply(at)
"""


def test_a_program_that_answers_faults_is_not_asked_for_an_absent_page() -> None:
    """What is absent there now was there when pagemap was read: an unlucky moment."""
    with Victim(OWN_FAULTS) as victim, readers.Memory(victim.pid) as memory:
        assert risks.may_answer_faults(victim.pid)
        view = memoryview(bytearray(4 * PAGE_SIZE))
        assert memory.read_into(victim.ready, view) == 0
        assert memory.read_exclusive_into(victim.ready, view) == 0
        pieces = [(victim.ready, PAGE_SIZE), (victim.ready + 2 * PAGE_SIZE, PAGE_SIZE)]
        assert memory.gather_exclusive(pieces, view) == [(0, 4096), (4096, 8192)]
        event = "__import__('select').select([fd], [], [], 0)[0]"
        assert victim.ask(event) == []


def test_only_a_userfaultfd_or_its_device_makes_a_program_one_that_answers_faults() -> None:
    with Victim() as victim:
        assert not risks.may_answer_faults(victim.pid)
        victim.ask("os.open('/dev/userfaultfd', os.O_RDWR)")
        assert risks.may_answer_faults(victim.pid)


def test_a_target_that_refuses_process_vm_readv_is_read_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(name: str, *_: object) -> int:
        raise PermissionError(1, name)

    monkeypatch.setattr(libc, "syscall", refuse)
    with Victim(FILLED) as victim, Memory(victim.pid) as memory:
        buffer = bytearray(NPAGES * PAGE_SIZE)
        assert memory.read_exclusive_into(victim.ready, memoryview(buffer)) == len(buffer)
        assert buffer == _expected()


def test_pieces_come_one_after_the_other_and_what_is_missing_is_told() -> None:
    with Victim(FILLED) as victim, Memory(victim.pid) as memory:
        victim.ask(f"libc.munmap(ctypes.c_void_p({victim.ready} + 9 * PAGE), PAGE)")
        at = [victim.ready + page * PAGE_SIZE for page in (0, 7, 8, 9, 11, 3)]
        lengths = [64, 128, 2 * PAGE_SIZE, 128, 8, PAGE_SIZE]
        pieces = list(zip(at, lengths, strict=True))
        read = bytearray(b"?" * sum(lengths))
        missing = memory.gather_exclusive(pieces, memoryview(read))
        many = bytearray(2500 * 16)
        pieces = [(victim.ready + n % 8 * PAGE_SIZE, 16) for n in range(2500)]
        assert memory.gather_exclusive(pieces, memoryview(many)) == []
    hole = 64 + 128 + PAGE_SIZE
    assert missing == [(hole, hole + PAGE_SIZE), (hole + PAGE_SIZE, hole + PAGE_SIZE + 128)]
    expected = b"\2" * 64 + b"\x09" * 128 + b"\x0a" * PAGE_SIZE + b"?" * (PAGE_SIZE + 128)
    assert read == expected + b"\x0d" * 8 + b"\x05" * PAGE_SIZE
    assert many == b"".join(bytes([2 + n % 8]) * 16 for n in range(2500))


def test_write_needs_a_mapping_and_the_writable_file() -> None:
    with Victim(FILLED) as victim:
        with Memory(victim.pid, writable=True) as memory:
            memory.write(victim.ready + 100, b"written")
            assert memory.read(victim.ready + 99, 9) == b"\2written\2"
            with pytest.raises(KsmdError, match="cannot write"):
                memory.write(8, b"x")
        assert victim.ask(f"peek({victim.ready + 100})") == ord("w")
        with Memory(victim.pid) as memory, pytest.raises(KsmdError, match="descriptor"):
            memory.write(victim.ready, b"x")


def test_scanning_and_reading_a_forked_family_leaves_it_as_it_was() -> None:
    script = (
        f"at = anon({NPAGES} * PAGE); fill(at, {NPAGES}); kids = family(2); reply([at, kids])\n"
    )
    with Victim(script) as victim:
        at, children = victim.ready
        pids = [victim.pid, *children]
        _settle(children, at)
        before = {pid: _state(pid, at) for pid in pids}
        assert all(count == 0 for _, count in before.values()), "the family does not share"
        for pid in pids:
            with PageMap(pid) as pagemap, Memory(pid) as memory:
                found = pagemap.present(at, at + NPAGES * PAGE_SIZE, 1 << 20)
                assert len(found.pages) == NPAGES
                assert not pagemap.exclusive_of(found.pages).any()
                buffer = bytearray(NPAGES * PAGE_SIZE)
                assert memory.read_into(at, memoryview(buffer)) == len(buffer)
                assert buffer == _expected()
        assert {pid: _state(pid, at) for pid in pids} == before


def _state(pid: int, at: int) -> tuple[int, int]:
    """Pss of the whole process and the number of exclusive pages in the region."""
    with PageMap(pid) as pagemap:
        return _pss_kib(pid), int(exclusive(pagemap.entries(at >> PAGE_SHIFT, NPAGES)).sum())


def _settle(children: list[int], at: int) -> None:
    """Wait until the children sleep: while they start they still un-share pages of their own."""
    deadline = time.monotonic() + 20
    while any(procfs.task_stat(pid, pid).state != "S" for pid in children):
        assert time.monotonic() < deadline, f"children of {at:#x} do not rest"
        time.sleep(0.01)
    time.sleep(0.1)


def test_reading_present_pages_maps_no_others() -> None:
    script = "at = anon(64 * PAGE); fill(at, 64, step=2); reply(at)\n"
    with Victim(script) as victim, PageMap(victim.pid) as pagemap, Memory(victim.pid) as memory:
        at = victim.ready
        for page in pagemap.present(at, at + 64 * PAGE_SIZE, 1000).pages.tolist():
            memory.read(page << PAGE_SHIFT, PAGE_SIZE)
        present = is_present(pagemap.entries(at >> PAGE_SHIFT, 64))
        assert np.array_equal(present, np.arange(64) % 2 == 0)


@pytest.mark.parametrize("end", ["kill", "exec"])
def test_memory_and_pagemap_say_that_the_target_is_gone(end: str) -> None:
    with Victim(FILLED) as victim, Memory(victim.pid) as memory, PageMap(victim.pid) as pagemap:
        at = victim.ready
        if end == "kill":
            victim.kill()
        else:
            victim.ask("reply(1) or os.execv('/bin/sleep', ['sleep', '3600'])")
            while procfs.process_info(victim.pid).comm != "sleep":
                time.sleep(0.01)
        for attempt in (
            lambda: memory.read(at, PAGE_SIZE),
            lambda: memory.read_exclusive_into(at, memoryview(bytearray(PAGE_SIZE))),
            lambda: pagemap.entries(at >> PAGE_SHIFT, 1),
            lambda: pagemap.present(at, at + PAGE_SIZE, 10),
            lambda: pagemap.still_shared(at, at + PAGE_SIZE),
        ):
            with pytest.raises(TargetGoneError):
                attempt()


def test_a_process_whose_first_thread_has_ended_is_read_through_another() -> None:
    script = FILLED.replace("reply(at)", "")
    script += "threading.Thread(target=lambda: (time.sleep(0.2), reply(at), time.sleep(3600)))"
    script += ".start(); ctypes.CDLL(None).syscall(60, 0)\n"
    with Victim(script) as victim:
        at = victim.ready
        assert procfs.task_stat(victim.pid, victim.pid).state == "Z"
        assert procfs.live_tid(victim.pid) != victim.pid
        assert not procfs.process_info(victim.pid).zombie
        assert any(vma.start <= at < vma.end for vma in procfs.maps(victim.pid))
        with Memory(victim.pid) as memory, PageMap(victim.pid) as pagemap:
            buffer = bytearray(NPAGES * PAGE_SIZE)
            assert memory.read_exclusive_into(at, memoryview(buffer)) == len(buffer)
            assert buffer == _expected()
            assert len(pagemap.present(at, at + len(buffer), 1 << 20).pages) == NPAGES


def test_reads_go_into_mapped_memory_too() -> None:
    with Victim(FILLED) as victim, Memory(victim.pid) as memory, mmap.mmap(-1, 1 << 20) as store:
        view = memoryview(store)
        assert memory.read_exclusive_into(victim.ready, view) == 1 << 20
        assert view == _expected()[: 1 << 20]
        view.release()
