"""The victims themselves: they find nothing wrong when nothing is, and they do find what is.

A victim that could not fail would prove nothing about a merge, so each kind of check is made to
fail here once, by the very damage that it is there to notice.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from victims import KINDS, WAITS, WORKS, Victim, VictimError, fields

StartVictim = Callable[..., Victim]

PAGE = 4096
LAYOUTS = ("runs:long", "runs:short", "singles", "zeros", "unique", "tails", "mixed")
# what it takes to build these: namespaces, another user, ptrace of another user's process
ROOT_KINDS = {"nobody", "namespaces"}


def needs_root(kind: str) -> Any:
    return pytest.param(kind, marks=pytest.mark.root if kind in ROOT_KINDS else ())


def memory(victim: Victim) -> bytes:
    with Path(f"/proc/{victim.pid}/mem").open("rb", buffering=0) as mem:
        mem.seek(victim.address)
        return mem.read(victim.pages * PAGE)


def contents(victim: Victim) -> list[bytes]:
    whole = memory(victim)
    return [whole[at : at + PAGE] for at in range(0, len(whole), PAGE)]


def corrupt(victim: Victim, address: int) -> None:
    """Flip one bit of the victim's memory."""
    with Path(f"/proc/{victim.pid}/mem").open("r+b", buffering=0) as mem:
        mem.seek(address)
        (byte,) = mem.read(1)
        mem.seek(address)
        mem.write(bytes([byte ^ 1]))


def has_pending_signal(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("ShdPnd:")[2].split()[0], 16) != 0


@pytest.mark.parametrize("kind", [needs_root(kind) for kind in KINDS])
def test_every_kind_works_for_a_moment_and_finds_nothing_wrong(
    victims: StartVictim, kind: str
) -> None:
    victim = victims(kind, pages=48, layout="mixed")
    if "work" in victim.options:
        victim.await_rounds(2 * max(victim.options.get("threads", 0), 1))
    for command in ("write 3", "dontneed 5 4", "restore 6 1"):
        victim.command(command)
    assert victim.check(), victim.report()
    assert victim.alive()


@pytest.mark.parametrize("work", WORKS)
def test_the_main_thread_alone_can_do_every_work(victims: StartVictim, work: str) -> None:
    victim = victims("idle", threads=0, work=work)
    victim.await_rounds(2)
    assert victim.check(), victim.report()


@pytest.mark.parametrize("work", [*WORKS, "all"])
def test_every_work_fits_through_the_strict_filter(victims: StartVictim, work: str) -> None:
    victim = victims("seccomp", work=work, threads=len(WORKS) if work == "all" else 1)
    victim.await_rounds(2)
    assert victim.check(), victim.report()
    assert "Seccomp:\t2" in Path(f"/proc/{victim.pid}/status").read_text()


@pytest.mark.parametrize("kind", ["idle", "writers", "all", needs_root("namespaces")])
def test_hammer_and_fork_find_nothing_wrong(victims: StartVictim, kind: str) -> None:
    victim = victims(kind, layout="mixed")
    hammered = victim.ask("hammer 0.2")
    assert hammered["reads"] > 0
    assert hammered["drops"] > 0
    assert victim.ask("fork") == {"child": 0, "bad": 0}
    assert victim.check(), victim.report()


@pytest.mark.parametrize("thp", ["none", "off", "madvise", "on"])
def test_huge_pages_are_there_when_asked_for(victims: StartVictim, thp: str) -> None:
    victim = victims(thp=thp, pages=1024)
    smaps = Path(f"/proc/{victim.pid}/smaps").read_text()
    vma = smaps.partition(f"{victim.address:x}-")[2]
    flags = vma.partition("VmFlags:")[2].splitlines()[0].split()
    assert ("nh" in flags, "hg" in flags) == (thp == "off", thp in {"madvise", "on"})
    if thp == "on":
        assert "AnonHugePages:      4096 kB" in vma.partition("VmFlags:")[0]
    assert victim.check()


