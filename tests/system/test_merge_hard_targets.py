"""Targets that make it hard: many threads, no privileges, no room, filters, huge pages, layouts.

Each must be merged as well as an easy one, or refused by name; and none may be harmed.
"""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from control_groups import ControlGroup, made_group
from harness import (
    CROWDED,
    PAGE,
    Oracle,
    crowd,
    descriptors,
    frames,
    memory,
    private,
    settings_for,
    state,
    store_mappings,
    target,
    until,
)

from ksmd.kernel import procfs

pytestmark = pytest.mark.root

ENOUGH = 0.95
LAYOUTS = ("runs:long", "runs:short", "singles", "zeros", "mixed")


def check_all(victims) -> None:
    for victim in victims:
        assert victim.check(), victim.report()


def merge_and_give_back(pair, daemons: Callable[..., Any], **keys: Any) -> None:
    """GIVEN two victims WHEN merged twice and given back THEN nothing of them is wrong, ever."""
    oracle = Oracle(*pair)
    fds = [descriptors(victim.pid) for victim in pair]
    daemon = daemons({"version": 1, "targets": [target(v, **keys) for v in pair]} | CROWDED)
    for _ in range(2):
        daemon.allow_again()
        daemon.scan()
        assert oracle.share() >= ENOUGH, daemon.status()
        check_all(pair)
        for victim in pair:
            victim.command("write 1 2")
        check_all(pair)
        for victim in pair:
            victim.command("restore 1 2")
        daemon.give_back()
        check_all(pair)
        assert [descriptors(victim.pid) for victim in pair] == fds
        assert [store_mappings(victim.pid) for victim in pair] == [[], []]
    print([(line["stops"], line["stop_ms_max"]) for line in daemon.status()["targets"]])


@pytest.mark.parametrize("threads", [1, 8, 200])
def test_threads_that_write_elsewhere_are_not_disturbed(victims, daemons, threads):
    pair = [victims("writers", threads=threads, pages=512), victims(pages=512)]
    assert len(list(Path(f"/proc/{pair[0].pid}/task").iterdir())) == threads + 1
    crowd(pair[0])
    merge_and_give_back(pair, daemons)
    pair[0].await_rounds(threads)
    check_all(pair)


@pytest.fixture
def short_of_time() -> Iterator[ControlGroup]:
    """A group whose processes have a fifth of one processor, all together."""
    with made_group("cpu", "short") as group:
        if group.v2:
            (group.folder / "cpu.max").write_text("20000 100000")
        else:
            (group.folder / "cpu.cfs_quota_us").write_text("20000")
        yield group


def test_programs_that_are_short_of_processor_time_are_merged(short_of_time, victims, daemons):
    pair = [victims("writers", threads=2, pages=512), victims(pages=512)]
    for victim in pair:
        short_of_time.put(victim.pid)
    stat = short_of_time.folder / "cpu.stat"

    def throttled() -> int:
        return {k: int(v) for k, v in map(str.split, stat.read_text().splitlines())}["nr_throttled"]

    before = until(throttled, "its processes are held up")
    merge_and_give_back(pair, daemons)
    assert throttled() > before
    pair[0].await_rounds(2)
    check_all(pair)


@pytest.mark.parametrize(
    "kind",
    [
        {"uid": 65534},
        {"namespaces": True},
        {"namespaces": True, "uid": 65534, "spare_fds": 8, "threads": 9, "work": "write"},
    ],
    ids=["nobody", "namespaces", "all of it, few descriptors left"],
)
def test_neither_privileges_nor_a_proc_of_its_own_are_needed(victims, daemons, kind):
    pair = [victims(pages=512, layout="mixed", **kind) for _ in range(2)]
    merge_and_give_back(pair, daemons)


def test_a_full_descriptor_table_is_enough_where_the_hard_limit_leaves_room(victims, daemons):
    pair = [victims("full-fds", pages=256, spare_fds=8) for _ in range(2)]
    limits = []
    for victim in pair:
        _, hard = resource.prlimit(victim.pid, resource.RLIMIT_NOFILE)
        full = max(map(int, descriptors(victim.pid))) + 1
        limits.append((full, hard))
        resource.prlimit(victim.pid, resource.RLIMIT_NOFILE, limits[-1])
    merge_and_give_back(pair, daemons)
    assert [resource.prlimit(v.pid, resource.RLIMIT_NOFILE) for v in pair] == limits


def test_a_descriptor_table_without_room_is_merged_or_refused_by_name(victims, daemons):
    """Five descriptors must be free for the length of a window: its socket and what it carries."""
    pairs = {
        spare: [victims("full-fds", pages=64, spare_fds=spare, seed=spare + 1) for _ in range(2)]
        for spare in range(7)
    }
    every = [victim for pair in pairs.values() for victim in pair]
    oracles = {spare: Oracle(*pair) for spare, pair in pairs.items()}
    before = [descriptors(victim.pid) for victim in every]
    daemon = daemons(settings_for(*every))
    daemon.scan()
    refused = {line["pid"]: line["refused"] for line in daemon.status()["targets"]}
    for spare, pair in pairs.items():
        enough = spare >= 5
        assert {refused[victim.pid] for victim in pair} == {"" if enough else "fd-table"}, spare
        assert oracles[spare].share() == (1 if enough else 0)
    assert daemon.status()["refusals"]["fd-table"] == 10
    assert [descriptors(victim.pid) for victim in every] == before
    check_all(every)
    assert daemon.stop() == 0
    assert [descriptors(victim.pid) for victim in every] == before
    assert not any(store_mappings(victim.pid) for victim in every)
    check_all(every)


