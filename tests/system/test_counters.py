"""Counters against an oracle: victims say how many pages of each sort they hold, to the page.

The daemon starts without targets and is paused before it is told of them, so that no scan but the
asked ones ever sees them and every number can be exact.
"""

from __future__ import annotations

import signal

import pytest
from harness import PAGE, Oracle, settings_for

pytestmark = pytest.mark.root

COUNTERS = ("pages_shared", "pages_sharing", "pages_unshared", "zero_pages", "cow_breaks")


@pytest.fixture
def counted(daemons):
    """Start a daemon that has seen nothing of its targets yet: ``counted(*victims)``."""

    def start(*victims):
        daemon = daemons({"version": 1})
        daemon.configure(settings_for(*victims))
        daemon.send(signal.SIGHUP)
        daemon.await_log("settings read again")
        return daemon

    return start


def counters(daemon) -> tuple[int, ...]:
    status = daemon.status()
    return tuple(status[name] for name in COUNTERS)


@pytest.mark.parametrize("layout", ["mixed", "runs:short", "unique", "zeros", "tails"])
def test_every_page_is_counted_once_and_under_its_right_name(victims, counted, layout):
    trio = [victims(pages=320, layout=layout) for _ in range(3)]
    equal, unique, zero = (sum(getattr(v, k) for v in trio) for k in ("equal", "unique", "zero"))
    distinct = trio[0].distinct
    daemon = counted(*trio)
    assert counters(daemon) == (0, 0, 0, 0, 0)
    answer = daemon.ctl("scan", "--wait")
    assert answer["merged"] == equal + zero
    # a page's second sight is the compare in its window; after a merge the rest is scanned again
    passes = 2 if equal + zero else 1
    scanned = 960 + (960 - equal - zero if equal + zero else 0)
    assert (answer["passes"], answer["scanned"]) == (passes, scanned)
    status = daemon.status()
    print({name: status[name] for name in COUNTERS})
    assert counters(daemon) == (distinct, equal - distinct, unique, zero, 0)
    assert (status["full_scans"], status["pages_scanned"]) == (passes, scanned)
    assert (status["pages_volatile"], status["pages_skipped"]) == (0, 0)
    assert status["headroom_bytes"] == PAGE * (equal + zero)
    assert status["general_profit"] < PAGE * (equal - distinct + zero)
    for victim, line in zip(trio, status["targets"], strict=True):
        assert (line["merging_pages"], line["zero_pages"]) == (victim.equal, victim.zero)
        assert line["refused"] == ""
    assert status["stops"] == sum(line["stops"] for line in status["targets"])
    assert bool(status["stops"]) == bool(equal + zero)
    longest = max(line["stop_ms_max"] for line in status["targets"])
    assert status["stop_ms_p99"] <= status["stop_ms_max"] == longest
    assert daemon.scan()["merged"] == 0
    assert counters(daemon) == (distinct, equal - distinct, unique, zero, 0)


def test_writes_are_counted_as_breaks_and_what_is_equal_again_merges_again(victims, counted):
    trio = [victims(pages=256) for _ in range(3)]
    oracle = Oracle(*trio)
    daemon = counted(*trio)
    daemon.scan()
    assert counters(daemon) == (256, 512, 0, 0, 0)
    trio[0].command("write 10 7")
    trio[1].command("write 200")
    daemon.scan()
    assert counters(daemon) == (256, 504, 0, 0, 8)
    assert [line["cow_breaks"] for line in daemon.status()["targets"]] == [7, 1, 0]
    assert oracle.saved() == 504
    trio[0].command("restore 10 7")
    assert daemon.scan()["merged"] == 7
    assert counters(daemon) == (256, 511, 0, 0, 8)
    assert oracle.saved() == 511
    trio[0].command("write 10 2")
    trio[1].command("restore 200")
    daemon.scan()
    assert counters(daemon) == (256, 510, 0, 0, 10)
    for victim in trio:
        assert victim.check(), victim.report()
        assert daemon.status_of(victim)["merging_pages"] == (254 if victim is trio[0] else 256)


def test_a_page_that_all_but_one_have_left_is_no_longer_shared(victims, counted):
    pair = [victims(pages=64) for _ in range(2)]
    daemon = counted(*pair)
    daemon.scan()
    assert counters(daemon)[:2] == (64, 64)
    pair[0].command("write 0 4")
    pair[1].command("write 2 4")
    daemon.scan()
    # pages 2 and 3 have no user left, 0, 1, 4 and 5 one each
    assert counters(daemon)[:2] == (62, 58)
    pair[0].command("dontneed 10 5")
    pair[1].command("dontneed 10 5")
    daemon.scan()
    assert counters(daemon)[:2] == (57, 53)


def test_zero_pages_that_were_written_to_are_counted_no_longer(victims, counted):
    one = victims(pages=128, layout="zeros")
    daemon = counted(one)
    daemon.scan()
    assert counters(daemon) == (0, 0, 0, 128, 0)
    one.command("write 5 3")
    daemon.scan()
    assert counters(daemon) == (0, 0, 3, 125, 0)
    one.command("restore 5 3")
    daemon.scan()
    assert counters(daemon) == (0, 0, 0, 128, 0)
    assert one.check(), one.report()


def test_unmerge_brings_the_counters_back_to_nothing(victims, counted):
    trio = [victims(pages=320, layout="mixed") for _ in range(3)]
    daemon = counted(*trio)
    daemon.scan()
    trio[0].command("write 0 5")
    given = daemon.give_back("--pid", trio[2].pid)["pages"]
    assert given == trio[2].equal
    assert daemon.status()["pages_sharing"] == 2 * trio[0].equal - 5 - (trio[0].distinct)
    daemon.give_back()
    status = daemon.status()
    assert (status["pages_shared"], status["pages_sharing"]) == (0, 0)
    assert [line["merging_pages"] for line in status["targets"]] == [0, 0, 0]
