"""The tracer may be killed at any instruction: every target goes on, right and with nothing left.

Victims do one thing each, in the thread that the windows borrow, and notice what is done to it.
KSMD_SOAK_KILLS is the number of random kills over all modes. What a death may cost is counted and
printed (pytest -s, or -rP): how late waits ended, and calls that ended by EINTR.
"""

# ruff: noqa: F401, F811  (fixtures are imported by their names)

from __future__ import annotations

import contextlib
import mmap
import os
import random
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from remap_lab import (
    PASSING,
    Lab,
    StartProgram,
    UseTracer,
    content,
    descriptors,
    faulty_tracer,
    lab,
    programs,
    says,
    scratch_left,
)
from victims import Victim

from ksmd.kernel import procfs
from ksmd.model.errors import TargetGoneError
from ksmd.model.refusal import Reason
from ksmd.model.units import PAGE_SHIFT, PAGE_SIZE
from ksmd.model.window import Op, Record, WindowResult

pytestmark = pytest.mark.root

MODES = "compute tiles nanosleep epoll futex pipe poll storm churn write drop".split()
KILLS = int(os.environ.get("KSMD_SOAK_KILLS", "100"))
PATIENCE = 30.0

ARENA = 0x510000000000
PAGES = 96


def arena_content() -> bytes:
    first = 0xA000000000000000
    return struct.pack(f"={PAGES * 512}Q", *range(first, first + PAGES * 512))


class Endurer:
    """One victim of endure.c, the store that it is merged with, and what it noticed."""

    ROUNDS, WRONG, EINTRS, LATEST_US, LAST, READY = range(6)

    def __init__(self, lab: Lab, start: StartProgram, mode: str) -> None:
        self.lab = lab
        self.mode = mode
        self.random = random.Random(mode)
        self.tally: Counter[str] = Counter()
        self._control = os.memfd_create("endure-control")
        os.ftruncate(self._control, PAGE_SIZE)
        self._words = mmap.mmap(self._control, PAGE_SIZE)
        arguments = ("endure", str(self._control), mode, str(PAGES))
        self.process = start(*arguments, pass_fds=(self._control,))
        self.pid: int = self.process.pid
        self.wait_for(self.READY, 1)
        self.extent = lab.extent(arena_content())
        self.subject = lab.adopt(self.pid)
        self.descriptors = descriptors(self.pid)

    def close(self) -> None:
        self._words.close()
        os.close(self._control)

    def word(self, index: int) -> int:
        return int(struct.unpack_from("=Q", self._words, index * 8)[0])

    def wait_for(self, index: int, value: int) -> None:
        """Wait until a word has grown to *value*; a death or a hang ends the test."""
        deadline = time.monotonic() + PATIENCE
        while self.word(index) < value:
            code = self.process.poll()
            assert code is None, f"{self.mode}: the victim died: {code}"
            assert time.monotonic() < deadline, f"{self.mode}: the victim hangs {self.where()}"
            time.sleep(0.0005)

    def where(self) -> str:
        tasks = procfs.tasks(self.pid)
        calls = {tid: procfs.read_process(self.pid, f"task/{tid}/syscall") for tid in tasks}
        return f"{calls} {scratch_left(self.pid)}"

    def records(self) -> list[Record]:
        """Runs to merge where pages are anonymous, else runs to unmerge."""
        vmas = [vma for vma in procfs.maps(self.pid) if ARENA <= vma.start < ARENA + (PAGES << 12)]
        anonymous = [vma for vma in vmas if vma.inode != self.extent.inode]
        found = []
        for vma in anonymous or vmas:
            at = vma.start
            while at < vma.end:
                length = min(self.random.choice((1, 2, 6)) << PAGE_SHIFT, vma.end - at)
                op = Op.MERGE if anonymous else Op.UNMERGE
                found.append(Record(op, at, length, at - ARENA))
                at += length
        return found

    def window(self) -> WindowResult:
        result = self.lab.window(self.subject, self.records(), self.extent)
        self.tally["windows"] += 1
        for outcome in result.outcomes:
            if outcome.reason is None:
                self.tally[outcome.record.op.name.lower()] += outcome.record.length >> PAGE_SHIFT
        assert result.refused is not Reason.POISONED, says(result)
        return result

    def must_be_well(self) -> None:
        """It goes on, nothing was wrong, and nothing of the stub is left."""
        rounds = self.word(self.ROUNDS)
        self.wait_for(self.ROUNDS, rounds + 3)
        deadline = time.monotonic() + PATIENCE
        while (left := self.left()) and time.monotonic() < deadline:
            time.sleep(0.001)
        assert not left, f"{self.mode}: left behind: {left}"
        assert not self.word(self.WRONG), f"{self.mode}: wrong results, last {self.word(self.LAST)}"

    def left(self) -> list[str]:
        extra = {n: d for n, d in descriptors(self.pid).items() if self.descriptors.get(n) != d}
        return scratch_left(self.pid) + [f"fd {number}: {what}" for number, what in extra.items()]

    def arena_is_right(self) -> None:
        """For those that do not change it."""
        if self.mode not in ("write", "drop"):
            assert content(self.pid, ARENA, PAGES) == arena_content()

    def figures(self) -> str:
        return (
            f"{self.mode}: {dict(self.tally)} rounds {self.word(self.ROUNDS)} wrong"
            f" {self.word(self.WRONG)} EINTR {self.word(self.EINTRS)} latest"
            f" {self.word(self.LATEST_US) / 1000:.1f} ms"
        )