def test_a_strict_seccomp_filter_is_refused_by_name(victims, daemons):
    pair = [victims("seccomp", pages=256) for _ in range(2)]
    oracle = Oracle(*pair)
    daemon = daemons(settings_for(*pair))
    daemon.scan()
    assert [line["refused"] for line in daemon.status()["targets"]] == ["seccomp", "seccomp"]
    assert daemon.status()["refusals"]["seccomp"] == 2
    assert "seccomp" in daemon.ctl("why", pair[0].pid)["reason"]
    assert oracle.saved() == 0
    for victim in pair:
        victim.await_rounds(2)
    check_all(pair)


def test_a_strict_seccomp_filter_is_merged_where_the_settings_accept_the_risk(victims, daemons):
    pair = [victims("seccomp", pages=256) for _ in range(2)]
    merge_and_give_back(pair, daemons, accept_seccomp_risk=True)
    for victim in pair:
        victim.await_rounds(2)
    check_all(pair)


@pytest.mark.parametrize("thp", ["on", "madvise", "off"])
def test_memory_in_huge_pages_really_returns(victims, daemons, thp):
    # 2,560 pages: five huge pages; each 1,024th page is the victim's own
    pair = [victims(pages=2560, thp=thp) for _ in range(2)]
    if thp == "on":
        assert all(memory(victim.pid)["AnonHugePages"] == 2560 for victim in pair)
    oracle = Oracle(*pair)
    before = private(pair)
    daemon = daemons(settings_for(*pair))
    daemon.scan()
    assert oracle.share() >= ENOUGH
    freed = before - private(pair)
    print(f"thp={thp}: {freed} pages are no longer private, of {2 * oracle.duplicates}")
    assert freed >= ENOUGH * 2 * oracle.duplicates
    check_all(pair)
    advised = {"on": "hg", "madvise": "hg", "off": "nh"}[thp]
    assert all(flags_everywhere(victim, advised) for victim in pair)
    daemon.give_back()
    assert oracle.saved() == 0
    assert all(flags_everywhere(victim, advised) for victim in pair)
    check_all(pair)


def flags_everywhere(victim, flag):
    """Whether every mapping of a victim's arena, merged or not, has the flag."""
    end = victim.address + victim.pages * PAGE
    arena = [v for v in procfs.smaps(victim.pid) if v.start < end and v.end > victim.address]
    return all(flag in vma.flags for vma in arena)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equal_pages_merge_however_they_are_spread(victims, daemons, layout):
    trio = [victims(pages=1024, layout=layout, offset=offset) for offset in (0, 9, 300)]
    oracle = Oracle(*trio)
    expected = sum(v.equal for v in trio) - trio[0].distinct, sum(v.zero for v in trio)
    assert (oracle.duplicates, oracle.zeros) == expected
    daemon = daemons(settings_for(*trio))
    daemon.scan()
    print(f"{layout}: {oracle.saved()} of {oracle.possible} pages saved")
    assert oracle.share() >= ENOUGH, daemon.status()
    check_all(trio)
    trio[0].command("write 0 32")
    trio[1].command("dontneed 64 40")
    check_all(trio)
    daemon.scan()
    check_all(trio)
    daemon.give_back()
    assert oracle.saved() <= oracle.zeros
    check_all(trio)


@pytest.mark.parametrize("layout", ["tails", "unique"])
def test_pages_that_differ_are_left_as_they_are(victims, daemons, layout):
    pair = [victims(pages=512, layout=layout) for _ in range(2)]
    before = [frames(victim).tolist() for victim in pair]
    daemon = daemons(settings_for(*pair))
    daemon.scan()
    assert [frames(victim).tolist() for victim in pair] == before
    assert [store_mappings(victim.pid) for victim in pair] == [[], []]
    status = daemon.status()
    assert (status["pages_shared"], status["pages_sharing"]) == (0, 0)
    check_all(pair)


def test_a_stopped_victim_stays_stopped_merges_and_continues(victims, daemons):
    pair = [victims("writers", threads=2, pages=512), victims(pages=512)]
    oracle = Oracle(*pair)
    os.kill(pair[0].pid, signal.SIGSTOP)
    daemon = daemons(settings_for(*pair) | CROWDED)
    daemon.scan()
    assert state(pair[0].pid) == "T"
    assert oracle.share() >= ENOUGH
    assert daemon.give_back("--pid", pair[0].pid)["pages"] > 0
    assert state(pair[0].pid) == "T"
    daemon.allow_again()
    daemon.scan()
    assert state(pair[0].pid) == "T"
    os.kill(pair[0].pid, signal.SIGCONT)
    pair[0].await_rounds(4)
    check_all(pair)
