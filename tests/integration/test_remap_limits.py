"""Where room runs out, or the target has changed since the plan, a window leaves it as it was."""

# ruff: noqa: F401, F811  (fixtures are imported by their names)

from __future__ import annotations

import resource
from collections.abc import Callable

import pytest
from kernel_victims import Victim as Script
from remap_lab import (
    Lab,
    Subject,
    content,
    descriptors,
    done,
    lab,
    mappings,
    run,
    says,
    snapshot,
)
from victims import Victim

from ksmd.core.windows import columns
from ksmd.kernel import procfs, risks
from ksmd.kernel.memfd import ExtentMap
from ksmd.kernel.vmaquery import VmaQuery
from ksmd.model.refusal import Reason
from ksmd.model.units import PAGE_SIZE
from ksmd.model.window import Op, Record, WindowRequest
from ksmd.remap.engine import Order, RefusedTargetError

pytestmark = pytest.mark.root

StartVictim = Callable[..., Victim]

PAGES = 32
RUNS = ((4, 2), (8, 2), (12, 2), (16, 2))

#: An arena of PAGES filled pages; ``sys`` by number; as many mappings as the kernel allows.
SCRIPT = f"""
a = map({PAGES + 2} * PAGE, prot=0) + PAGE
map({PAGES} * PAGE, at=a); madvise(a, {PAGES} * PAGE, 15); fill(a, {PAGES})
def call(number, *args):
    'Zero when it worked, else errno.'
    got = libc.syscall(*[ctypes.c_long(x) for x in (number, *args)])
    return ctypes.get_errno() if got == -1 else 0
def mprotect(first, npages, prot): return call(10, a + first * PAGE, npages * PAGE, prot)
def mapped():
    with open('/proc/self/maps', 'rb', 0) as file:
        return sum(part.count(b'\\n') for part in iter(lambda: file.read(1 << 16), b''))
def crowd(count):
    'Make so many mappings; neighbours differ, so that they stay apart.'
    at = map((count + 1) * PAGE, prot=0, flags=0x4022)
    for page in range(1, count, 2):
        assert not call(10, at + page * PAGE, PAGE, 1)
    return at
def last_rooms(room, limit):
    'Take mappings until there is room for so many; how many there are.'
    global rooms
    missing = limit - room - mapped()
    rooms = [crowd(missing), (missing + 1) * PAGE]
    return mapped()
def more_rooms(): return call(11, *rooms)
def limit(soft, hard):
    import resource
    return resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard)) or 0
reply(a)
"""


class Bench:
    """A script with an arena, in a laboratory."""

    def __init__(self, lab: Lab, script: Script) -> None:
        self.lab = lab
        self.script = script
        self.pid = script.pid
        self.address: int = script.ready
        self.subject: Subject = lab.adopt(script.pid)
        self.extent: ExtentMap = lab.extent_like(script.pid, self.address, PAGES)
        self.first = content(self.pid, self.address, PAGES)
        self.details: set[str] = set()

    def records(self, op: Op, runs: tuple[tuple[int, int], ...] = RUNS) -> list[Record]:
        return [run(op, self.address, *pages) for pages in runs]

    def window(self, op: Op, *runs: tuple[int, int]) -> list[Reason | None]:
        result = self.lab.window(self.subject, self.records(op, runs or RUNS), self.extent)
        assert result.refused in (None, Reason.WINDOW_FAILED), says(result)
        if result.refused:
            self.details.add(result.detail.partition(" ")[0])
            return [result.refused]
        return [outcome.reason for outcome in result.outcomes]

    def ask(self, expression: str) -> int:
        return int(self.script.ask(expression))

    def is_right(self) -> bool:
        """The arena holds what it held, seen from outside and by the program itself."""
        touched = self.ask(f"touch(a, {PAGES})")
        now = content(self.pid, self.address, PAGES)
        return now == self.first and touched == sum(now[::PAGE_SIZE])


@pytest.fixture
def bench(lab: Lab) -> Bench:
    with Script(SCRIPT) as script:
        yield Bench(lab, script)


# ---------------------------------------------------------------- room for mappings


