"""Signals come through windows once, in order and with what they carry."""

# ruff: noqa: F401, F811  (fixtures are imported by their names)

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import random
import signal
import threading
import time

import pytest
from remap_lab import (
    Lab,
    StartProgram,
    lab,
    programs,
    says,
    signals,
)
from test_remap_stops import PATIENCE, Program, StartMode, Windows, start

from ksmd.kernel import procfs
from ksmd.model.refusal import Reason

pytestmark = pytest.mark.root

_libc = ctypes.CDLL(None, use_errno=True)
_libc.sigqueue.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p]

#: SIGTRAP, SIGURG, SIGWINCH each: d default, i ignored, b blocked, c caught.
DISPOSITIONS = ["ddd", "iii", "bbb", "ccc", *map("".join, itertools.permutations("ibc")), "dbd"]


def queue(pid: int, number: int, value: int) -> None:
    """sigqueue(3); where the queue is full, wait for room."""
    while _libc.sigqueue(pid, number, value):
        assert ctypes.get_errno() == errno.EAGAIN
        time.sleep(0.001)


def state(pid: int) -> str:
    return procfs.task_stat(pid, pid).state


def reach_state(pid: int, wanted: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while state(pid) != wanted:
        assert time.monotonic() < deadline, f"state {state(pid)}, not {wanted}"
        time.sleep(0.001)


def test_queued_signals_arrive_once_in_order_with_their_payload(lab: Lab, start: StartMode) -> None:
    program = start("queue", "ddd")
    windows = Windows(lab, program)
    count = 3000
    sent = threading.Event()

    def send() -> None:
        for value in range(count):
            queue(program.pid, signal.SIGRTMIN, value)
            if value % 50 == 49:
                time.sleep(0.002)
        sent.set()

    sender = threading.Thread(target=send)
    sender.start()
    while not sent.is_set():
        result = windows.one()
        assert result.refused in (None, Reason.NO_THREAD), says(result)
    sender.join()
    deadline = time.monotonic() + PATIENCE
    while (seen := program.numbers("report"))[0] < count:
        assert time.monotonic() < deadline, f"{seen[0]} of {count} arrived"
    assert seen == [count, 0]
    print(f"\n{dict(windows.tally)}")
    assert windows.tally["merge"] > 5, "the windows proved nothing"


@pytest.mark.parametrize("dispositions", DISPOSITIONS)
def test_dispositions_and_masks_stay_and_blocked_signals_wait(
    lab: Lab, start: StartMode, dispositions: str
) -> None:
    program = start("queue", dispositions)
    windows = Windows(lab, program)
    blocked = [
        number
        for number, how in zip(
            (signal.SIGTRAP, signal.SIGURG, signal.SIGWINCH), dispositions, strict=True
        )
        if how == "b"
    ]
    for number in blocked:
        os.kill(program.pid, number)
    before = signals(program.pid)
    for _ in range(4):
        result = windows.one()
        assert result.refused is None, says(result)
        assert signals(program.pid) == before
    for number in blocked:
        assert program.numbers(f"take {int(number)}") == [number]
        assert program.numbers(f"take {int(number)}") == [-1], "it was delivered twice"


def test_blocked_signal_that_comes_in_the_middle_of_a_window_is_not_swallowed(
    lab: Lab, start: StartMode
) -> None:
    # SIGURG marks the stub's progress, and the program waits for one of its own by sigtimedwait
    program = start("queue", "dbd")
    windows = Windows(lab, program)
    chance = random.Random(1)
    for _ in range(150):
        delay = chance.uniform(0, 0.003)
        sender = threading.Timer(delay, os.kill, (program.pid, signal.SIGURG))
        sender.start()
        result = windows.one()
        assert result.refused is None, says(result)
        sender.join()
        assert program.numbers(f"take {int(signal.SIGURG)}") == [signal.SIGURG]
        assert program.numbers(f"take {int(signal.SIGURG)}") == [-1]


def test_stopped_job_stays_stopped_and_can_be_continued(lab: Lab, start: StartMode) -> None:
    program = start("queue", "ddd")
    windows = Windows(lab, program)
    os.kill(program.pid, signal.SIGSTOP)
    reach_state(program.pid, "T")
    for _ in range(6):
        assert windows.one().refused is None
        reach_state(program.pid, "T")
    os.kill(program.pid, signal.SIGCONT)
    assert program.numbers("report") == [0, 0]


def test_stop_that_comes_in_the_middle_of_a_window_takes_effect_after_it(
    lab: Lab, start: StartMode
) -> None:
    program = start("queue", "ddd")
    windows = Windows(lab, program)
    chance = random.Random(2)
    for _ in range(100):
        sender = threading.Timer(chance.uniform(0, 0.003), os.kill, (program.pid, signal.SIGSTOP))
        sender.start()
        result = windows.one()
        assert result.refused in (None, Reason.NO_THREAD), says(result)
        sender.join()
        reach_state(program.pid, "T")
        os.kill(program.pid, signal.SIGCONT)
        assert program.numbers("report") == [0, 0]


def test_death_in_the_middle_of_a_window_is_the_programs_own(
    lab: Lab, programs: StartProgram
) -> None:
    chance = random.Random(3)
    for _ in range(8):
        program = Program(programs("stops", "queue", "ddd"))
        windows = Windows(lab, program)
        killer = threading.Timer(chance.uniform(0, 0.006), os.kill, (program.pid, signal.SIGTERM))
        killer.start()
        while (result := windows.one()).refused is None:
            pass
        killer.join()
        ended = (Reason.GONE, Reason.NO_THREAD, Reason.ZOMBIE)
        assert result.refused in ended or result.lost, says(result)
        assert program.process.wait(PATIENCE) == -signal.SIGTERM
    # the engine goes on with others
    assert Windows(lab, Program(programs("stops", "queue", "ddd"))).one().refused is None
