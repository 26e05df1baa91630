"""Merged memory is memory: dropped it is zeros, forked it is the child's, waits are not disturbed.

The tests here run what programs do with their memory while the daemon merges it and gives it back,
over and over, and let the programs themselves judge.
"""

from __future__ import annotations

import errno

import pytest
from harness import (
    CROWDED,
    PAGE,
    Daemon,
    Oracle,
    crowd,
    mappings,
    settings_for,
    store_mappings,
    target,
    until,
)
from victims import WAITS

from ksmd.client import Client

pytestmark = pytest.mark.root

ENOUGH = 0.95

MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25
#: Advice that drops content, or keeps it from children: DONTNEED, FREE, REMOVE, DONTFORK,
#: WIPEONFORK, DONTNEED_LOCKED.
DROPPING = {4, 8, 9, 10, 18, 24}


def check_all(victims) -> None:
    for victim in victims:
        assert victim.check(), victim.report()


class Worker:
    """Merges and gives back, as fast as it goes, through one connection."""

    def __init__(self, daemon: Daemon) -> None:
        self._socket = daemon.socket

    def scan(self) -> int:
        with Client(self._socket, 60) as ksmd:
            return int(ksmd.call("Scan", wait=True)["merged"])

    def round(self) -> int:
        """One merge and one unmerge: pages that were merged."""
        with Client(self._socket, 60) as ksmd:
            ksmd.call("Resume")
            ksmd.call("Pause")
            merged = int(ksmd.call("Scan", wait=True)["merged"])
            assert not ksmd.call("Unmerge", wait=True).get("refused")
        return merged


# -- dropping --------------------------------------------------------------------------------------


def test_dropped_merged_pages_read_as_zeros_and_the_others_as_they_were(victims, daemons):
    pair = [victims(pages=1024, layout="mixed") for _ in range(2)]
    oracle = Oracle(*pair)
    daemon = daemons(settings_for(*pair))
    daemon.scan()
    assert oracle.share() >= ENOUGH
    for first, n in ((0, 1), (5, 9), (30, 200), (1023, 1)):
        assert pair[0].ask(f"dontneed {first} {n}") == {"bad": 0}
    check_all(pair)
    pair[0].command("write 30 10")  # new content where zeros are
    pair[0].command("restore 100 20")
    check_all(pair)
    daemon.scan()
    check_all(pair)
    assert pair[0].ask("dontneed 0 1024") == {"bad": 0}
    check_all(pair)
    daemon.give_back()
    check_all(pair)


def test_a_range_that_readers_hammer_while_it_is_dropped_is_right_at_every_read(victims, daemons):
    pair = [victims(pages=512) for _ in range(2)]
    daemon = daemons(settings_for(*pair) | CROWDED)
    daemon.scan()
    worker = Worker(daemon)
    merged = hammers = 0
    while not merged and hammers < 10:  # what changes all the time merges by chance
        hammers += 1
        for victim in pair:
            victim.begin("hammer 4")
        merged += sum(worker.scan() for _ in range(3))
        for victim in pair:
            found = dict(pair_.split("=") for pair_ in victim.finish().split())
            print(f"3 scans meanwhile merged {merged} pages; {found}")
            assert found["bad"] == found["stale"] == "0"
            assert int(found["drops"]) > 0
            assert int(found["reads"]) > 0
    assert merged > 0
    oracle = Oracle(*pair)
    daemon.scan()
    assert oracle.share() >= ENOUGH
    check_all(pair)


# -- forking ---------------------------------------------------------------------------------------


def test_a_forked_child_of_a_merged_process_reads_writes_and_drops_correctly(victims, daemons):
    pair = [victims(pages=1024, layout="mixed") for _ in range(2)]
    oracle = Oracle(*pair)
    daemon = daemons(settings_for(*pair))
    daemon.scan()
    assert oracle.share() >= ENOUGH
    for _ in range(5):
        for victim in pair:
            assert victim.ask("fork") == {"child": 0, "bad": 0}
    assert oracle.share() >= ENOUGH
    check_all(pair)


def test_a_process_may_fork_while_it_is_merged_and_while_it_is_given_back(victims, daemons):
    pair = [victims(pages=1024) for _ in range(2)]
    worker = Worker(daemons(settings_for(*pair) | CROWDED))
    merged = 0
    for _ in range(8):
        for victim in pair:
            victim.begin("fork")
        merged += worker.round()
        for victim in pair:
            assert victim.finish() == "child=0 bad=0"
    print(f"{merged} pages merged beside 16 forks")
    check_all(pair)