def _has(bench: Bench, op: Op) -> None:
    """With all the room it takes: bring the arena to where *op* has something to do."""
    at = bench.address
    with VmaQuery(bench.pid, bench.pid) as query:  # all of maps would take long to read
        while at < bench.address + PAGES * PAGE_SIZE:
            vma = query.covering(at)
            assert vma is not None
            if vma.inode == bench.extent.inode:
                first = (vma.start - bench.address) // PAGE_SIZE
                run_ = (first, (vma.end - vma.start) // PAGE_SIZE)
                assert bench.window(Op.UNMERGE, run_) == [None]
            at = vma.end
    if op is not Op.MERGE:
        assert bench.window(Op.MERGE, *RUNS) == [None] * len(RUNS)
    if op is Op.REMERGE:
        for first, npages in RUNS:
            bench.script.ask(f"fill(a + {first} * PAGE, {npages}, {first + 1})")


@pytest.mark.parametrize("op", [Op.MERGE, Op.UNMERGE, Op.REMERGE], ids=lambda op: op.name.lower())
def test_target_survives_every_distance_from_the_limit_of_mappings(bench: Bench, op: Op) -> None:
    limit = risks.max_map_count()
    seen: set[Reason | None] = set()
    bench.ask(f"crowd({limit - 800})")
    for room in (*range(28, 10, -1), 7, 4, 1, 0, -1):
        _has(bench, op)
        bench.ask(f"last_rooms({room}, {limit})")
        reasons = bench.window(op)
        seen.update(reasons)
        assert set(reasons) <= {None, Reason.VMA_BUDGET, Reason.WINDOW_FAILED}
        assert bench.ask("more_rooms()") == 0
        assert bench.is_right()
    assert {None, Reason.WINDOW_FAILED} <= seen, "the limit was not crossed"
    assert "mprotect" in bench.details, "there was always room for the stub's own memory"


# ---------------------------------------------------------------- room for descriptors


def test_full_descriptor_table_is_refused_and_stays_as_it_is(bench: Bench) -> None:
    used = len(descriptors(bench.pid))
    seen = []
    for spare in range(7, -1, -1):  # downwards: the hard limit cannot be raised again
        bench.ask(f"limit({used + spare}, {used + spare})")
        for op in (Op.MERGE, Op.UNMERGE):
            before = snapshot(bench.pid)
            result = bench.lab.window(bench.subject, bench.records(op), bench.extent)
            seen.append(result.refused)
            if result.refused is not None:
                assert result.refused is Reason.FD_TABLE, says(result)
                assert op is Op.MERGE, "what fits when pages are merged, fits when they go back"
                assert snapshot(bench.pid) == before
                break
            assert done(result), says(result)
        assert bench.is_right()
    assert seen[0] is None
    assert seen[-1] is Reason.FD_TABLE


def test_descriptor_table_is_widened_for_the_window_where_it_may_be(bench: Bench) -> None:
    used = len(descriptors(bench.pid))
    bench.ask(f"limit({used}, {used + 64})")
    before = snapshot(bench.pid)
    for op in (Op.MERGE, Op.UNMERGE):
        assert bench.window(op) == [None] * len(RUNS)
        assert {**snapshot(bench.pid), "mappings": 0} == {**before, "mappings": 0}
    assert bench.is_right()


def test_full_table_is_named_at_setup(lab: Lab, victims: StartVictim) -> None:
    victim = victims("idle", spare_fds=0)
    used = len(descriptors(victim.pid))
    resource.prlimit(victim.pid, resource.RLIMIT_NOFILE, (used, used))
    before = snapshot(victim.pid)
    with pytest.raises(RefusedTargetError) as error:
        lab.adopt(victim.pid)
    assert error.value.reason is Reason.FD_TABLE
    assert snapshot(victim.pid) == before


# ---------------------------------------------------------------- changed since the plan


#: What the program did to pages 8-11 of the arena between the plan and the window, and the answer.
CHANGES = {
    "read-only": ("mprotect(8, 4, 1)", Reason.NOT_WRITABLE),
    "inaccessible": ("mprotect(8, 4, 0)", Reason.NOT_WRITABLE),
    "executable": ("mprotect(8, 4, 7)", Reason.NOT_WRITABLE),
    "locked": ("call(149, a + 8 * PAGE, 4 * PAGE)", Reason.LOCKED),
    "unmapped": ("call(11, a + 8 * PAGE, 4 * PAGE)", Reason.NOT_MAPPED),
    "unmapped in part": ("call(11, a + 11 * PAGE, PAGE)", Reason.NOT_MAPPED),
    "shared": ("map(4 * PAGE, flags=0x21, at=a + 8 * PAGE) and fill(a + 8 * PAGE, 4, 9)",
               Reason.SHARED_MAPPING),
    "a file": ("map(4 * PAGE, flags=2, fd=os.memfd_create('x'), at=a + 8 * PAGE) and 0",
               Reason.FILE_BACKED),
    "written": ("poke(a + 9 * PAGE + 7, 200) or 0", Reason.CHANGED),
    "dropped": ("madvise(a + 9 * PAGE, PAGE, 4)", Reason.PINNED_PAGE),
    "sealed": ("call(462, a + 8 * PAGE, 4 * PAGE, 0)", Reason.WINDOW_FAILED),
    "guarded": ("madvise(a + 9 * PAGE, PAGE, 102)", Reason.WINDOW_FAILED),
    "forked": ("family(1) and 0", Reason.PINNED_PAGE),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_what_changed_since_the_plan_is_not_merged(bench: Bench, name: str) -> None:
    expression, reason = CHANGES[name]
    assert not bench.script.ask(expression), "the kernel refused the change itself"
    before = mappings(bench.pid)

    records = bench.records(Op.MERGE, ((8, 4), (20, 4)))
    result = bench.lab.window(bench.subject, records, bench.extent)

    assert result.refused is None, says(result)
    assert result.outcomes[0].reason is reason, says(result)
    if name != "forked":
        assert result.outcomes[1].reason is None, says(result)
    after = mappings(bench.pid)
    end = bench.address + 20 * PAGE_SIZE
    assert [m for m in after if m[1] < end] == [m for m in before if m[1] < end]


#: What a program may do to pages 8-11 after they were merged, and how to see that it still holds.
LATER = {
    "read-only": ("mprotect(8, 4, 1)", "r--p"),
    "inaccessible": ("mprotect(8, 4, 0)", "---p"),
    "executable": ("mprotect(8, 4, 5)", "r-xp"),
}


@pytest.mark.parametrize("name", LATER)
def test_protection_changed_after_a_merge_survives_the_unmerge(bench: Bench, name: str) -> None:
    expression, perms = LATER[name]
    assert bench.window(Op.MERGE, (0, PAGES)) == [None]
    assert bench.ask(expression) == 0
    for fail in ((4, 12, 0), (0, 0, 0)):  # undone, then carried out
        result = bench.lab.window(
            bench.subject, bench.records(Op.UNMERGE, ((8, 4),)), bench.extent, fail=fail
        )
        assert [o.result for o in result.outcomes] == [-fail[1]], says(result)
        at = bench.address + 8 * PAGE_SIZE
        (vma,) = [v for v in procfs.maps(bench.pid) if v.start <= at < v.end]
        assert vma.perms == perms
        assert bool(vma.inode) == bool(fail[0])
    assert bench.ask("mprotect(8, 4, 3)") == 0
    assert bench.is_right()


def test_guard_pages_installed_after_a_merge_survive_the_unmerge(bench: Bench) -> None:
    assert bench.window(Op.MERGE, (0, PAGES)) == [None]
    assert bench.ask("madvise(a + 9 * PAGE, PAGE, 102)") == 0
    assert bench.window(Op.UNMERGE, (0, PAGES)) == [None]
    # a child that touches it dies by SIGSEGV; the pages around it are as they were
    assert (
        bench.ask(
            "(lambda pid: os.waitpid(pid, 0)[1] if pid else"
            " (peek(a + 9 * PAGE), os._exit(0)))(os.fork())"
        )
        & 0x7F
        == 11
    )
    assert bench.ask("madvise(a + 9 * PAGE, PAGE, 103) or peek(a + 9 * PAGE)") == 0
    assert bench.ask("peek(a + 8 * PAGE)") == bench.first[8 * PAGE_SIZE]
    assert bench.ask("peek(a + 10 * PAGE)") == bench.first[10 * PAGE_SIZE]


def test_pages_dropped_after_a_merge_stay_zero_if_the_unmerge_fails(bench: Bench) -> None:
    assert bench.window(Op.MERGE, (0, PAGES)) == [None]
    assert bench.ask("madvise(a + 9 * PAGE, 2 * PAGE, 4)") == 0
    for fail in ((2, 12, 0), (3, 12, 0), (4, 12, 0), (0, 0, 0)):
        result = bench.lab.window(
            bench.subject, bench.records(Op.UNMERGE, ((8, 4),)), bench.extent, fail=fail
        )
        assert [o.result for o in result.outcomes] == [-fail[1]], says(result)
        page = content(bench.pid, bench.address + 10 * PAGE_SIZE, 1)
        assert page == bytes(PAGE_SIZE), "store content shows where the program dropped a page"
    assert bench.ask("peek(a + 9 * PAGE)") == 0
    assert bench.ask("peek(a + 8 * PAGE)") == bench.first[8 * PAGE_SIZE]


def test_what_goes_wrong_while_the_tracer_is_at_work_costs_no_answer(lab: Lab) -> None:
    """The next request would be given this one's, and merge what nobody asked for."""
    npages = 4
    with Script(f"at = anon({npages} * PAGE); fill(at, {npages}); reply(at)\n") as victim:
        subject = lab.adopt(victim.pid)
        extent = lab.extent_like(victim.pid, victim.ready, npages)
        record = run(Op.MERGE, victim.ready, 0, npages)
        request = WindowRequest(subject.id, columns([record]), extent.inode, 10)

        def fail() -> None:
            raise RuntimeError("meanwhile")

        lab.announce(subject, [record])
        with pytest.raises(RuntimeError, match="meanwhile"):
            lab.engine.windows([Order(request, subject.contexts, extent.fd_ro)], fail)
        lab.pager.settle_all(subject.slot)
        back = lab.window(subject, [run(Op.UNMERGE, victim.ready, 0, npages)], extent)
        assert done(back), says(back)
        assert [outcome.record.op for outcome in back.outcomes] == [Op.UNMERGE]