class TestLayouts:
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_the_stated_counts_are_those_of_the_memory(
        self, victims: StartVictim, layout: str
    ) -> None:
        one, two = (victims(layout=layout, pages=2048, seed=7) for _ in range(2))
        ours, theirs = contents(one), contents(two)
        zeros = bytes(PAGE)
        both = (set(ours) & set(theirs)) - {zeros}
        assert sum(page == zeros for page in ours) == one.zero
        assert sum(page in both for page in ours) == one.equal
        assert len(both) == one.distinct
        assert sum(page not in both and page != zeros for page in ours) == one.unique
        assert one.zero + one.equal + one.unique == 2048
        assert len(set(ours) - both - {zeros}) == one.unique
        positions = [(a == b) for a, b in zip(ours, theirs, strict=True)]
        assert sum(positions) == one.equal + one.zero

    def test_another_seed_has_nothing_in_common_but_zeros(self, victims: StartVictim) -> None:
        one, two = victims(layout="mixed", seed=1), victims(layout="mixed", seed=2)
        assert set(contents(one)) & set(contents(two)) == {bytes(PAGE)}

    def test_tails_are_equal_but_for_their_last_word(self, victims: StartVictim) -> None:
        one, two = (contents(victims(layout="tails", pages=4)) for _ in range(2))
        assert [page[:-8] for page in one] == [page[:-8] for page in two]
        assert one != two

    def test_the_arena_lies_where_it_was_asked_for(self, victims: StartVictim) -> None:
        assert victims(address=0x200000001000, pages=8).region == (0x200000001000, 8)
        assert victims(offset=3).address % (2 << 20) == 3 * PAGE
        heap = victims(heap=True, pages=8)
        maps = Path(f"/proc/{heap.pid}/maps").read_text().splitlines()
        (line,) = (line for line in maps if line.endswith("[heap]"))
        first, last = (int(end, 16) for end in line.split()[0].split("-"))
        assert first <= heap.address < heap.address + 8 * PAGE <= last


class TestVictimsNoticeDamage:
    def test_a_changed_bit_in_the_arena(self, victims: StartVictim) -> None:
        victim = victims(layout="mixed", pages=64)
        assert victim.check()
        corrupt(victim, victim.address + 17 * PAGE + 4095)
        assert not victim.check()
        assert (victim.ask("sum")["bad"], victim.ask("sum")["first"]) == (1, 17)
        assert victim.ask("read 17")["bad"] == 1
        assert victim.ask("fork")["child"] == 1

    @pytest.mark.parametrize("command", ["write 5", "dontneed 5", "restore 5"])
    def test_a_changed_bit_in_a_page_that_it_changed_itself(
        self, victims: StartVictim, command: str
    ) -> None:
        victim = victims()
        victim.command(command)
        assert victim.check()
        corrupt(victim, victim.address + 5 * PAGE + 5 * 8)
        assert not victim.check()

    def test_a_write_that_was_lost(self, victims: StartVictim) -> None:
        victim = victims()
        before = memory(victim)
        victim.command("write 9")
        with Path(f"/proc/{victim.pid}/mem").open("r+b", buffering=0) as mem:
            mem.seek(victim.address)
            mem.write(before)
        assert victim.ask("sum")["bad"] == 1

    def test_a_changed_bit_during_the_hammer(self, victims: StartVictim) -> None:
        victim = victims(pages=64)
        victim.begin("hammer 1")
        for _ in range(200):  # some land between a fill and the next
            for page in range(64):
                corrupt(victim, victim.address + page * PAGE + 8)
        assert fields(victim.finish())["bad"] > 0
        assert "arena" in victim.errors()

    def test_a_changed_bit_in_a_writers_own_page(self, victims: StartVictim) -> None:
        victim = victims("write", threads=9)  # more than eight: they pause between rounds
        own = victim.ask("addr")["own"]
        for _ in range(50):  # it may write the word anew before it looks at it: once is not enough
            corrupt(victim, own + PAGE)
            victim.await_rounds(18)
            if victim.errors():
                break
        assert "writer" in victim.errors()
        assert not victim.check()

    @pytest.mark.parametrize("work", WAITS)
    @pytest.mark.parametrize("threads", [0, 1])
    def test_an_interrupted_wait(self, victims: StartVictim, work: str, threads: int) -> None:
        victim = victims("idle", work=work, threads=threads)
        assert victim.check()
        for _ in range(20):
            os.kill(victim.pid, signal.SIGUSR1)
            while has_pending_signal(victim.pid):  # a command sent before would end a pipe's wait
                time.sleep(0.001)
            victim.await_rounds(1)
            if victim.errors():
                break
        assert victim.errors().keys() == {"eintr"}
        assert not victim.check()

    @pytest.mark.parametrize("group", ["general", "flags", "vector", "x87"])
    def test_a_changed_register(self, victims: StartVictim, group: str) -> None:
        victim = victims("idle", work="compute")
        with stopped_while_spinning(victim):
            change_register(victim.pid, group)
        victim.await_rounds(1)
        assert victim.errors() == {"registers": 1}

    def test_a_death_is_not_taken_for_an_answer(self, victims: StartVictim) -> None:
        victim = victims()
        os.kill(victim.pid, signal.SIGSEGV)
        with pytest.raises(VictimError, match="exit code -11"):
            victim.command("sum")

    def test_a_forbidden_call_kills_the_confined(self, victims: StartVictim) -> None:
        victim = victims("seccomp", threads=0, work="none")
        inject_getpid(victim.pid)
        with pytest.raises(VictimError, match=f"exit code -{int(signal.SIGSYS)}"):
            victim.command("sum")