def test_a_child_that_lives_on_keeps_its_memory_when_its_parent_is_given_back(actors, daemons):
    pair = [actors(512) for _ in range(2)]
    before = pair[0].ask("sum")
    oracle = Oracle(*pair)
    daemon = daemons(settings_for(*pair))
    daemon.scan()
    assert oracle.share() >= ENOUGH
    child = pair[0].ask("fork")["pid"]
    assert store_mappings(child)
    assert pair[0].ask("child dontneed 10 5") == {"errno": 0, "bad": 0}
    assert pair[0].ask("child write 20") == {}
    changed = pair[0].ask("child sum 16 496")
    daemon.give_back()
    assert store_mappings(pair[0].pid) == []
    assert pair[0].ask("child sum 16 496") == changed
    assert pair[0].ask("child dontneed 100 300") == {"errno": 0, "bad": 0}
    assert daemon.stop() == 0
    assert pair[0].ask("child dontneed 0 512") == {"errno": 0, "bad": 0}
    assert [actor.ask("sum") for actor in pair] == [before, before]


# -- what else programs do with their memory -------------------------------------------------------


@pytest.fixture
def merged_actors(actors, daemons):
    """Two actors, wholly merged, their sum before, and the daemon."""
    pair = [actors(256) for _ in range(2)]
    before = pair[0].ask("sum")
    oracle = Oracle(*pair)
    daemon = daemons(settings_for(*pair))
    daemon.scan()
    assert oracle.share() == 1
    return pair, before, daemon


def test_merged_memory_may_be_moved(merged_actors):
    (actor, other), before, daemon = merged_actors
    assert actor.ask("move")["errno"] == 0
    assert actor.ask("sum") == before
    assert actor.ask("dontneed 3 10") == {"errno": 0, "bad": 0}
    rest = actor.ask("sum 13 243")
    daemon.give_back()
    assert store_mappings(actor.pid) == []
    assert actor.ask("sum 13 243") == rest
    assert other.ask("sum") == before


def test_memory_that_merged_memory_grows_by_is_zeros(merged_actors):
    (actor, other), before, daemon = merged_actors
    assert actor.ask("grow 64") == {"errno": 0, "bad": 0}
    assert actor.ask("sum 0 256") == before
    daemon.give_back()
    assert actor.ask("sum 0 256") == before
    assert actor.ask("dontneed 256 64") == {"errno": 0, "bad": 0}
    assert other.ask("sum") == before


def test_memory_that_is_merged_in_part_cannot_be_moved_as_one(actors, daemons):
    pair = [actors(256), actors(256)]
    for page in range(128):
        pair[0].ask(f"write {page}")  # so nobody has the like
    before = pair[0].ask("sum")
    daemon = daemons(settings_for(*pair))
    daemon.scan()
    assert store_mappings(pair[0].pid)
    answer = pair[0].ask("move")
    print(answer)
    # README.md, Limits: Linux 6.17 and later have moved what lies before the border by then
    assert answer in ({"errno": errno.EFAULT, "moved": moved} for moved in (0, 128))
    assert pair[0].ask("sum") == before
    daemon.give_back("--pid", pair[0].pid)
    if answer["moved"]:  # before, several mappings could not be moved at all
        assert pair[0].ask("move")["errno"] == 0
    assert pair[0].ask("sum") == before


def test_a_userfaultfd_of_its_own_has_to_wait_until_memory_is_given_back(actors, daemons):
    pair = [actors(256), actors(256)]
    for page in range(128):
        pair[0].ask(f"write {page}")  # so nobody has the like: candidates, not merged
    daemon = daemons(settings_for(*pair))
    daemon.scan()
    assert store_mappings(pair[0].pid)
    assert pair[0].ask("watch 0 128") == {"errno": 0, "unregister": errno.EINVAL}
    assert pair[0].ask("watch 128 128") == {"errno": errno.EBUSY, "unregister": errno.EINVAL}
    assert pair[0].ask("watch 120 16") == {"errno": errno.EBUSY, "unregister": errno.EINVAL}
    daemon.give_back("--pid", pair[0].pid)
    assert pair[0].ask("watch 0 256") == {"errno": 0, "unregister": 0}


def test_merged_memory_may_be_made_read_only_and_stays_so(merged_actors):
    (actor, other), before, daemon = merged_actors
    assert actor.ask("readonly 10 50") == {"errno": 0}
    daemon.give_back()
    assert store_mappings(actor.pid) == []
    start = actor.region[0] + 10 * PAGE
    assert [perms for at, _, perms, _ in mappings(actor.pid) if at == start] == ["r--p"]
    assert actor.ask("writable 10 50") == {"errno": 0}
    actor.ask("write 10 50")
    actor.ask("write 10 50")
    assert [actor.ask("sum"), other.ask("sum")] == [before, before]


