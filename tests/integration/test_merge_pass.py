"""One pass of scan and merge, taken apart: what programs do between its steps."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import pipeline_lab
import pytest
from kernel_victims import Victim
from pipeline_lab import running_pipeline

from ksmd.core import checksum, strangers, tables
from ksmd.daemon import reader
from ksmd.daemon.pipeline import Pipeline
from ksmd.daemon.scanner import ScanResult
from ksmd.daemon.state import Target
from ksmd.daemon.windows import MergeResult
from ksmd.kernel import procfs
from ksmd.model.refusal import Reason
from ksmd.model.units import PAGE_SIZE
from ksmd.model.window import Op, WindowResult
from ksmd.remap.engine import Order
from ksmd.settings import Settings

pytestmark = pytest.mark.root

NPAGES = 64
MADV_DONTFORK, MADV_DONTDUMP, MADV_WIPEONFORK = 10, 16, 18
#: Registers a range with a userfaultfd of the program's own.
OWN_FAULTS = """
def handle_faults(address, length):
    fd = libc.syscall(323, 0o2004000)
    one = (ctypes.c_uint64 * 3)(0xAA, 0, 0)
    assert libc.ioctl(fd, ctypes.c_ulong(0xC018AA3F), one) == 0, ctypes.get_errno()
    other = (ctypes.c_uint64 * 4)(address, length, 1, 0)
    assert libc.ioctl(fd, ctypes.c_ulong(0xC020AA00), other) == 0, ctypes.get_errno()
    return fd
"""
SCRIPT = f"at = anon({NPAGES} * PAGE); fill(at, {NPAGES}); reply(at)\n"


@pytest.fixture
def pipeline() -> Iterator[Pipeline]:
    with running_pipeline() as made:
        yield made


def select(pipeline: Pipeline, *victims: Victim) -> None:
    pipeline_lab.select(pipeline, dict.fromkeys(victims, NPAGES))


def at_rest(*victims: Victim) -> None:
    """Wait until they sleep: what they have said, they said before they went to sleep."""
    deadline, before = time.monotonic() + 30, None
    while (now := [procfs.spent(victim.pid) for victim in victims]) != before:
        assert time.monotonic() < deadline
        before = now
        time.sleep(0.1)


def merge(pipeline: Pipeline, asked: bool = True) -> MergeResult:
    result = MergeResult()
    for _ in pipeline.merger.merge_pass(asked, result):
        pass
    return result


@pytest.mark.parametrize("advice", [None, MADV_DONTFORK, MADV_DONTDUMP, MADV_WIPEONFORK])
def test_what_was_made_afresh_after_the_scan_keeps_its_flags(
    pipeline: Pipeline, advice: int | None
) -> None:
    with Victim(SCRIPT) as one, Victim(SCRIPT) as other, Victim(SCRIPT) as third:
        select(pipeline, one, other, third)
        for _ in pipeline.scanner.full_scan(1 << 20, ScanResult(), eager=True):
            pass
        assert one.ask(f"[map({NPAGES} * PAGE, at={one.ready}), madvise(at, {NPAGES} * PAGE, 15)]")
        if advice is not None:
            assert one.ask(f"madvise({one.ready}, {NPAGES} * PAGE, {advice})") == 0
        one.ask(f"fill({one.ready}, {NPAGES})")
        merged = merge(pipeline).merged
        assert merged == (3 if advice is None else 2) * NPAGES
        assert one.ask(f"touch({one.ready}, {NPAGES})") == sum(range(2, NPAGES + 2))


OTHER = f"at = anon({NPAGES} * PAGE); fill(at, {NPAGES}, 100); reply(at)\n"


def test_pages_that_only_share_a_checksum_are_told_apart_once_and_left_alone_for_a_while(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No page of the store, no look at maps, no stop; but whoever asks has it tried again."""
    with Victim(SCRIPT) as one, Victim(OTHER) as other:
        select(pipeline, one, other)
        (domain,) = pipeline.targets.domains.values()
        for module in (checksum, reader):
            monkeypatch.setattr(module, "low32", lambda sums: np.full(len(sums), 7, np.uint32))
        for _ in pipeline.scanner.full_scan(1 << 20, ScanResult(), eager=True):
            pass
        flags_read = [target.flags_read for target in pipeline.targets]
        assert len(pipeline.merger.plan(domain, asked=False).extents) == 1
        found = merge(pipeline, asked=False)
        assert (found.windows, found.merged) == (0, 0)
        assert found.refused[Reason.DIGEST] >= NPAGES
        assert not len(pipeline.merger.plan(domain, asked=False).merges)
        assert len(pipeline.merger.plan(domain, asked=True).merges)
        assert [target.flags_read for target in pipeline.targets] == flags_read
        monkeypatch.setattr(strangers, "LASTS", -1.0)
        domain.strangers.add(np.array([7], np.uint32), time.monotonic())
        assert len(pipeline.merger.plan(domain, asked=False).merges), "tried again in time"


