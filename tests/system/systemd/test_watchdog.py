"""The watchdog of ksmd.service: who is left alone, who is replaced, and what that costs a target.

Most of it is waiting, so it has a machine of its own, beside the other tests.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import pytest
from beside import Lane, units_installed
from inside import Pair, Service, guarded, merged, right
from machine import until

from ksmd.model.errors import KsmdError

pytestmark = pytest.mark.root

lane = Lane(units_installed, "tree")


def fed(service: Service) -> int:
    """When the watchdog was fed last, in microseconds."""
    return int(service.machine.show("ksmd.service", "WatchdogTimestampMonotonic"))


@contextlib.contextmanager
def a_scan(service: Service) -> Iterator[threading.Thread]:
    """Somebody waits for a scan, whatever comes of that."""

    def wait() -> None:
        with contextlib.suppress(KsmdError, OSError):
            service.call("Scan", wait=True)

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield thread
    finally:
        thread.join()


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


@pytest.mark.slow
@lane.test
def test_a_tracer_that_hangs_is_replaced_before_the_watchdog_loses_patience(
    service: Service, pair: Pair
) -> None:
    # fed every four seconds by a daemon that gets on with its work
    service.drop_in("ksmd.service", "[Service]\nWatchdogSec=16s\n")
    service.status()
    main, tracer = service.main_pid, service.helper("ksmd-tracer")
    service.signal("STOP", tracer)
    with a_scan(service) as scan:
        time.sleep(1)
        before = fed(service)
        time.sleep(6)
        assert fed(service) == before
        assert scan.is_alive()  # it waits for that tracer
    assert right(pair)
    service.settle()
    assert service.helper("ksmd-tracer") != tracer
    assert service.machine.code("test", "-e", f"/proc/{tracer}") == 1
    assert service.main_pid == main
    until(lambda: fed(service) > before, "the watchdog fed again")
    until(lambda: service.settle() and merged(pair), "all merged by another tracer")
    assert guarded(pair)


@lane.test
def test_a_daemon_that_waits_for_a_tracer_for_too_long_is_replaced_with_it(
    service: Service, pair: Pair
) -> None:
    service.settle()
    assert merged(pair)
    service.call("Unmerge", wait=True)
    service.machine.run("systemctl", "stop", "ksmd.service")
    service.drop_in("ksmd.service", "[Service]\nWatchdogSec=3s\n")
    service.status()
    main, tracer = service.main_pid, service.helper("ksmd-tracer")
    service.signal("STOP", tracer)
    with a_scan(service):
        until(lambda: service.has_restarted(main), "another daemon")
    assert "Watchdog timeout" in service.journal("--unit=ksmd")
    # else the window that it was asked for would come when nobody reckons with it
    assert service.machine.code("test", "-e", f"/proc/{tracer}") == 1
    assert right(pair)
    until(lambda: service.settle() and merged(pair), "all merged by another tracer")
    assert guarded(pair)
