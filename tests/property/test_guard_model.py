"""The ledger and the answers against models: sets of ints, and a kernel with page tables."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ksmd.guard.context import Answer, Context, Counters, State
from ksmd.guard.intervals import Intervals
from ksmd.model.units import PAGE_SIZE

P = PAGE_SIZE
SPACE = 60
edge = st.integers(0, SPACE)


class IntervalsAgainstASet(RuleBasedStateMachine):
    """Every operation gives what a set of ints gives, and the ranges stay maximal."""

    def __init__(self) -> None:
        super().__init__()
        self.ranges = Intervals()
        self.model: set[int] = set()

    @rule(start=edge, end=edge)
    def add(self, start: int, end: int) -> None:
        self.ranges.add(start, end)
        self.model |= set(range(start, end))

    @rule(start=edge, end=edge)
    def remove(self, start: int, end: int) -> None:
        self.ranges.remove(start, end)
        self.model -= set(range(start, end))

    @rule(start=edge, length=st.integers(0, SPACE), to=edge)
    def move(self, start: int, length: int, to: int) -> None:
        self.ranges.move(start, start + length, to)
        moved = {value for value in self.model if start <= value < start + length}
        self.model -= moved | set(range(to, to + length))
        self.model |= {value - start + to for value in moved}

    @rule(other=st.lists(st.tuples(edge, edge)))
    def difference(self, other: list[tuple[int, int]]) -> None:
        right = Intervals(other)
        got = {v for s, e in self.ranges.difference(right) for v in range(s, e)}
        assert got == self.model - {v for s, e in other for v in range(s, e)}

    @rule(start=edge, end=edge)
    def look(self, start: int, end: int) -> None:
        inside = self.ranges.within(start, end)
        assert {v for s, e in inside for v in range(s, e)} == self.model & set(range(start, end))
        assert self.ranges.first(start, end) == (inside[0] if inside else None)
        assert (start in self.ranges) == (start in self.model)

    @invariant()
    def same(self) -> None:
        listed = list(self.ranges)
        assert {v for s, e in listed for v in range(s, e)} == self.model
        assert all(s < e for s, e in listed)
        assert all(left[1] < right[0] for left, right in pairwise(listed))
        assert self.ranges.size == len(self.model)


TestIntervals = IntervalsAgainstASet.TestCase

STORE, ZERO, ABSENT, GUARD = "store", "zero", "absent", "guard"


@dataclass
class Mm:
    """An address space as the kernel sees it: VMAs of merged memory, and their page tables.

    ``truth``: what the program must read. ``events``: what waits to be read from the context, in
    order; while any waits, or its sender has not run on, requests fail with EAGAIN.
    """

    vmas: list[tuple[int, int, bool]]  # first page, end, has an anon_vma
    pte: dict[int, str] = field(default_factory=dict)
    truth: dict[int, str] = field(default_factory=dict)
    event: tuple[int, int] | None = None

    def vma(self, page: int, count: int) -> int | None:
        for index, (first, end, _) in enumerate(self.vmas):
            if first <= page and page + count <= end:
                return index
        return None

    def _request(self, start: int, length: int) -> tuple[int, int]:
        if self.event is not None:
            raise OSError(errno.EAGAIN, "an event waits")
        page, count = start // P, length // P
        index = self.vma(page, count)
        if index is None:
            raise OSError(errno.ENOENT, "not in one VMA")
        first, end, _ = self.vmas[index]
        self.vmas[index] = first, end, True
        return page, count

    def zeropage(self, fd: int, start: int, length: int, mode: int = 0) -> int:
        page, count = self._request(start, length)
        for done in range(count):
            if self.pte[page + done] != ABSENT:
                if not done:
                    raise OSError(errno.EEXIST, "present")
                return done * P
            self.pte[page + done] = ZERO
        return length

    def continue_(self, fd: int, start: int, length: int, mode: int = 0) -> int:
        page, count = self._request(start, length)
        for done in range(count):
            if self.pte[page + done] not in (ABSENT, GUARD):  # markers are overwritten
                if not done:
                    raise OSError(errno.EEXIST, "present")
                return done * P
            self.pte[page + done] = STORE
        return length

    def wake(self, fd: int, start: int, length: int) -> None:
        pass

    def forked(self) -> Mm:
        """Fork copies the page table of a VMA with an anon_vma, and of no other."""
        child = Mm(list(self.vmas), {}, dict(self.truth))
        for first, end, anon in self.vmas:
            for page in range(first, end):
                child.pte[page] = self.pte[page] if anon else ABSENT
        return child


class GuardAgainstAKernel(RuleBasedStateMachine):
    """Whatever programs and their forks do, and whenever the pager gets to it, reads are right.

    Drops raise an event that the pager reads before the kernel takes the pages out; guard pages
    raise none. Forks happen before and after ranges are settled.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = Counters()
        self.family: list[tuple[Mm, Context]] = []
        mm = Mm([])
        context = Context(3, 1, 0, self.count)
        self.family.append((mm, context))
        self.merged = 0

    who = st.integers(0, 1 << 16)
    page = st.integers(0, SPACE - 1)

    def _member(self, who: int) -> tuple[Mm, Context]:
        return self.family[who % len(self.family)]

    @precondition(lambda self: self.merged + 12 <= SPACE)
    @rule(length=st.integers(1, 12), anon=st.booleans(), settle=st.booleans())
    def merge(self, length: int, anon: bool, settle: bool) -> None:
        """A stop window of the target; only ranges with an anon_vma may be settled."""
        mm, context = self.family[0]
        first, end = self.merged, self.merged + length
        context.extend(first * P, end * P)
        mm.vmas.append((first, end, anon))
        for page in range(first, end):
            mm.pte[page] = STORE
            mm.truth[page] = STORE
        if settle and anon:
            context.settle(first * P, end * P)
        self.merged = end

    @rule(who=who)
    def fork(self, who: int) -> None:
        mm, context = self._member(who)
        self._pager_reads(mm, context)
        if len(self.family) < 6:
            self.family.append((mm.forked(), context.fork(4, len(self.family))))

    @rule(who=who, first=page, length=st.integers(1, 10))
    def dontneed(self, who: int, first: int, length: int) -> None:
        mm, context = self._member(who)
        self._pager_reads(mm, context)
        first %= max(1, self.merged)
        for start, end, _ in mm.vmas:
            if start <= first < end:
                mm.event = first, min(end, first + length)

    def _pager_reads(self, mm: Mm, context: Context) -> None:
        """The event is read; its sender runs on and zaps."""
        if mm.event is None:
            return
        first, end = mm.event
        context.on_remove(first * P, end * P)
        mm.event = None
        for page in range(first, end):
            if mm.pte[page] != GUARD:
                mm.pte[page] = ABSENT
                mm.truth[page] = ZERO

    @rule(who=who)
    def read_event(self, who: int) -> None:
        self._pager_reads(*self._member(who))

    @precondition(lambda self: self.family[0][1].state is State.ZERO)
    @rule(page=page)
    def guard_install(self, page: int) -> None:
        """In memory that is settled, or copied: what raises no event must not come back either."""
        mm, context = self.family[0]
        page %= max(1, self.merged)
        index = mm.vma(page, 1)
        if index is None or page * P in context.owed:
            return
        mm.vmas[index] = *mm.vmas[index][:2], True  # the kernel has fork copy its markers
        mm.pte[page] = GUARD
        mm.truth[page] = GUARD

    @rule(page=page)
    def guard_remove(self, page: int) -> None:
        mm = self.family[0][0]
        page %= max(1, self.merged)
        if mm.pte.get(page) == GUARD:
            mm.pte[page] = ABSENT
            mm.truth[page] = ZERO

    @rule(who=who, limit=st.integers(1, 5))
    def fill(self, who: int, limit: int) -> None:
        mm, context = self._member(who)
        if context.state is State.FILL:
            answer = context.fill(mm, limit)
            assert (answer is Answer.AGAIN) == (mm.event is not None)
            if answer is Answer.DONE:
                assert context.state is State.ZERO

    @rule(who=who, page=page)
    def touch(self, who: int, page: int) -> None:
        """A thread reads a page: it faults until the page is there, and sees the truth."""
        mm, context = self._member(who)
        page %= max(1, self.merged)
        if mm.vma(page, 1) is None:
            return
        if mm.pte[page] == ABSENT:
            answer = context.fault(mm, page * P + 7)
            if mm.event is not None:
                assert answer is Answer.AGAIN
                assert page * P in context.waiting
                self._pager_reads(mm, context)
                answer = context.fault(mm, page * P)
            assert answer is Answer.DONE
            assert page * P not in context.waiting
        assert mm.pte[page] == mm.truth[page]

    @invariant()
    def present_pages_are_true(self) -> None:
        for mm, context in self.family:
            for page, state in mm.pte.items():
                assert state in (ABSENT, mm.truth[page])
                if state == ABSENT and mm.truth[page] == STORE:
                    # only filling may still bring it, so it must be owed
                    assert page * P in context.owed
                    assert context.state is State.FILL


TestGuard = GuardAgainstAKernel.TestCase
TestGuard.settings = settings(max_examples=300, stateful_step_count=40)


@given(
    owed=st.lists(st.tuples(edge, edge), max_size=6),
    borders=st.lists(edge, max_size=6),
    limit=st.integers(1, 3),
)
def test_filling_always_ends_and_fills_exactly_the_merged_part(
    owed: list[tuple[int, int]], borders: list[int], limit: int
) -> None:
    edges = sorted({0, SPACE, *borders})
    vmas = [(s, e, False) for s, e in zip(edges[::2], edges[1::2], strict=False)]
    pte = {page: ABSENT for first, end, _ in vmas for page in range(first, end)}
    mm = Mm(vmas, pte)
    root = Context(3, 1, 0, Counters())
    for start, end in owed:
        root.extend(start * P, end * P)
    child = root.fork(4, 1)
    for _ in range(40 * SPACE):
        if child.fill(mm, limit) is Answer.DONE:
            break
    assert child.state is State.ZERO
    wanted = {page for start, end in owed for page in range(start, end)}
    assert {page for page, state in pte.items() if state == STORE} == wanted & set(pte)
