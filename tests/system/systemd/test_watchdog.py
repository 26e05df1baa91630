"""The watchdog of ksmd.service: who is left alone, who is replaced, and what that costs a target.

Most of it is waiting, so it has a machine of its own, beside the other tests.
"""

from __future__ import annotations

import pytest
from beside import Lane, units_installed
from inside import Pair, Service, guarded, merged
from machine import until

pytestmark = pytest.mark.root


lane = Lane(units_installed, "tree")


@lane.test
def test_the_watchdog_leaves_a_daemon_that_works_alone_and_replaces_one_that_hangs(
    service: Service, pair: Pair
) -> None:
    service.drop_in("ksmd.service", "[Service]\nWatchdogSec=3s\n")
    scans = service.settle()["full_scans"]
    before = service.main_pid
    for _ in range(3):
        service.settle()
    service.machine.run("sleep", "3.3")  # more than the watchdog's time, idle
    assert service.status()["full_scans"] > scans
    assert service.main_pid == before
    service.signal("STOP")
    until(lambda: service.has_restarted(before), "another daemon")
    assert "Watchdog timeout" in service.journal("--unit=ksmd")
    assert merged(pair)
    assert guarded(pair)
    assert service.knows_what_is_merged()