@pytest.fixture
def endurer(request: pytest.FixtureRequest, lab: Lab, programs: StartProgram) -> Iterator[Endurer]:
    endurer = Endurer(lab, programs, request.param)
    yield endurer
    endurer.close()


def _kill_later(pid: int, seconds: float) -> threading.Thread:
    def kill() -> None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    return thread


@pytest.mark.parametrize("endurer", MODES, indirect=True)
def test_target_endures_the_death_of_its_tracer_at_any_time(endurer: Endurer) -> None:
    engine = endurer.lab.engine
    for _ in range(max(1, KILLS // len(MODES))):
        endurer.window()  # starts the tracer
        tracer = engine.pid
        # windows follow each other without a pause: most of these times lie in one
        killer = _kill_later(tracer, endurer.random.uniform(0, 0.012))
        while engine.pid == tracer:
            endurer.tally["killed in a window"] += endurer.window().refused is Reason.WINDOW_FAILED
        killer.join()
        endurer.tally["kills"] += 1
        endurer.must_be_well()
    while (result := endurer.window()).refused is not None:
        assert result.refused in PASSING, says(result)
    endurer.must_be_well()
    endurer.arena_is_right()
    print(f"\n{endurer.figures()}")
    assert endurer.tally["merge"], "the kills proved nothing"
    assert endurer.tally["unmerge"], "the kills proved nothing"


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("endurer", ["storm", "nanosleep"], indirect=True)
def test_target_endures_the_death_of_its_tracer_at_every_ptrace_request(
    endurer: Endurer, when: str, faulty_tracer: UseTracer
) -> None:
    engine = endurer.lab.engine
    for step in range(1, 200):
        faulty_tracer(at=step, when=when)
        engine.close()
        while (result := endurer.window()).refused in PASSING:
            engine.close()  # count from the start
        endurer.must_be_well()
        if result.refused is None:
            break
        assert result.lost, says(result)
        endurer.tally["kills"] += 1
    endurer.arena_is_right()
    print(f"\n{endurer.figures()}")
    assert endurer.tally["kills"] > 20, "the window made fewer requests than it can"


#: A daemon that does nothing but stop somebody, over and over.
STOPPER = """
import os, sys
from ksmd.kernel import procfs
from ksmd.remap.engine import Engine, RefusedTargetError
engine, target = Engine(), procfs.target_id(int(sys.argv[1]))
engine.begin()
engine.start()
print(engine.pid, flush=True)
while True:
    try:
        engine.check(target, 500)
    except RefusedTargetError:
        pass
"""


def test_the_death_of_the_daemon_leaves_its_tracer_time_to_mend_who_has_stopped() -> None:
    """The tracer ends with it, but not between a thread's stop and its mending: that is EINTR."""
    chance = random.Random(1)
    stops = 0
    with Victim("epoll", threads=30, pages=16) as victim:
        for _ in range(15):
            with subprocess.Popen(
                [sys.executable, "-P", "-c", STOPPER, str(victim.pid)],
                stdout=subprocess.PIPE,
                text=True,
            ) as daemon:
                assert daemon.stdout is not None
                tracer = os.pidfd_open(int(daemon.stdout.readline()))
                time.sleep(0.02 + chance.uniform(0, 0.02))
                stops += procfs.status_fields(victim.pid)["TracerPid"] != "0"
                daemon.kill()
                assert select.select([tracer], [], [], 10)[0], "the tracer outlives the daemon"
                os.close(tracer)
            assert procfs.status_fields(victim.pid)["TracerPid"] == "0"
        errors = victim.errors()
    print(f"\n15 kills, {stops} of them in a stop; {errors}")
    assert not errors
    assert stops > 3


def _frozen_in_a_window(endurer: Endurer) -> int:
    """Stop the tracer (as a job) while every thread of the target stands still; its pid."""
    while True:
        tracer = endurer.lab.engine.pid
        while procfs.status_fields(endurer.pid)["TracerPid"] == "0":
            time.sleep(0.0002)
        os.kill(tracer, signal.SIGSTOP)
        time.sleep(0.02)  # the stub, where it runs, comes to a marker
        rounds = endurer.word(endurer.ROUNDS)
        time.sleep(0.005)
        if rounds == endurer.word(endurer.ROUNDS):
            return tracer
        os.kill(tracer, signal.SIGCONT)


def _windows_until_lost(endurer: Endurer) -> None:
    while not endurer.window().lost:
        pass


@pytest.mark.parametrize("endurer", ["write"], indirect=True)
def test_the_word_says_dead_before_a_thread_runs(endurer: Endurer) -> None:
    """Until then the stub must have ended its record: see alive.py."""
    gaps = []
    for _ in range(7):
        endurer.window()  # starts the tracer
        worker = threading.Thread(target=_windows_until_lost, args=(endurer,))
        worker.start()
        tracer = _frozen_in_a_window(endurer)
        links = descriptors(tracer).items()
        number = next(number for number, link in links if link.startswith("/memfd:ksmd-alive"))
        with Path(f"/proc/{tracer}/fd/{number}").open("rb") as file:
            word = mmap.mmap(file.fileno(), PAGE_SIZE, prot=mmap.PROT_READ)
        rounds = endurer.word(endurer.ROUNDS)
        os.kill(tracer, signal.SIGKILL)
        runs = False
        while not word[3] & 0x40:  # FUTEX_OWNER_DIED
            assert not runs, "a thread runs while it says alive"
            runs = endurer.word(endurer.ROUNDS) != rounds
        began = time.perf_counter()
        while endurer.word(endurer.ROUNDS) == rounds:
            pass
        gaps.append(time.perf_counter() - began)
        worker.join()
        word.close()
        endurer.must_be_well()
    gaps.sort()
    print(f"\nfrom the mark to the first thread: {[round(gap * 1000, 1) for gap in gaps]} ms")


def test_target_killed_at_any_time_is_gone_for_its_parent_at_once(
    lab: Lab, programs: StartProgram
) -> None:
    # a tracer that does not wait for a dead tracee keeps its parent waiting for ever
    source, tracers = random.Random(7), set()
    for number in range(60):
        endurer = Endurer(lab, programs, ("storm", "nanosleep")[number % 2])
        killer = _kill_later(endurer.pid, source.uniform(0, 0.012))
        with contextlib.suppress(TargetGoneError):  # seen before the window was opened
            while (result := endurer.window()).refused is not Reason.GONE:
                assert result.refused is None or result.refused in PASSING, says(result)
        killer.join()
        assert endurer.process.wait(PATIENCE) == -signal.SIGKILL
        endurer.close()
        tracers.add(lab.engine.pid)
    assert len(tracers) < 10, "the tracer gives itself up for every target that is killed"
