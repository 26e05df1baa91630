"""ksmd.service without ksmd-pager.service: its own pager, and its own store of descriptors.

Should every process of the unit be killed at once, the guard stands, and the next ksmd takes over.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from beside import Lane, Story
from inside import (
    PAGES,
    SETTINGS,
    Pair,
    Service,
    Target,
    answers,
    as_shipped,
    dropped,
    given_back,
    guarded,
    installed,
    merged,
    right,
    two_targets,
)
from machine import Machine, until

pytestmark = pytest.mark.root


@contextlib.contextmanager
def without_the_unit(tree: Path) -> Iterator[Callable[[Story], None]]:
    """A machine of its own, whose pager's unit cannot be started.

    Each test gets ksmd.service, paused, with nothing merged, and two victims.
    """
    with installed(tree) as machine:
        machine.run("systemctl", "mask", "--runtime", "ksmd-pager.service")

        def play(story: Story) -> None:
            with as_shipped(machine) as made:
                machine.run("systemctl", "start", "ksmd.service")
                made.call("Unmerge", wait=True)
                with two_targets(machine) as pair:
                    story(made, pair)

        yield play


lane = Lane(without_the_unit, "tree")


def processes(machine: Machine) -> list[str]:
    """The processes of the unit: ksmd, its tracer and its pager."""
    members = "/sys/fs/cgroup/system.slice/ksmd.service/cgroup.procs"
    return machine.run("cat", members, check=False).split()  # without any it is gone


def stored(service: Service) -> int:
    return int(service.machine.show("ksmd.service", "NFileDescriptorStore"))


def kill_all(service: Service) -> None:
    """Kill every process of the unit at once, and see that it is so."""
    pids = processes(service.machine)
    names = service.machine.run("cat", *(f"/proc/{pid}/comm" for pid in pids)).split()
    assert {"ksmd-main", "ksmd-tracer", "ksmd-pager"} <= set(names)
    # the tracer may have died of the daemon's death by the time that it is its turn
    service.machine.run("kill", "-KILL", *pids, check=False)
    gone = ("sh", "-c", " && ".join(f"! test -e /proc/{pid}" for pid in pids))
    until(lambda: service.machine.code(*gone) == 0, f"the end of {names}")


@lane.test
def test_when_all_are_killed_the_guard_stands_and_the_next_daemon_takes_everything_over(
    alone: Service, pair: Pair
) -> None:
    assert alone.settle()["pages_sharing"] >= 0.9 * PAGES
    assert all(int(pid) > 0 for pid in answers(pair, "fork"))  # children that share it
    assert answers(pair, "child check") == ["right", "right"]
    # two contexts for each target, one for each child of it, two files of notes, an extent at least
    until(lambda: stored(alone) >= 2 * 2 + 2 + 2 + 1, "all in the store")
    alone.drop_in("ksmd.service", "[Service]\nRestartSec=2s\n")  # time to look around
    kill_all(alone)
    assert processes(alone.machine) == []
    assert merged(pair)

    pair[0].order("drop 77")
    pair[1].order("child drop 78")
    time.sleep(0.3)
    assert processes(alone.machine) == []  # nobody is there to answer
    assert not any(one.has_answered() for one in pair)
    assert [one.answer() for one in pair] == ["0", "0"]  # the next pager did

    alone.drop_in("ksmd.service", "")
    until(lambda: alone.state == "active/running/success", "the next daemon")
    assert right(pair)
    assert answers(pair, "child check") == ["right", "right"]
    told = alone.journal("--unit=ksmd")
    assert re.search(r"adopted what an earlier ksmd left: \d targets, \d extents", told)
    assert "nobody guards" not in told
    assert "lost its pins" in told  # io_uring cannot be stored: all were given back, to merge anew
    assert alone.settle()["pages_sharing"] >= 0.9 * PAGES
    assert merged(pair)
    assert answers(pair, "write 5") == ["done", "done"]
    assert answers(pair, "drop 79") == ["0", "0"]
    assert answers(pair, "child write 6") == ["done", "done"]
    assert answers(pair, "child drop 80") == ["0", "0"]
    assert right(pair)
    assert answers(pair, "child check") == ["right", "right"]


@lane.test
def test_what_it_stores_goes_with_the_targets_and_is_still_there_after_a_restart(
    alone: Service, pair: Pair
) -> None:
    machine = alone.machine
    third = Target(machine)
    alone.settle()
    until(lambda: stored(alone) >= 3 * 2 + 2 + 1, "three targets in the store")
    main, pager = alone.main_pid, machine.run("pgrep", "^ksmd-pager")
    third.end()
    alone.settle()  # notices it
    before = until(lambda: 0 < stored(alone) <= 2 * 2 + 2 + 2 and stored(alone), "the third's end")
    machine.run("systemctl", "restart", "ksmd.service")
    assert merged(pair)
    assert guarded(pair)
    assert alone.main_pid not in (0, main)
    assert machine.run("pgrep", "^ksmd-pager") == pager
    assert stored(alone) == before
    assert alone.knows_what_is_merged()
    alone.signal("KILL")  # the pager goes on, and nothing is taken from the store
    assert dropped(pair) == ["0", "0"]
    until(lambda: alone.main_pid not in (0, main), "another daemon")
    assert machine.run("pgrep", "^ksmd-pager") == pager
    assert stored(alone) == before
    alone.status()  # it has taken over

    machine.run("systemctl", "stop", "ksmd.service")
    assert given_back(pair)
    assert machine.code("pgrep", "^ksmd-(main|tracer|pager)") == 1
    assert stored(alone) == 0


@lane.test
def test_with_wrong_settings_the_next_daemon_hands_all_to_a_pager_and_fails(
    alone: Service, pair: Pair
) -> None:
    alone.settle()
    until(lambda: stored(alone) >= 2 * 2 + 2 + 1, "all in the store")
    alone.settings("version: 1\nrun: stop\n")  # ksmd.yaml says merge
    kill_all(alone)
    assert dropped(pair) == ["0", "0"]  # whoever answers
    until(lambda: alone.state == "failed/failed/exit-code", "the failure")
    assert alone.machine.show("ksmd.service", "ExecMainStatus") == "2"
    assert stored(alone) == 0  # a unit that has failed for good keeps nothing
    assert merged(pair)
    assert guarded(pair)
    assert "is guarded by the pager" in alone.journal("--unit=ksmd")
    alone.settings(SETTINGS)
    alone.machine.run("systemctl", "reset-failed", "ksmd.service")
    assert alone.settle()["pages_sharing"] >= 0.9 * PAGES
    assert guarded(pair)


@lane.test
def test_what_does_not_fit_into_the_store_costs_no_target_a_byte(
    alone: Service, pair: Pair
) -> None:
    # room for the notes and a context: no extent comes back; what is stored already would stay
    alone.machine.run("systemctl", "stop", "ksmd.service")
    alone.drop_in("ksmd.service", "[Service]\nFileDescriptorStoreMax=4\n")
    alone.settle()
    until(lambda: stored(alone) == 4, "a full store")
    assert "more fds than FileDescriptorStoreMax=4" in alone.journal("--unit=ksmd")
    main = alone.main_pid
    kill_all(alone)
    until(lambda: alone.main_pid not in (0, main), "another daemon")
    alone.settle()
    assert right(pair)
    assert guarded(pair)
    alone.machine.run("systemctl", "stop", "ksmd.service")
    assert right(pair)
