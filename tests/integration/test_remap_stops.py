"""Programs that are hard to stop: they are refused by name, or go on as if nothing had been."""

# ruff: noqa: F401, F811  (fixtures are imported by their names)

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from remap_lab import (
    Lab,
    StartProgram,
    Subject,
    UseTracer,
    done,
    faulty_tracer,
    lab,
    programs,
    run,
    says,
    signals,
    snapshot,
)

from ksmd.daemon.prepare import refuse_early
from ksmd.kernel import procfs, ptrace
from ksmd.kernel.memfd import ExtentMap
from ksmd.kernel.memory import Memory
from ksmd.kernel.vmaquery import VmaQuery
from ksmd.model.refusal import Reason
from ksmd.model.window import Op, WindowResult
from ksmd.remap import gadgets, places
from ksmd.remap.engine import RefusedTargetError
from ksmd.remap.stop import RefusedError

pytestmark = pytest.mark.root

ARENA = 0x510000000000
PAGES = 64
PATIENCE = 30.0


class Program:
    """One program of stops.c."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.pid = process.pid
        self.ready = self.line()
        assert self.ready.startswith("ready")

    def line(self) -> str:
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, f"the program died: {self.process.wait()}"
        return line.strip()

    def ask(self, text: str) -> str:
        assert self.process.stdin
        self.process.stdin.write(f"{text}\n")
        return self.line()

    def numbers(self, text: str) -> list[int]:
        return [int(number) for number in re.findall(r"-?\d+", self.ask(text))]

    def await_its_threads(self) -> None:
        """Wait until the one that vforks has: a thread begins with all signals blocked."""
        deadline = time.monotonic() + PATIENCE
        while not self.numbers("report")[0]:
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def untraced(self) -> None:
        """Wait until nobody traces any of its threads."""
        deadline = time.monotonic() + PATIENCE
        while any(thread["TracerPid"] != "0" for thread in signals(self.pid).values()):
            assert time.monotonic() < deadline
            time.sleep(0.001)


StartMode = Callable[..., Program]


@pytest.fixture
def start(programs: StartProgram) -> StartMode:
    return lambda *arguments, **more: Program(programs("stops", *arguments, **more))


class Windows:
    """Windows over the arena: merged and given back in turns, until told otherwise."""

    def __init__(self, lab: Lab, program: Program) -> None:
        self.lab = lab
        self.subject: Subject = lab.adopt(program.pid)
        self.extent: ExtentMap = lab.extent_like(program.pid, ARENA, PAGES)
        self.tally: Counter[str] = Counter()
        self._op = Op.MERGE

    def one(self, first: int = 0, npages: int = PAGES, **more: Any) -> WindowResult:
        result = self.lab.window(
            self.subject, [run(self._op, ARENA, first, npages)], self.extent, **more
        )
        self.tally[str(result.refused or self._op.name.lower())] += 1
        if result.refused is None:
            assert done(result), says(result)
            self._op = Op.UNMERGE if self._op is Op.MERGE else Op.MERGE
        return result


def refusal(lab: Lab, pid: int) -> Reason | None:
    """What the daemon would say of a process before it touches it."""
    target: Any = SimpleNamespace(
        pid=pid, id=procfs.target_id(pid), selected=SimpleNamespace(accept_seccomp_risk=False)
    )
    try:
        refuse_early(target, lab.engine, 1000)
    except RefusedTargetError as error:
        return error.reason
    return None


# ---------------------------------------------------------------- restartable sequences


def test_restartable_sequences_are_never_cut(lab: Lab, start: StartMode) -> None:
    program = start("rseq")
    windows = Windows(lab, program)
    end = time.monotonic() + 4
    while time.monotonic() < end:
        windows.one()
        time.sleep(0.001)
    os.kill(program.pid, signal.SIGUSR1)
    made, held = map(int, re.findall(r"\d+", program.line()))
    print(f"\n{dict(windows.tally)} increments {made}")
    assert made == held
    assert windows.tally["merge"] > 10, "the windows proved nothing"
    assert set(windows.tally) <= {"merge", "unmerge", str(Reason.NO_THREAD)}


@pytest.mark.parametrize("alone", [False, True], ids=["among others", "alone"])
def test_sequence_area_in_a_merged_page_does_not_hang_its_thread(
    lab: Lab, start: StartMode, alone: bool
) -> None:
    tunables = {**os.environ, "GLIBC_TUNABLES": "glibc.pthread.rseq=0"}
    program = start("myrseq", *(["alone"] if alone else []), env=tunables)
    windows = Windows(lab, program)
    assert windows.one().refused is None
    assert program.ask("register") == "cpu 1"  # the kernel writes there from now on
    result = windows.one()
    if alone:  # there is no other thread to do the work
        assert result.refused is Reason.NO_THREAD, says(result)
        assert windows.one(0, 9).refused is None, "the pages before it can go back"
        windows._op = Op.UNMERGE
        assert windows.one(10, PAGES - 10).refused is None, "and those behind it"
    else:
        assert result.refused is None, says(result)
        result = lab.window(windows.subject, [run(Op.MERGE, ARENA, 4, 12)], windows.extent)
        assert [o.reason for o in result.outcomes] == [Reason.RSEQ], says(result)
    assert program.ask("look") == "cpu 1"


# ---------------------------------------------------------------- threads that do not stop


def test_vfork_parent_is_given_up_and_goes_on(lab: Lab, start: StartMode) -> None:
    program = start("vfork", "30")
    windows = Windows(lab, program)
    details = set()
    for _ in range(60):
        result = windows.one(deadline_ms=5)
        if result.refused is not None:
            assert result.refused is Reason.UNSTOPPABLE, says(result)
            details.add(bool(result.detail))
        time.sleep(0.002)
    program.untraced()
    before = program.numbers("report")[0]
    deadline = time.monotonic() + PATIENCE
    while program.numbers("report")[0] < before + 5:
        assert time.monotonic() < deadline, "the program stands still"
        time.sleep(0.01)
    print(f"\n{dict(windows.tally)}")
    assert windows.tally["unstoppable"] > 10, "no window met a vfork"


@pytest.mark.parametrize("arguments", [("vfork", "3000"), ("disk",)], ids=lambda a: a[0])
def test_thread_that_does_not_stop_is_given_up_at_the_deadline(
    lab: Lab, start: StartMode, faulty_tracer: UseTracer, arguments: tuple[str, ...]
) -> None:
    # the tracer looks at the states first; blind for them, it runs into the thread itself
    program = start(*arguments)
    target = procfs.target_id(program.pid)
    program.await_its_threads()
    before = signals(program.pid)
    for blind in (False, True):
        if blind:
            lab.engine.close()
            faulty_tracer(blind="states")
        for _ in range(3):
            with pytest.raises(RefusedTargetError) as error:
                lab.engine.setup(target, 50)
            assert error.value.reason is Reason.UNSTOPPABLE
            if arguments[0] == "vfork":  # of the other one nothing is to be seen from outside
                assert bool(error.value.detail) is not blind
            program.untraced()
            assert program.numbers("report"), "the other threads stand still"
    assert signals(program.pid) == before


def test_thread_that_stops_late_costs_no_tracer_and_everybody_goes_on(
    lab: Lab, start: StartMode, faulty_tracer: UseTracer
) -> None:
    program = start("vfork", "80")
    target = procfs.target_id(program.pid)
    lab.engine.close()
    faulty_tracer(blind="states")
    tracer, refused = 0, []
    program.await_its_threads()
    before = signals(program.pid)
    for _ in range(40):
        try:
            lab.engine.check(target, 5)
        except RefusedTargetError as error:
            refused.append((error.reason, error.lost))
        tracer = tracer or lab.engine.pid
        assert lab.engine.pid == tracer, "the tracer left for a thread that only was late"
        program.untraced()
        assert program.numbers("report"), "the other threads stand still"
    assert set(refused) == {(Reason.UNSTOPPABLE, False)}
    assert len(refused) > 10, "hardly a stop met a vfork"
    assert signals(program.pid) == before


# ---------------------------------------------------------------- odd processes


def test_process_whose_first_thread_has_ended_is_merged_like_any_other(
    lab: Lab, start: StartMode
) -> None:
    program = start("leader")
    assert procfs.task_stat(program.pid, program.pid).state == "Z"
    # nor does a stop that lays nothing down touch the end of its stack, which only we may have done
    lab.engine.check(procfs.target_id(program.pid), 50)
    windows = Windows(lab, program)
    for _ in range(6):
        assert windows.one().refused is None
        assert program.ask("check") == "right"
    assert refusal(lab, program.pid) is None


def test_memory_shared_outside_the_thread_group_is_refused(
    lab: Lab, start: StartMode, programs: StartProgram
) -> None:
    program = start("sharer")
    other = int(program.ready.split()[1])
    before = snapshot(program.pid)
    assert refusal(lab, program.pid) is Reason.SHARED_MM
    assert refusal(lab, other) is Reason.SHARED_MM
    assert snapshot(program.pid) == before
    os.kill(other, signal.SIGKILL)


def test_traced_process_is_refused_and_stays_with_its_tracer(lab: Lab, start: StartMode) -> None:
    program = start("queue", "ddd")
    target = procfs.target_id(program.pid)
    ptrace.seize(program.pid)
    try:
        assert refusal(lab, program.pid) is Reason.TRACED
        with pytest.raises(RefusedTargetError) as error:
            lab.engine.setup(target, 1000)
        assert error.value.reason is Reason.TRACED
        assert signals(program.pid)[program.pid]["TracerPid"] == str(os.getpid())
    finally:
        ptrace.interrupt(program.pid)
        os.waitpid(program.pid, 0x40000000)
        ptrace.detach(program.pid)
    assert refusal(lab, program.pid) is None
    assert Windows(lab, program).one().refused is None


@pytest.fixture(params=["v1", "v2"])
def freezer(request: pytest.FixtureRequest) -> Iterator[tuple[Path, str, str, str]]:
    """A cgroup of our own: its folder, the file that freezes it, and what to write to it."""
    mounts = Path("/proc/self/mounts").read_text()
    kind = r"cgroup2 (\S+) cgroup2" if request.param == "v2" else r"cgroup (\S+) cgroup \S*freezer"
    found = re.search(kind, mounts)
    if found is None:
        pytest.skip(f"no freezer of cgroup {request.param} here")
    folder = Path(found[1]) / f"ksmd-remap-stops-{os.getpid()}"
    folder.mkdir()
    v1, v2 = ("freezer.state", "FROZEN", "THAWED"), ("cgroup.freeze", "1", "0")
    names = v2 if request.param == "v2" else v1
    yield folder, *names
    (folder / names[0]).write_text(names[2])
    for pid in (folder / "cgroup.procs").read_text().split():
        (folder.parent / "cgroup.procs").write_text(pid)
    folder.rmdir()


def test_frozen_process_is_refused_stays_frozen_and_thaws(
    lab: Lab, start: StartMode, freezer: tuple[Path, str, str, str]
) -> None:
    folder, name, freeze, thaw = freezer
    program = start("queue", "ddd")
    windows = Windows(lab, program)
    before = signals(program.pid)
    (folder / "cgroup.procs").write_text(str(program.pid))
    assert refusal(lab, program.pid) is None
    (folder / name).write_text(freeze)
    deadline = time.monotonic() + PATIENCE
    while refusal(lab, program.pid) is not Reason.FROZEN:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    # a window that is tried all the same is given up: by the deadline, or by the tracer's end
    result = windows.one(deadline_ms=100)
    assert result.refused is Reason.UNSTOPPABLE or result.lost, says(result)
    program.untraced()
    assert refusal(lab, program.pid) is Reason.FROZEN
    (folder / name).write_text(thaw)
    assert program.numbers("report") == [0, 0]
    assert signals(program.pid) == before
    while windows.one().refused is not None:
        assert time.monotonic() < deadline
    assert program.numbers("report") == [0, 0]


def test_32_bit_program_is_refused_by_name(lab: Lab, programs: StartProgram) -> None:
    options = ("-m32", "-static", "-nostdlib", "-ffreestanding", "-fno-pie", "-no-pie",
               "-fno-stack-protector", "-fcf-protection=none", "-Wno-unused-result")  # fmt: skip
    process = programs("i386", options=options)
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    before = snapshot(process.pid)
    assert refusal(lab, process.pid) is Reason.ARCHITECTURE
    with pytest.raises(RefusedTargetError) as error:  # nor does the tracer itself touch it
        lab.engine.setup(procfs.target_id(process.pid), 1000)
    assert error.value.reason in (Reason.ARCHITECTURE, Reason.NO_GADGET)
    assert process.poll() is None
    assert snapshot(process.pid) == before


def test_what_can_be_searched_before_the_stop_is_not_searched_in_it(
    start: StartMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program with a hundred MiB of libraries stood still for a tenth of a second."""
    process = start("queue")
    searched: list[int] = []
    search = gadgets._search

    def searching(memory: Memory, start: int, length: int) -> tuple[int, int]:
        searched.append(start)
        return search(memory, start, length)

    monkeypatch.setattr(gadgets, "_search", searching)
    monkeypatch.setattr(gadgets, "_cache", {})
    target = procfs.target_id(process.pid)
    places.look_ahead(dataclasses.replace(target, start_time=1))  # another process had that pid
    assert not searched
    places.look_ahead(target)
    assert len(searched) == 1, "the C library has both, and comes first"
    with Memory(process.pid) as memory, VmaQuery(process.pid, memory.tid) as query:
        found, stack = places.find(memory, query)
        libc = query.covering(found.restorer)
    assert len(searched) == 1
    assert libc is not None
    assert libc.start == searched[0]
    assert stack.perms.startswith("rw")
    places.look_ahead(target)
    places.forget(process.pid)
    monkeypatch.setattr(gadgets, "_RESTORERS", (b"nothing is like this",))
    monkeypatch.setattr(gadgets, "_cache", {})
    places.look_ahead(target)  # what hinders is told by the window
    with (
        Memory(process.pid) as memory,
        VmaQuery(process.pid, memory.tid) as query,
        pytest.raises(RefusedError, match="no-gadget"),
    ):
        places.find(memory, query)