def test_a_full_descriptor_table_has_the_room_that_was_asked_for(victims: StartVictim) -> None:
    victim = victims(spare_fds=3)
    limits = Path(f"/proc/{victim.pid}/limits").read_text()
    limit = int(limits.partition("Max open files")[2].split()[0])
    assert limit - len(list(Path(f"/proc/{victim.pid}/fd").iterdir())) == 3


@pytest.mark.root
def test_confined_victims_are_another_user_in_namespaces_of_their_own(
    victims: StartVictim,
) -> None:
    victim = victims("namespaces", uid=65534)
    status = Path(f"/proc/{victim.pid}/status").read_text()
    assert "Uid:\t65534\t65534\t65534\t65534" in status
    for name in ("pid", "mnt", "net"):
        ours, its = (Path(f"/proc/{who}/ns/{name}").readlink() for who in ("self", victim.pid))
        assert ours != its
    assert not Path(f"/proc/{victim.pid}/root/proc/self").exists()


def test_a_stopped_victim_leaves_nothing(victims: StartVictim) -> None:
    victim = victims("all")
    assert victim.stop() == -signal.SIGKILL
    assert not Path(f"/proc/{victim.pid}").exists()


def test_quit_ends_a_victim_well(victims: StartVictim) -> None:
    victim = victims("writers")
    victim.begin("quit")
    with pytest.raises(VictimError, match="exit code 0"):
        victim.finish()


def test_an_unknown_command_is_an_error(victims: StartVictim) -> None:
    victim = victims()
    for command in ("nonsense", "read 256", "dontneed 255 2", "write"):
        with pytest.raises(VictimError):
            victim.command(command)
    assert victim.check()


# A tracer of a few lines: the package's own is what these victims will test.

_GETREGS, _SETREGS, _GETFPREGS, _SETFPREGS, _ATTACH, _DETACH = 12, 13, 14, 15, 16, 17
_RBX, _ORIG_RAX, _RAX, _RIP, _FLAGS = 5, 15, 10, 16, 18  # in struct user_regs_struct
_ptrace = ctypes.CDLL(None, use_errno=True).ptrace
_ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_ptrace.restype = ctypes.c_long


def ptrace(request: int, pid: int, data: Any = None) -> None:
    if _ptrace(request, pid, None, data):
        raise OSError(ctypes.get_errno(), f"ptrace {request}")


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    ptrace(_ATTACH, pid)
    os.waitpid(pid, 0)
    try:
        yield
    finally:
        ptrace(_DETACH, pid)


@contextmanager
def stopped_while_spinning(victim: Victim) -> Iterator[None]:
    """Stop the victim's only thread where nothing but its registers is at work."""
    spin = victim.ask("addr")
    while True:
        with stopped(victim.pid):
            if spin["spin"] <= registers(victim.pid)[_RIP] < spin["spin_end"]:
                yield
                return


def registers(pid: int) -> list[int]:
    held = ctypes.create_string_buffer(27 * 8)
    ptrace(_GETREGS, pid, held)
    return list(struct.unpack("27Q", held.raw))


def set_registers(pid: int, values: list[int]) -> None:
    ptrace(_SETREGS, pid, ctypes.create_string_buffer(struct.pack("27Q", *values), 27 * 8))


def change_register(pid: int, group: str) -> None:
    if group in {"general", "flags"}:
        values = registers(pid)
        values[_RBX if group == "general" else _FLAGS] ^= 1
        set_registers(pid, values)
        return
    held = ctypes.create_string_buffer(512)  # as fxsave lays it out
    ptrace(_GETFPREGS, pid, held)
    at = 160 + 5 * 16 if group == "vector" else 32 + 3 * 16
    held[at] = bytes([held.raw[at] ^ 1])
    ptrace(_SETFPREGS, pid, held)


def inject_getpid(pid: int) -> None:
    """Let the system call be getpid that the thread makes when its read of a command goes on."""
    while True:
        with stopped(pid):
            values = registers(pid)
            if values[_ORIG_RAX] == 0:
                values[_RIP] -= 2  # back on the syscall instruction
                values[_RAX], values[_ORIG_RAX] = 39, (1 << 64) - 1
                set_registers(pid, values)
                return
