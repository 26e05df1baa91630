"""Programs in memory cgroups with a limit: what merging made room for may be in use by now.

A program whose pages all come back then would be killed by the kernel, or others of its group. So
nothing is given back that does not fit, and a window is not even opened where a group is full.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator

import pytest
from actor import Actor
from control_groups import ControlGroup, made_group
from harness import PAGE, Daemon, settings_for, store_mappings

pytestmark = pytest.mark.root

MIB = 1 << 20
PAGES = 16 * MIB // PAGE
StartActor = Callable[[int], Actor]
LIMIT = 24 * MIB


class MemoryGroup:
    """A memory cgroup of our own."""

    def __init__(self, group: ControlGroup) -> None:
        self._group = group
        self.folder, self.put = group.folder, group.put

    def limit(self, nbytes: int) -> None:
        """Have it take no more than *nbytes*."""
        self._group.file("memory.limit_in_bytes", "memory.max").write_text(str(nbytes))

    def used(self) -> int:
        """Give the bytes that it has taken."""
        return int(self._group.file("memory.usage_in_bytes", "memory.current").read_text())

    def kills(self) -> int:
        """Tell how often the kernel has killed somebody in it for want of memory."""
        text = self._group.file("memory.oom_control", "memory.events").read_text()
        return {key: int(value) for key, value in map(str.split, text.splitlines())}["oom_kill"]


@pytest.fixture
def groups() -> Iterator[Callable[[str], MemoryGroup]]:
    """Make groups: ``groups(name)``."""
    with contextlib.ExitStack() as stack:
        yield lambda name: MemoryGroup(stack.enter_context(made_group("memory", name)))


def inside(actors: StartActor, group: MemoryGroup, pages: int = PAGES) -> Actor:
    """Start an actor in a group. (Fixtures end in turn: let ``groups`` be asked for first.)"""
    actor = actors(pages)
    group.put(actor.pid)
    actor.exec()  # what it had before stays charged to where it was
    return actor


def merged_pair(groups, actors, daemons) -> tuple[MemoryGroup, Actor, Actor, Daemon]:
    """One actor beside a group and one in it, merged; another one has taken most of its room."""
    group = groups("full")
    group.limit(LIMIT)
    outside, within = actors(PAGES), inside(actors, group)
    daemon = daemons(settings_for(outside, within))
    daemon.scan()
    assert store_mappings(within.pid)
    assert group.used() < LIMIT // 2, "what is merged is still charged to the group"
    inside(actors, group, 14 * MIB // PAGE)
    return group, outside, within, daemon


def test_what_does_not_fit_into_its_group_is_not_given_back(groups, actors, daemons):
    group, outside, within, daemon = merged_pair(groups, actors, daemons)
    before, maps = within.ask("sum"), store_mappings(within.pid)

    refused = daemon.run_ctl("unmerge", "--wait", "--pid", within.pid)
    print(refused.stderr)
    assert refused.returncode == 1
    assert f"unmerging process {within.pid} takes 16 MiB" in refused.stderr
    assert f"{group.folder} has room for" in refused.stderr
    assert "below its limit of 24 MiB" in refused.stderr
    assert store_mappings(within.pid) == maps

    answer = json.loads(daemon.run_ctl("unmerge", "--wait").stdout)
    print(answer)
    (one,) = answer["refused"]
    assert one["reason"] == "memory"
    assert str(group.folder) in one["detail"]
    assert not store_mappings(outside.pid)
    assert store_mappings(within.pid) == maps
    assert daemon.status_of(within)["refused"] == "memory"

    findings = json.loads(daemon.run_ctl("doctor", "--config", daemon.config).stdout)["findings"]
    assert any(str(group.folder) in found["what"] for found in findings), findings
    assert (within.ask("sum"), group.kills()) == (before, 0)

    group.limit(2 * LIMIT)
    daemon.give_back()
    assert not store_mappings(within.pid)
    assert (within.ask("sum"), group.kills()) == (before, 0)


def test_a_daemon_that_stops_leaves_it_merged_and_guarded(groups, actors, daemons):
    group, outside, within, daemon = merged_pair(groups, actors, daemons)
    before = within.ask("sum")
    assert daemon.stop() == 1
    daemon.await_log(f"memory cgroup {group.folder} has room for")
    assert not store_mappings(outside.pid)
    assert store_mappings(within.pid)
    assert within.ask("sum") == before
    assert within.ask("dontneed 0 64") == {"errno": 0, "bad": 0}
    assert group.kills() == 0


def test_no_window_is_opened_in_a_full_group(groups, actors, daemons):
    group = groups("brim")
    group.limit(LIMIT)
    trio = actors(PAGES), actors(PAGES), inside(actors, group)
    before = [actor.ask("sum") for actor in trio]
    group.limit(group.used() + (300 << 10))  # less than any window takes
    daemon = daemons(settings_for(*trio))
    daemon.scan()
    within = trio[2]
    assert daemon.status_of(within)["refused"] == "memory"
    assert not store_mappings(within.pid)
    assert all(store_mappings(actor.pid) for actor in trio[:2])

    group.limit(LIMIT)
    daemon.scan()
    assert daemon.status_of(within)["refused"] == ""
    assert store_mappings(within.pid)
    assert [actor.ask("sum") for actor in trio] == before
    assert group.kills() == 0


def test_the_store_keeps_within_the_group_of_ksmd(groups, actors, daemons):
    group = groups("ours")
    group.limit(64 * MIB)
    pair = actors(PAGES), actors(PAGES)
    daemon = daemons(settings_for(*pair))
    group.put(daemon.pid)
    daemon.scan()
    status = daemon.status()
    assert status["refusals"]["store-full"]
    assert status["pages_sharing"] == 0
    daemon.await_log("the store cannot grow")

    group.limit(512 * MIB)
    daemon.scan()
    assert daemon.status()["pages_sharing"] > 0
    assert group.used() > 16 * MIB
    assert group.kills() == 0
