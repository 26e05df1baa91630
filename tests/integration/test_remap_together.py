"""Windows of several targets in one request: each ends in its own way, whatever others come to."""

# ruff: noqa: F401, F811  (fixtures are imported by their names)

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kernel_victims import Victim as Script
from remap_lab import (
    Lab,
    UseTracer,
    content,
    done,
    faulty_tracer,
    lab,
    run,
    says,
)

from ksmd.core.windows import columns
from ksmd.daemon.windows import announce
from ksmd.kernel import channel, procfs
from ksmd.kernel.memfd import ExtentMap
from ksmd.model.refusal import Reason
from ksmd.model.units import PAGE_SIZE
from ksmd.model.window import Op, WindowRequest, WindowResult
from ksmd.remap.engine import Order

pytestmark = pytest.mark.root

PAGES = 32
SCRIPT = f"at = anon({PAGES} * PAGE); fill(at, {PAGES}); reply(at)\n"


class Company:
    """Some targets with one content each, and an extent that all of them may map."""

    def __init__(self, lab: Lab, scripts: list[Script]) -> None:
        self.lab = lab
        self.scripts = scripts
        self.members = [(lab.adopt(script.pid), script.ready) for script in scripts]
        self.content = content(scripts[0].pid, scripts[0].ready, PAGES)
        self.extent: ExtentMap = lab.extent(self.content)

    def windows(self, op: Op, deadline_ms: float = 2000) -> list[WindowResult]:
        """Open one window of each, together, as the daemon does."""
        pager, orders, told = self.lab.pager, [], {}
        for subject, address in self.members:
            records = columns([run(op, address, 0, PAGES, 0)])
            told[subject.slot] = records
            request = WindowRequest(subject.id, records, self.extent.inode, deadline_ms)
            orders.append(Order(request, subject.contexts, self.extent.fd_ro))
        announce(pager, told)
        results = self.lab.engine.windows(orders)
        pager.settle_all(*told)
        assert len(results) == len(orders)
        assert [result.target for result in results] == [subject.id for subject, _ in self.members]
        return results

    def check(self) -> None:
        """See that every script holds what it held, can write to all of it, and is alone there."""
        for script in self.scripts:
            assert content(script.pid, script.ready, PAGES) == self.content
            for page in (0, PAGES // 2, PAGES - 1):
                at = script.ready + page * PAGE_SIZE
                assert script.ask(f"[poke({at}, 77), peek({at})]")[1] == 77
                assert script.ask(f"[poke({at}, {self.content[page * PAGE_SIZE]}), peek({at})]")
        for script in self.scripts:
            assert content(script.pid, script.ready, PAGES) == self.content


@pytest.fixture
def three(lab: Lab) -> Iterator[Company]:
    with contextlib.ExitStack() as stack:
        yield Company(lab, [stack.enter_context(Script(SCRIPT)) for _ in range(3)])


def test_each_is_merged_and_given_back(three: Company) -> None:
    for op in (Op.MERGE, Op.UNMERGE, Op.MERGE):
        results = three.windows(op)
        assert all(done(result) for result in results), list(map(says, results))
        assert all(result.total_us > 0 for result in results)
    three.check()


def test_what_differs_in_one_of_them_is_left_out_there_alone(three: Company) -> None:
    odd = three.scripts[1]
    odd.ask(f"[poke({odd.ready + 5 * PAGE_SIZE}, 99), 0]")
    results = three.windows(Op.MERGE)
    assert [done(result) for result in results] == [True, False, True]
    assert results[1].refused is None
    assert [outcome.reason for outcome in results[1].outcomes] == [Reason.CHANGED]
    assert odd.ask(f"peek({odd.ready + 5 * PAGE_SIZE})") == 99


@pytest.mark.parametrize("place", range(3))
def test_who_has_ended_is_gone_and_nobody_else(three: Company, place: int) -> None:
    three.scripts.pop(place).kill()
    results = three.windows(Op.MERGE)
    assert results[place].refused is Reason.GONE, says(results[place])
    assert [done(result) for result in results] == [at != place for at in range(3)]
    three.check()


@pytest.mark.parametrize("place", range(3))
def test_who_cannot_be_stopped_costs_a_tracer_and_nobody_his_window(
    three: Company, faulty_tracer: UseTracer, tmp_path: Path, place: int
) -> None:
    """It tells of the windows before; those after it are the next tracer's."""
    three.lab.engine.close()
    faulty_tracer(blind="states")
    with _waiting_for_a_child(three.scripts[place], tmp_path / "fifo"):
        results = three.windows(Op.MERGE, deadline_ms=20)
    assert results[place].refused is Reason.UNSTOPPABLE, says(results[place])
    assert not results[place].lost
    assert [done(result) for result in results] == [at != place for at in range(3)]
    three.check()


@contextlib.contextmanager
def _waiting_for_a_child(script: Script, fifo: Path) -> Iterator[None]:
    """Have a script wait, as after vfork, for a child that opens a file and does not come to it."""
    os.mkfifo(fifo)
    actions = f"[(os.POSIX_SPAWN_OPEN, 9, {str(fifo)!r}, os.O_RDONLY, 0)]"
    assert script.process.stdin is not None
    script.process.stdin.write(
        "[os := __import__('os'), os.waitpid(os.posix_spawn('/bin/true', ['true'], {}, "
        f"file_actions={actions}), 0)][1][1]\n"
    )
    script.process.stdin.flush()
    deadline = time.monotonic() + 20
    while procfs.task_stat(script.pid, script.pid).state != "D":
        assert time.monotonic() < deadline, "it does not wait"
        time.sleep(0.01)
    try:
        yield
    finally:
        fifo.open("wb").close()
    assert script.answer() == 0


def test_a_window_that_is_over_too_late_is_lost_alone(
    lab: Lab, three: Company, faulty_tracer: UseTracer
) -> None:
    lab.engine.close()
    faulty_tracer(late=2)
    results = three.windows(Op.MERGE)
    assert [result.lost for result in results] == [False, True, False]
    assert [done(result) for result in results] == [True, False, True]
    three.check()


def test_a_tracer_has_its_time_for_each_window(
    lab: Lab, three: Company, faulty_tracer: UseTracer, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.engine.close()
    faulty_tracer(slow=0.8)
    lab.engine.begin()
    lab.engine.start()
    tracer = lab.engine.pid
    monkeypatch.setattr("ksmd.remap.engine._REPLY_SECONDS", 1.2)
    results = three.windows(Op.MERGE)
    assert all(done(result) for result in results), list(map(says, results))
    assert lab.engine.pid == tracer
    three.check()


@pytest.mark.parametrize("when", ["before", "after"])
def test_all_endure_the_death_of_their_tracer_at_any_request(
    lab: Lab, three: Company, faulty_tracer: UseTracer, when: str
) -> None:
    """The window in which it was is lost, those before are not, and those after it are opened."""
    patterns = set()
    for at in range(1, 400, 4):
        lab.engine.close()
        faulty_tracer(at=at, when=when)
        results = three.windows(Op.MERGE)
        assert all(result.lost or done(result) for result in results), list(map(says, results))
        patterns.add(tuple(result.lost for result in results))
        three.check()
        lab.engine.close()
        faulty_tracer(at=0)
        three.windows(Op.UNMERGE)
        if not any(result.lost for result in results):
            break  # it lived: all requests were made
    print(f"\nkilled up to request {at}: {len(patterns)} ways to end")
    assert patterns >= {(True, True, True), (False, True, False), (False, False, True)}
    assert (False, False, False) in patterns
    assert all(done(result) for result in three.windows(Op.MERGE))
    three.check()


def test_what_is_too_much_for_one_message_goes_in_several(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service has no CAP_NET_ADMIN: its channels have the buffers that everybody has."""
    monkeypatch.setattr(
        channel, "pair", lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    )
    npages, members = 4000, 8
    script = (
        f"at = anon({npages} * PAGE); fill(at, {npages}, step=2)\n"
        f"for page in range(1, {npages}, 2): poke(at + page * PAGE, 0)\n"
        "reply(at)\n"
    )
    with contextlib.ExitStack() as stack:
        scripts = [stack.enter_context(Script(script)) for _ in range(members)]
        orders = []
        for script_ in scripts:
            subject = lab.adopt(script_.pid)
            zeros = [run(Op.ZERO, script_.ready, page, 1, 0) for page in range(1, npages, 2)]
            request = WindowRequest(subject.id, columns(zeros), 0, 2000)
            orders.append(Order(request, subject.contexts))
        results = lab.engine.windows(orders)
        assert [result.target for result in results] == [o.request.target for o in orders]
        assert all(done(result) for result in results), [str(r.refused) for r in results]