def test_pages_unlike_the_store_page_of_their_checksum_are_left_alone_for_a_while(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two contents with one checksum: who has the other one is not tried again in each pass."""
    single = "at = anon(PAGE); fill(at, 1, 100); reply(at)\n"
    with Victim(SCRIPT) as one, Victim(SCRIPT) as other, Victim(single) as third:
        select(pipeline, one, other)
        (domain,) = pipeline.targets.domains.values()
        for _ in pipeline.full_pass(asked=True):
            pass
        assert pipeline.last is not None
        assert pipeline.last.merge.merged == 2 * NPAGES
        for extent in domain.store.extents.values():
            extent.checksums[:] = 7
        domain.store._pages = None
        for module in (checksum, reader):
            monkeypatch.setattr(module, "low32", lambda sums: np.full(len(sums), 7, np.uint32))
        pipeline_lab.select(pipeline, {one: NPAGES, other: NPAGES, third: 1})
        for _ in pipeline.scanner.full_scan(1 << 20, ScanResult(), eager=True):
            pass
        found = merge(pipeline, asked=False)
        assert (found.windows, found.merged) == (0, 0)
        assert found.refused[Reason.DIGEST] == 1
        assert not len(pipeline.merger.plan(domain, asked=False).merges)
        assert len(pipeline.merger.plan(domain, asked=True).merges)


def test_a_target_is_not_read_again_before_it_has_run(pipeline: Pipeline) -> None:
    many = 1024
    script = f"at = anon({many} * PAGE); fill(at, {many}); reply(at)\n"

    def after(seconds: float) -> ScanResult:
        pipeline.scanner._began -= seconds
        result = ScanResult()
        list(pipeline.scanner.full_scan(1 << 20, result))
        return result

    with Victim(script) as one:
        pipeline_lab.select(pipeline, {one: many})
        at_rest(one)
        assert after(0).new == many
        assert after(10).scanned == many, "nothing is known of it yet"
        for _ in range(3):
            found = after(4000)
            assert (found.scanned, found.resting) == (0, many)
        one.ask(f"fill({one.ready} + 300 * PAGE, 1, 999)")
        at_rest(one)
        found = after(4000)
        assert (found.scanned, found.volatile) == (many, 1)
        found = after(10)
        assert 64 <= found.scanned < many, "what had changed is looked at once more"
        after(4000)  # whether it had run before or after the look of that second, nobody knows
        assert after(4000).resting == many


def test_maps_that_cannot_have_changed_much_are_not_read_to_scan_by(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Victim(SCRIPT) as one, Victim(SCRIPT) as other:
        select(pipeline, one, other)
        read: list[int] = []
        read_areas = pipeline.targets.read_areas

        def reading(target: Target, max_age: float) -> None:
            read.append(target.pid)
            read_areas(target, max_age=max_age)

        monkeypatch.setattr(pipeline.targets, "read_areas", reading)
        list(pipeline.targets.refreshing(if_changed=True))
        assert not read
        more = one.ask("anon(PAGE)")
        list(pipeline.targets.refreshing(if_changed=True))
        assert read == [one.pid], "it has mapped something"
        one.ask(f"libc.munmap(ctypes.c_void_p({more}), PAGE)")
        list(pipeline.targets.refreshing(if_changed=True))
        assert read == [one.pid] * 2, "it has mapped less"
        list(pipeline.targets.refreshing(if_changed=True))
        assert read == [one.pid] * 2
        list(pipeline.targets.refreshing())
        assert read == [one.pid] * 2 + [one.pid, other.pid], "somebody asks"
        for _ in pipeline.scanner.full_scan(1 << 20, ScanResult(), eager=True):
            pass
        assert merge(pipeline).merged == 2 * NPAGES
        list(pipeline.targets.refreshing(if_changed=True))
        assert all(len(target.mappings) for target in pipeline.targets), "we have changed it"


def test_a_program_is_not_stopped_while_it_handles_page_faults_itself(pipeline: Pipeline) -> None:
    with Victim(OWN_FAULTS + SCRIPT) as one, Victim(SCRIPT) as other, Victim(SCRIPT) as third:
        select(pipeline, one, other, third)
        fd = one.ask("handle_faults(anon(4 * PAGE), 4 * PAGE)")
        stops = {}
        for closed in (False, True):
            if closed:
                one.ask(f"os.close({fd})")
            for _ in pipeline.full_pass(asked=True):
                pass
            stops[closed] = {t.pid: t.stops.count for t in pipeline.targets}
        assert stops[False][one.pid] == 0
        assert stops[False][other.pid] > 0
        assert stops[True][one.pid] > 0


def test_memory_of_a_program_with_a_userfaultfd_is_read_without_pins(pipeline: Pipeline) -> None:
    """A pin would ask the program for a page that it has dropped since the scan, and wait."""
    with Victim(SCRIPT) as plain, Victim(SCRIPT) as handler:
        handler.ask("libc.syscall(323, 0o2004000)")
        select(pipeline, plain, handler)
        pins = {target.pid: target.memory.may_pin for target in pipeline.targets}
        assert pins == {plain.pid: True, handler.pid: False}
        plain.ask("libc.syscall(323, 0o2004000)")
        for target in pipeline.targets:
            pipeline.targets.read_areas(target)
            assert not target.memory.may_pin


def test_flags_are_read_again_in_time_to_merge_by_and_maps_whenever_they_change(
    pipeline: Pipeline,
) -> None:
    with Victim(SCRIPT) as one, Victim(SCRIPT) as other:
        select(pipeline, one, other)
        refresh = pipeline.targets.refreshing
        here = next(target for target in pipeline.targets if target.pid == one.pid)
        read = here.areas
        assert [area.start for area in read] == [one.ready]
        list(refresh(if_changed=True))
        assert here.areas is read, "nothing has changed"
        # no line of maps changes by this
        assert one.ask(f"libc.mlock(ctypes.c_void_p({one.ready}), {NPAGES} * PAGE)") == 0
        list(refresh(if_changed=True))
        assert here.areas is read
        for _ in pipeline.scanner.full_scan(1 << 20, ScanResult(), eager=True):
            pass
        # (a pass that is asked for begins by reading them)
        assert merge(pipeline, asked=False).merged == 0, "one is locked, and the other is alone"
        assert not len(here.areas)
        one.ask(f"libc.munlock(ctypes.c_void_p({one.ready}), {NPAGES} * PAGE)")
        list(refresh())
        assert [area.start for area in here.areas] == [one.ready]
        one.ask(f"libc.munmap(ctypes.c_void_p({one.ready} + 8 * PAGE), PAGE)")
        list(refresh(if_changed=True))
        assert len(here.areas) == 2
        # what is left of a mapping passes for what it was, but nothing is merged by that
        first = f"libc.mlock(ctypes.c_void_p({one.ready}), 8 * PAGE)"
        assert one.ask(first) == 0
        one.ask(f"libc.munmap(ctypes.c_void_p({one.ready} + 16 * PAGE), PAGE)")
        list(refresh(if_changed=True))
        assert len(here.areas) == 3
        for _ in pipeline.scanner.full_scan(1 << 20, ScanResult(), eager=True):
            pass
        merge(pipeline, asked=False)
        assert len(here.areas) + len(here.mappings) == 2
        assert here.refused_ranges.pages()[Reason.LOCKED] == 8


def test_what_is_merged_is_known_anew_when_maps_is_as_it_was_once_before(
    pipeline: Pipeline,
) -> None:
    with Victim(SCRIPT) as one, Victim(SCRIPT) as other:
        select(pipeline, one, other)
        for _ in pipeline.scanner.full_scan(1 << 20, ScanResult(), eager=True):
            pass
        assert merge(pipeline).merged
        targets = pipeline.targets
        here = next(target for target in targets if target.pid == one.pid)
        targets.recall_mappings(here)
        before = list(here.mappings.vmas)
        assert before
        assert {vma.perms for vma in before} == {"rw-p"}
        protect = f"libc.mprotect(ctypes.c_void_p({one.ready}), {NPAGES} * PAGE, %d)"
        assert one.ask(protect % 1) == 0
        targets.read_mappings(here)
        assert {vma.perms for vma in here.mappings.vmas} == {"r--p"}
        assert one.ask(protect % 3) == 0
        targets.recall_mappings(here)
        assert list(here.mappings.vmas) == before


def own_pass(pipeline: Pipeline) -> None:
    """Do what the daemon does by itself, but for the windows."""
    list(pipeline.targets.refreshing(if_changed=True))
    list(pipeline.scanner.full_scan(1 << 20, ScanResult()))
    merge(pipeline, asked=False)
    list(pipeline.accounting.recount(resting=True))


def test_while_nobody_runs_nothing_is_looked_at(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither maps nor memory, nor what is merged, nor is anything planned; a write ends that."""

    def later() -> None:
        """Pass as much time as makes the next pass look again at who has run."""
        for target in pipeline.targets:
            target.recount_at = target.counted_at = time.monotonic() - 100
            target.maps_read -= 100
            target.flags_read -= 100
            target.last_window -= 1000

    calls: list[str] = []
    with Victim(SCRIPT) as one, Victim(SCRIPT) as other:
        select(pipeline, one, other)
        for _ in pipeline.scanner.full_scan(1 << 20, ScanResult(), eager=True):
            pass
        assert merge(pipeline).merged == 2 * NPAGES
        at_rest(one, other)
        later()
        for _ in range(3):
            own_pass(pipeline)
        for owner, name in [
            (pipeline.targets, "read_areas"), (pipeline.scanner, "_step"),
            (pipeline.accounting, "_count"), (tables.PageTables, "duplicates"),
        ]:  # fmt: skip
            whole = getattr(owner, name)

            def noting(*given, name=name, whole=whole, **more):
                calls.append(name)
                return whole(*given, **more)

            monkeypatch.setattr(owner, name, noting)
        later()
        own_pass(pipeline)
        assert not calls
        one.ask(f"poke({one.ready}, 5)")
        at_rest(one)
        later()
        own_pass(pipeline)
        assert {"read_areas", "_count"} <= set(calls)
        assert [target.broken for target in pipeline.targets] == [1, 0]


def test_other_settings_hold_for_who_stands_still_too(pipeline: Pipeline) -> None:
    with Victim(SCRIPT) as one:
        select(pipeline, one)
        at_rest(one)
        for _ in range(3):
            own_pass(pipeline)
        (target,) = pipeline.targets
        for npages in (7, 20):
            rule = {"name": "v", "match": {"pid": one.pid}, "domain": "d",
                    "regions": [{"start": one.ready, "npages": npages}]}  # fmt: skip
            pipeline.targets.settings = Settings.model_validate({"version": 1, "targets": [rule]})
            own_pass(pipeline)
            assert int((target.areas.ends - target.areas.starts).sum()) == npages * 4096
            assert pipeline.targets.tables(target).rows == npages


def test_an_extent_whose_users_have_gone_is_released_though_the_others_rest(
    pipeline: Pipeline,
) -> None:
    with (
        Victim(SCRIPT) as one,
        Victim(SCRIPT) as other,
        Victim(OTHER) as third,
        Victim(OTHER) as fourth,
    ):
        for chosen in ((one, other), (one, other, third, fourth)):
            select(pipeline, *chosen)
            for _ in pipeline.scanner.full_scan(1 << 20, ScanResult(), eager=True):
                pass
            assert merge(pipeline).merged == 2 * NPAGES
        for _ in range(3):
            own_pass(pipeline)
        (domain,) = pipeline.targets.domains.values()
        assert len(domain.store.extents) == 2
        assert all(time.monotonic() < target.recount_at for target in pipeline.targets)
        one.kill()
        own_pass(pipeline)
        assert len(domain.store.extents) == 2, "somebody has it yet"
        other.kill()
        own_pass(pipeline)
        assert len(domain.store.extents) == 1
        assert {target.merged_pages for target in pipeline.targets} == {NPAGES}


class OnLooker:
    """Looks on while the engine is asked for windows; may say that a moment was bad."""

    def __init__(self, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        self._engine = pipeline.windows._engine
        self._windows = self._engine.windows
        self.at_once: list[list[int]] = []  # whose windows were opened together
        self.bad_moments = {Op.MERGE: 0, Op.ZERO: 0, Op.REMERGE: 0}
        monkeypatch.setattr(self._engine, "windows", self._look_on)

    def _look_on(self, orders: list[Order], meanwhile: Callable[[], None]) -> list[WindowResult]:
        self.at_once.append([order.request.target.pid for order in orders])
        op = Op(int(orders[0].request.records["op"][0]))
        if not self.bad_moments[op]:
            return self._windows(orders, meanwhile)
        self.bad_moments[op] -= 1
        requests = [order.request for order in orders]
        return [
            WindowResult(request.target, request.records, refused=Reason.UNSTOPPABLE)
            for request in requests
        ]


@contextlib.contextmanager
def several(pipeline: Pipeline, count: int) -> Iterator[list[Victim]]:
    with contextlib.ExitStack() as stack:
        victims = [stack.enter_context(Victim(SCRIPT)) for _ in range(count)]
        select(pipeline, *victims)
        yield victims


def full_pass(pipeline: Pipeline) -> MergeResult:
    for _ in pipeline.full_pass(asked=True):
        pass
    assert pipeline.last is not None
    return pipeline.last.merge


def test_each_of_several_targets_has_a_window_in_turn(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    onlooker = OnLooker(pipeline, monkeypatch)
    with several(pipeline, 10) as victims:
        settings = pipeline.targets.settings
        windows = settings.window.model_copy(update={"max_pages": NPAGES // 4})
        pipeline.targets.settings = settings.model_copy(update={"window": windows})
        assert all(pipeline.windows.prepare(target) for target in pipeline.targets)
        assert full_pass(pipeline).merged == 10 * NPAGES
        at_once = onlooker.at_once
        assert all(len(pids) == len(set(pids)) for pids in at_once)
        assert max(map(len, at_once)) == 8
        # four windows each, or more where a moment was bad
        had = Counter(pid for pids in at_once for pid in pids)
        assert all(had[victim.pid] >= 4 for victim in victims)
        for victim in victims:
            assert victim.ask(f"peek({victim.ready} + 5 * PAGE)") >= 0


def test_who_has_to_be_prepared_yet_keeps_nobody_waiting(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    onlooker = OnLooker(pipeline, monkeypatch)
    with several(pipeline, 4) as victims:
        ready = [target for target in pipeline.targets if target.pid != victims[1].pid]
        assert all(pipeline.windows.prepare(target) for target in ready)
        assert full_pass(pipeline).merged == 4 * NPAGES
        at_once = onlooker.at_once
        assert [victims[1].pid] in at_once
        assert all(victims[1].pid not in pids for pids in at_once if len(pids) > 1)
        assert max(map(len, at_once)) > 1


@pytest.mark.parametrize("op", [Op.MERGE, Op.REMERGE])
def test_a_bad_moment_is_tried_again_for_who_waits(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, op: Op
) -> None:
    onlooker = OnLooker(pipeline, monkeypatch)
    with Victim(SCRIPT) as one, Victim(SCRIPT) as other:
        select(pipeline, one, other)
        onlooker.bad_moments[op] = 2
        assert full_pass(pipeline).merged == 2 * NPAGES
        page = one.ready + 5 * PAGE_SIZE
        assert (
            one.ask(f"[kept := peek({page}), poke({page}, kept ^ 1), poke({page}, kept), 0][3]")
            == 0
        )
        assert full_pass(pipeline).remerged == 1
        assert onlooker.bad_moments[op] == 0
        assert pipeline.last is not None
        assert not pipeline.last.merge.postponed
