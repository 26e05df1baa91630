"""A step that fails, whichever it is, leaves the target as it was; the next window succeeds.

The stub is told which step of which record is to fail, and how. Steps are those of stub.c: 1
registered, 2 aside, 3 equal, 4 mapped, 5 filled, 6 guarded, 7 done.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any

import pytest
from remap_lab import Lab, content, done, merged, run, says, shared_pages, snapshot
from victims import Victim

from ksmd.kernel import libc
from ksmd.model.refusal import Reason
from ksmd.model.units import PAGE_SIZE
from ksmd.model.window import Op, Record, WindowResult
from ksmd.remap import stub

pytestmark = pytest.mark.root

ERRNOS = ("ENOMEM", "EAGAIN", "EBUSY", "EEXIST", "EINVAL", "EFAULT")
STEPS = {Op.MERGE: 7, Op.ZERO: 3, Op.UNMERGE: 4, Op.REMERGE: 7}
CASES = [(op, step) for op, last in STEPS.items() for step in range(1, last + 1)]

PAGES = 64
#: The record that fails, and two that do not.
FIRST, LENGTH = 16, 9
OTHERS = ((2, 5), (40, 8))
#: In a run that is to be unmerged: a page written since the merge, and one dropped.
WRITTEN, DROPPED = FIRST, FIRST + 1


class Bench:
    """One victim in one laboratory, and the way to the state in which an operation applies."""

    def __init__(self, lab: Lab, victim: Victim, op: Op) -> None:
        self.lab = lab
        self.victim = victim
        self.op = op
        self.subject = lab.adopt(victim.pid)
        self.extent = lab.extent_like(victim.pid, victim.address, PAGES)

    def record(self, op: Op, first: int = FIRST, length: int = LENGTH) -> Record:
        return run(op, self.victim.address, first, length)

    def window(self, *records: Record, fail: tuple[int, int, int] = (0, 0, 0)) -> WindowResult:
        extent = None if self.op is Op.ZERO else self.extent
        return self.lab.window(self.subject, records, extent, fail=fail)

    def reach(self, *runs: tuple[int, int]) -> None:
        """Bring runs (first page, pages) to where the operation has something to do."""
        if self.op in (Op.UNMERGE, Op.REMERGE):
            result = self.window(*(self.record(Op.MERGE, *pages) for pages in runs))
            assert done(result), says(result)
        for first, length in runs:
            if self.op is Op.REMERGE:
                self.victim.command(f"write {first} {length}")
                self.victim.command(f"restore {first} {length}")
            elif self.op is Op.UNMERGE:
                self.victim.command(f"write {first}")
                self.victim.command(f"dontneed {first + 1}")
            elif self.op is Op.ZERO:
                self.victim.command(f"restore {first} {length}")

    def leave(self, *runs: tuple[int, int]) -> None:
        """Bring the arena back to anonymous memory with its first content."""
        if self.op is not Op.ZERO and merged(self.victim.pid, self.extent):
            result = self.window(*(self.record(Op.UNMERGE, *pages) for pages in runs))
            assert done(result), says(result)
        for first, length in runs:
            self.victim.command(f"restore {first} {length}")

    def seen(self) -> dict[str, Any]:
        """All that must be as it was. (To read the dropped page would bring it back.)"""
        pid, address = self.victim.pid, self.victim.address
        seen = snapshot(pid)
        read = [p for p in range(PAGES) if p != DROPPED or self.op is not Op.UNMERGE]
        seen["content"] = b"".join(content(pid, address + p * PAGE_SIZE, 1) for p in read)
        if self.op in (Op.UNMERGE, Op.REMERGE):
            seen["shared"] = shared_pages(pid, address + FIRST * PAGE_SIZE, LENGTH)
        return seen

    def guard_holds(self) -> bool:
        """Whether pages that are dropped read as zeros, one that was dropped before included."""
        last = FIRST + LENGTH - 1
        bad = self.victim.ask(f"dontneed {last}")["bad"]
        if self.op is Op.UNMERGE:
            bad += self.victim.ask(f"read {DROPPED}")["zero"] != 1
        return not bad


@pytest.fixture(scope="module")
def module_lab() -> Iterator[Lab]:
    lab = Lab()
    yield lab
    lab.close()


@pytest.fixture(scope="module")
def bench(request: pytest.FixtureRequest, module_lab: Lab) -> Iterator[Bench]:
    op: Op = request.param
    layout = "zeros" if op is Op.ZERO else "runs:long"
    with Victim("writers", threads=2, pages=PAGES, layout=layout) as victim:
        yield Bench(module_lab, victim, op)


def _name(value: Op | int | str) -> str:
    return value.name.lower() if isinstance(value, Op) else str(value)


@pytest.mark.parametrize("name", ERRNOS)
@pytest.mark.parametrize(("bench", "step"), CASES, indirect=["bench"], ids=_name)
def test_failed_step_leaves_the_target_as_it_was(bench: Bench, step: int, name: str) -> None:
    number = int(getattr(errno, name))
    bench.reach((FIRST, LENGTH))
    before = bench.seen()

    result = bench.window(bench.record(bench.op), fail=(step, number, 0))

    (outcome,) = result.outcomes
    if step == stub.STAGE_DONE and name == "EEXIST":
        # the last step asks for an entry that is there already: this answer is the usual one
        assert done(result), says(result)
    else:
        assert result.refused is None, says(result)
        assert outcome.result == -number, says(result)
        assert outcome.reason is not None, says(result)
        assert outcome.stage < stub.STUCK, says(result)
        assert bench.seen() == before
        if bench.op in (Op.UNMERGE, Op.REMERGE):
            assert bench.guard_holds()
            bench.victim.command(f"write {FIRST + LENGTH - 1}")  # nor does it hang
            bench.victim.command(f"restore {FIRST + LENGTH - 1}")
        assert bench.victim.check(), bench.victim.report()
        again = bench.window(bench.record(bench.op))
        assert done(again), says(again)
    assert bench.victim.check(), bench.victim.report()
    bench.leave((FIRST, LENGTH))
    assert bench.victim.check(), bench.victim.report()


@pytest.mark.parametrize(("bench", "step"), CASES, indirect=["bench"], ids=_name)
def test_failed_record_does_not_disturb_its_neighbours(bench: Bench, step: int) -> None:
    runs = (OTHERS[0], (FIRST, LENGTH), OTHERS[1])
    bench.reach(*runs)

    records = [bench.record(bench.op, *pages) for pages in runs]
    result = bench.window(*records, fail=(step, errno.ENOMEM, 1))

    assert result.refused is None, says(result)
    assert [o.reason is None for o in result.outcomes] == [True, False, True], says(result)
    assert bench.victim.check(), bench.victim.report()
    again = bench.window(records[1])
    assert done(again), says(again)
    bench.leave(*runs)
    assert bench.victim.check(), bench.victim.report()


@pytest.mark.parametrize("where", [0, PAGE_SIZE // 2, PAGE_SIZE - 1])
@pytest.mark.parametrize("bench", [Op.MERGE, Op.REMERGE], indirect=True, ids=_name)
def test_content_that_differs_in_one_byte_is_left_alone(bench: Bench, where: int) -> None:
    bench.reach((FIRST, LENGTH))
    store = libc.view(bench.extent.address, bench.extent.length)
    at = (FIRST + LENGTH - 1) * PAGE_SIZE + where
    before = bench.seen()

    store[at] ^= 1  # what is mapped there shows it, so nothing of the last page may be shared now
    result = bench.window(bench.record(bench.op))
    store[at] ^= 1

    (outcome,) = result.outcomes
    assert (outcome.result, outcome.reason) == (1, Reason.CHANGED), says(result)
    assert bench.seen() == before
    again = bench.window(bench.record(bench.op))
    assert done(again), says(again)
    bench.leave((FIRST, LENGTH))
    assert bench.victim.check(), bench.victim.report()


@pytest.mark.parametrize("where", [0, PAGE_SIZE - 1])
@pytest.mark.parametrize("bench", [Op.ZERO], indirect=True, ids=_name)
def test_run_with_one_byte_that_is_not_zero_is_kept(bench: Bench, where: int) -> None:
    bench.reach((FIRST, LENGTH))
    at = bench.victim.address + (FIRST + LENGTH - 1) * PAGE_SIZE + where
    with open(f"/proc/{bench.victim.pid}/mem", "r+b", buffering=0) as memory:  # noqa: PTH123
        memory.seek(at)
        memory.write(b"\1")
        result = bench.window(bench.record(Op.ZERO))
        memory.seek(at)
        assert memory.read(1) == b"\1"
        memory.seek(at)
        memory.write(b"\0")
    assert [o.reason for o in result.outcomes] == [Reason.CHANGED], says(result)
    assert done(bench.window(bench.record(Op.ZERO)))
    bench.leave((FIRST, LENGTH))
    assert bench.victim.check(), bench.victim.report()