def test_merged_memory_may_be_unmapped_and_its_place_used_anew(merged_actors):
    (actor, other), before, daemon = merged_actors
    assert actor.ask("unmap 100 50") == {"errno": 0}
    assert actor.ask("map 100 50") == {"errno": 0, "bad": 0}
    rest = actor.ask("sum 0 100")
    actor.ask("write 100 50")
    whole = actor.ask("sum")
    daemon.scan()
    daemon.give_back()
    assert actor.ask("sum 0 100") == rest
    assert actor.ask("sum") == whole
    assert other.ask("sum") == before


def test_advice_that_drops_nothing_changes_nothing(merged_actors):
    (actor, other), before, daemon = merged_actors
    for advice in range(26):
        if advice not in DROPPING:
            actor.ask(f"advise 0 256 {advice}")
            assert (advice, actor.ask("sum")) == (advice, before)
    assert actor.ask("dontneed 7 9") == {"errno": 0, "bad": 0}
    rest = actor.ask("sum 16 240")
    assert rest == other.ask("sum 16 240")
    daemon.give_back()
    assert actor.ask("sum 16 240") == rest
    assert other.ask("sum") == before


@pytest.mark.parametrize("change", ["write 1000", "dontneed 1000 1", "readonly 1000 1", "fork"])
def test_merged_memory_may_be_made_huge_and_then_used_in_parts(actors, daemons, change):
    """A huge page table entry that is split leaves no small ones: all 512 pages fault again."""
    pair = [actors(2048) for _ in range(2)]
    before = pair[0].ask("sum")
    oracle = Oracle(*pair)
    daemon = daemons(settings_for(*pair))
    daemon.scan()
    assert oracle.share() == 1
    actor, other = pair
    assert actor.ask(f"advise 0 2048 {MADV_HUGEPAGE}") == {"errno": 0}
    aligned = -actor.region[0] // PAGE % 512
    for block in range(aligned, 2048 - 511, 512):
        actor.ask(f"advise {block} 512 {MADV_COLLAPSE}")
    assert [actor.ask("sum"), other.ask("sum")] == [before, before]
    actor.ask(change)
    who = "child " if change == "fork" else ""
    for part in ("0 1000", "1001 1047"):
        assert actor.ask(f"{who}sum {part}") == other.ask(f"sum {part}")
    assert other.ask("sum") == before


# -- waiting and computing -------------------------------------------------------------------------


def test_no_wait_is_ever_cut_short_by_any_number_of_merges(victims, daemons):
    """Each kind of wait alone in a process, and all together in one, through 12 rounds."""
    every = [victims(wait, pages=64, threads=0, work=wait) for wait in WAITS]
    every += [victims(wait, pages=64) for wait in WAITS]
    every += [victims("all", pages=64)]
    worker = Worker(daemon := daemons(settings_for(*every) | CROWDED))
    merged = sum(worker.round() for _ in range(12))
    stops = {line["pid"]: line["stops"] for line in daemon.status()["targets"]}
    print(f"{merged} pages merged; stops of each: {sorted(stops.values())}")
    for victim in every:
        assert stops[victim.pid] >= 12, "it was not stopped often enough to prove anything"
        assert not victim.errors(), victim.report()
        victim.await_rounds(2)
    check_all(every)


def test_registers_of_busy_threads_survive_merges(victims, daemons):
    pair = [victims("compute", pages=128) for _ in range(2)]
    daemon = daemons(settings_for(*pair) | CROWDED)
    worker = Worker(daemon)
    # one more than is asked for: before the first the daemon may have merged all by itself
    assert sum(worker.round() for _ in range(9)) >= 8 * 250
    for victim in pair:
        victim.await_rounds(4)
    check_all(pair)


def test_a_target_may_end_at_any_moment(victims, daemons):
    stay = [victims(pages=256) for _ in range(2)]
    leave = [victims("writers", threads=1, pages=256) for _ in range(4)]
    crowd(*leave)
    daemon = daemons({"version": 1, "targets": [target(v) for v in (*stay, *leave)]} | CROWDED)
    for victim in leave:
        daemon.ctl("scan")  # does not wait
        victim.stop()
    daemon.scan()
    assert {line["pid"] for line in daemon.status()["targets"]} == {v.pid for v in stay}
    assert Oracle(*stay).share() == 1
    check_all(stay)
    for victim in stay:
        victim.stop()
    until(lambda: daemon.scan()["settled"] and not daemon.status()["targets"], "nobody is left")
    assert daemon.status()["pages_shared"] == 0
    assert daemon.stop() == 0
