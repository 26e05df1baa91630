"""How long a process is waited for that has something to do, that sleeps, and that gets no turn."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from ksmd.kernel import channel, procfs
from ksmd.kernel import patience as patience_module
from ksmd.kernel.patience import Patience

SECONDS = 0.5
CODE = """
import socket, sys, time
end = socket.socket(fileno=int(sys.argv[1]))
end.recv(1)
spent = time.process_time()
while time.process_time() - spent < float(sys.argv[2]):
    pass
time.sleep(float(sys.argv[3]))
end.send(bytes([2, 0, 0, 0]) + b"{}")
end.recv(1)
"""


class Worker:
    """A process that answers after so many seconds of work and of sleep, on one processor."""

    def __init__(self, work: float, sleep: float, processor: int) -> None:
        self.end, its = channel.pair()
        with its:
            command = [sys.executable, "-c", CODE, str(its.fileno()), str(work), str(sleep)]
            self._process = subprocess.Popen(command, pass_fds=[its.fileno()])
        self.pid = self._process.pid
        os.sched_setaffinity(self.pid, {processor})

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self.end.close()


@pytest.fixture
def processor() -> int:
    return max(os.sched_getaffinity(0))


@pytest.fixture
def crowd(processor: int) -> Iterator[None]:
    """Six that spin on the processor, with whom ours has to share it."""
    code = "while True: pass"
    spinning = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(6)]
    try:
        for one in spinning:
            os.sched_setaffinity(one.pid, {processor})
        yield
    finally:
        for one in spinning:
            one.kill()
            one.wait()


def answer(work: float, sleep: float, processor: int) -> float:
    """Give the seconds until its answer; TimeoutError when it was not waited for so long."""
    worker = Worker(work, sleep, processor)
    try:
        time.sleep(0.5)  # it has loaded, as far as it comes to it
        worker.end.send(b"x")
        began = time.monotonic()
        Patience(SECONDS, worker.pid).receive(worker.end)
        return time.monotonic() - began
    finally:
        worker.close()


def test_who_answers_in_time_is_heard(processor):
    answer(0.0, SECONDS / 2, processor)


@pytest.mark.parametrize(("work", "sleep"), [(0.0, 30.0), (30.0, 0.0)], ids=["sleeps", "spins"])
def test_who_has_had_his_time_is_given_up(work, sleep, processor):
    with pytest.raises(TimeoutError):
        answer(work, sleep, processor)


def test_who_stands_in_line_for_a_processor_is_waited_for(processor, crowd):
    print(f"{answer(SECONDS * 0.6, 0.0, processor):.1f} s, of which {SECONDS} are his")


def test_who_is_stopped_does_not_stand_in_line(processor):
    worker = Worker(0.0, 0.0, processor)
    try:
        time.sleep(0.5)
        os.kill(worker.pid, signal.SIGSTOP)
        worker.end.send(b"x")
        with pytest.raises(TimeoutError):
            Patience(SECONDS, worker.pid).receive(worker.end)
        os.kill(worker.pid, signal.SIGCONT)
        Patience(SECONDS, worker.pid).receive(worker.end)
    finally:
        worker.close()


def test_what_it_stands_in_line_for_now_counts_once_and_so_does_a_child_s(monkeypatch):
    now, of = 100.0, {7: (1e9, 5e9), 8: (0, 0)}  # what each has run, and waited
    ready = {7: True, 8: False}
    monkeypatch.setattr(patience_module.time, "monotonic", lambda: now)
    monkeypatch.setattr(procfs, "schedstat", of.__getitem__)
    monkeypatch.setattr(patience_module, "_is_ready", ready.__getitem__)
    monkeypatch.setattr(procfs, "children", lambda pid: [8] if pid == 7 else [])
    patience = Patience(10.0, 7)
    assert patience.left() == 10
    now = 106.0
    assert patience.left() == 10, "it was ready all the time and has not run"
    of[7], now = (1.5e9, 10.5e9), 106.5
    assert patience.left() == 9, "half a second it ran, half a second it slept"
    now, ready[7] = 110.5, False
    assert patience.left() == 5, "it sleeps"
    now, ready[8] = 111.5, True
    assert patience.left() == 5, "ready since nobody knows when: since the look before"
    now = 116.5
    assert patience.left() == 5, "its child stands in line for it"
    of[8], now = (2e9, 5e9), 118.5
    assert patience.left() == 2
    now, ready[8] = 121.0, False
    assert patience.left() == 0


def test_a_process_that_ends_meanwhile_has_no_more_time_than_any_other(processor):
    worker = Worker(30.0, 0.0, processor)
    patience = Patience(SECONDS, worker.pid, 0)
    assert 0 < patience.left() <= SECONDS
    worker.close()
    time.sleep(SECONDS)
    assert patience.left() == 0
