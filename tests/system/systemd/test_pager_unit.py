"""ksmd-pager.service under a real systemd: restarts and accidents of ksmd leave the guard alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from beside import Lane, units_installed
from inside import PAGES, Pair, Service, given_back, guarded, merged
from machine import until

import ksmd

pytestmark = pytest.mark.root

lane = Lane(units_installed, "tree")
VERSION_FILE = "/opt/ksmd/lib/python3*/site-packages/ksmd/__init__.py"


@lane.test
def test_it_is_started_before_ksmd_and_stopped_after_it(service: Service) -> None:
    service.machine.run("systemctl", "stop", "ksmd-pager.service")
    service.status()
    pager, main = service.pager_pid, service.main_pid
    assert 0 not in (pager, main)
    assert pager != main
    assert "ksmd-pager.service" in service.machine.show("ksmd.service", "After")
    cgroup = service.machine.run("cat", f"/proc/{pager}/cgroup")
    assert cgroup.endswith("/ksmd-pager.service")
    assert service.machine.show("ksmd-pager.service", "OOMScoreAdjust") == "-1000"


def test_its_sandbox_is_that_of_ksmd() -> None:
    """What it runs before it stops does what ksmd does."""

    def sandbox(name: str) -> list[str]:
        text = (Path(ksmd.__file__).parents[1] / "systemd" / name).read_text()
        lines = text.partition("# --- sandbox")[2].partition("[Install]")[0].splitlines()
        return [line for line in lines if line and not line.startswith(("#", "-"))]

    assert sandbox("ksmd-pager.service") == sandbox("ksmd.service")
    assert len(sandbox("ksmd.service")) > 30


@lane.test
def test_a_restart_of_ksmd_leaves_all_merged_and_the_pager_untouched(
    running: Service, pair: Pair
) -> None:
    counted = running.settle()["full_scans"]
    pager, main = running.pager_pid, running.main_pid
    assert merged(pair)
    running.machine.run("systemctl", "restart", "ksmd.service")
    assert merged(pair)  # although on_stop is unmerge
    assert running.status()["full_scans"] >= counted >= 1  # as if nothing had happened
    assert guarded(pair)
    assert running.knows_what_is_merged()
    assert running.pager_pid == pager
    assert running.main_pid not in (0, main)
    assert "stopping for a restart" in running.journal("--unit=ksmd")


@lane.test
def test_an_upgrade_of_ksmd_replaces_the_pager_and_leaves_all_merged(
    running: Service, pair: Pair
) -> None:
    running.settle()
    pager = running.pager_pid

    def install(version: str) -> None:
        change = f's/^__version__ = .*/__version__ = "{version}"/'
        running.machine.run("sh", "-c", f"sed -i '{change}' {VERSION_FILE}")
        running.machine.run("systemctl", "try-restart", "ksmd.service")  # as the package does

    try:
        install("99.0")
        assert merged(pair)
        assert guarded(pair)
        assert running.knows_what_is_merged()
        assert running.pager_pid not in (0, pager)
        assert running.machine.run("pgrep", "^ksmd-pager") == str(running.pager_pid)
    finally:
        install(ksmd.__version__)
    assert running.knows_what_is_merged()
    assert guarded(pair)


@lane.test
def test_stopping_ksmd_with_on_stop_keep_leaves_the_guard_and_stopping_the_pager_unmerges(
    service: Service, pair: Pair
) -> None:
    machine = service.machine
    machine.run("sed", "-i", "s/^on_stop:.*/on_stop: keep/", "/etc/ksmd/ksmd.yaml")
    try:
        service.settle()
        pager = service.pager_pid
        machine.run("systemctl", "stop", "ksmd.service")
        assert merged(pair)
        assert guarded(pair)
        assert service.pager_pid == pager
        machine.run("systemctl", "stop", "ksmd-pager.service")
        assert given_back(pair)
        assert machine.show("ksmd-pager.service", "Result") == "success"
        assert service.state == "inactive/dead/success"  # nor was it started to help
        assert machine.code("pgrep", "^ksmd-(main|tracer|pager)") == 1
    finally:
        machine.run("sed", "-i", "s/^on_stop:.*/on_stop: unmerge/", "/etc/ksmd/ksmd.yaml")


@lane.test
def test_stopping_the_pager_under_a_ksmd_that_runs_unmerges_until_it_is_started_again(
    running: Service, pair: Pair
) -> None:
    machine, main = running.machine, running.main_pid
    running.call("Resume")
    running.settle()
    assert merged(pair)
    machine.run("systemctl", "stop", "ksmd-pager.service")
    assert given_back(pair)
    assert running.main_pid == main
    assert running.status()["paused"]  # it has a pager of its own by now
    running.call("Scan")  # and merges where somebody wants it
    until(lambda: merged(pair), "all merged once more")
    machine.run("systemctl", "start", "ksmd-pager.service")
    pager = running.pager_pid
    until(lambda: machine.run("pgrep", "^ksmd-pager") == str(pager), "the move to that pager")
    assert running.knows_what_is_merged()
    assert not running.status()["paused"]
    assert guarded(pair)

    machine.run("systemctl", "restart", "ksmd-pager.service")
    until(lambda: not running.status()["paused"], "another pager")
    assert running.pager_pid not in (0, pager)
    assert running.knows_what_is_merged()  # again, by its own scans
    assert machine.run("pgrep", "^ksmd-pager") == str(running.pager_pid)
    assert running.main_pid == main
    assert guarded(pair)


@lane.test
def test_a_pager_that_stands_by_for_another_socket_is_told_of(service: Service) -> None:
    there = "/usr/bin/ksmd pager --socket /run/ksmd/another.sock"
    stop = "ExecStop=\nExecStop=/bin/true\n"
    service.machine.run("systemctl", "stop", "ksmd-pager.service")
    service.drop_in("ksmd-pager.service", f"[Service]\nExecStart=\nExecStart={there}\n{stop}")
    service.machine.run("systemctl", "start", "ksmd.service")
    told = service.journal("--unit=ksmd", "--priority=warning")
    assert "stands by for another socket than /run/ksmd/ksmd.sock" in told
    service.machine.run("systemctl", "stop", "ksmd.service", "ksmd-pager.service")


@lane.test
def test_when_pager_and_daemon_are_killed_at_once_the_guard_stands_and_all_comes_back(
    running: Service, pair: Pair
) -> None:
    running.settle()
    pager, main = running.pager_pid, running.main_pid
    running.machine.run("kill", "-KILL", pager, main)
    assert guarded(pair)  # they wait for the next pager; nothing of the store shines through
    until(lambda: running.pager_pid not in (0, pager), "another pager")
    until(lambda: running.main_pid not in (0, main), "another daemon")
    assert running.settle()["pages_sharing"] >= 0.9 * PAGES
    told = running.journal("--unit=ksmd")
    assert "lost its pins" in told  # so who mapped it had its pages back before that
    assert "nobody guards" not in told
    assert guarded(pair)
