"""ksmd as a service, under a real systemd: what an operator is promised about the units."""

from __future__ import annotations

import re
import signal
import socket
import urllib.request
from pathlib import Path

import pytest
from inside import PAGES, SETTINGS, Pair, Service, given_back, guarded, merged, right
from machine import Machine, until

import ksmd

pytestmark = pytest.mark.root

UNITS = Path(ksmd.__file__).parents[1] / "systemd"
ENABLED = ("ksmd.service", "ksmd.socket", "ksmd-exporter.service", "ksmd-exporter.socket")
NAMES = (*ENABLED, "ksmd-pager.service")


# -- the units themselves -------------------------------------------------------------------------


def test_pid_1_is_a_systemd_that_runs_well(machine: Machine) -> None:
    assert machine.run("cat", "/proc/1/comm") == "systemd"
    assert machine.run("systemctl", "is-system-running") == "running"


def test_systemd_has_nothing_to_say_against_the_units(machine: Machine) -> None:
    assert machine.run("systemd-analyze", "verify", *NAMES) == ""
    said = machine.run("sh", "-c", f"systemd-analyze verify {' '.join(NAMES)} 2>&1")
    assert said == ""


@pytest.mark.parametrize(
    ("unit", "exposure"),
    [("ksmd.service", 2.0), ("ksmd-pager.service", 2.0), ("ksmd-exporter.service", 1.5)],
)
def test_the_exposure_of_a_service_stays_low(machine: Machine, unit: str, exposure: float) -> None:
    told = machine.run("systemd-analyze", "security", "--no-pager", unit)
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", told)
    assert found is not None
    assert float(found[1]) <= exposure, told


def test_every_capability_of_the_daemon_has_its_reason_beside_it() -> None:
    text = (UNITS / "ksmd.service").read_text()
    given = re.search(r"^CapabilityBoundingSet=(.*)$", text, re.MULTILINE)
    assert given is not None
    for name in given[1].split():
        assert re.search(rf"^# {name}  +\S+", text, re.MULTILINE), name
    assert f"AmbientCapabilities={given[1]}" in text


def test_enabling_the_service_enables_its_socket(machine: Machine) -> None:
    for name in ENABLED:
        assert machine.run("systemctl", "is-enabled", name) == "enabled"


# -- life -----------------------------------------------------------------------------------------


def test_the_first_caller_starts_the_service_and_is_answered(service: Service) -> None:
    assert service.state.startswith("inactive/dead")
    assert service.ctl("status")["run"] == "merge"
    assert service.state == "active/running/success"
    assert "saving 0 MiB" in service.machine.show("ksmd.service", "StatusText")
    assert service.machine.run("cat", f"/proc/{service.main_pid}/comm") == "ksmd-main"


def test_merging_works_inside_exactly_the_sandbox_of_the_unit(running: Service, pair: Pair) -> None:
    status = running.settle()
    assert status["pages_sharing"] >= 0.9 * PAGES
    assert {one["pid"] for one in status["targets"]} == {one.pid for one in pair}
    assert merged(pair)
    assert right(pair)
    assert pair[0].ask("write 5") == "done"
    assert guarded(pair)
    for one in pair:  # and the journal tells of it, by field
        told = running.journal(f"KSMD_TARGET_PID={one.pid}", "KSMD_EVENT=merged").splitlines()
        assert re.fullmatch(rf"pid {one.pid} \(victims\): merging, \d+ pages so far", told[-1])
    # DAC_OVERRIDE, IPC_LOCK, SYS_PTRACE, SYS_ADMIN, SYS_NICE
    allowed = sum(1 << bit for bit in (1, 14, 19, 21, 23))
    effective = dict.fromkeys((running.main_pid, running.helper("ksmd-tracer")), allowed)
    effective[running.pager_pid] = 1 << 14 | 1 << 19
    for pid, capabilities in effective.items():
        told = running.machine.run("cat", f"/proc/{pid}/status")
        fields = dict(line.split(":\t", 1) for line in told.splitlines() if ":\t" in line)
        assert fields["Seccomp"] == "2"
        assert fields["NoNewPrivs"] == "1"
        assert fields["Uid"].split()[0] != "0"
        assert int(fields["CapEff"], 16) == capabilities
        assert int(fields["CapBnd"], 16) == allowed


def test_the_status_text_shows_the_savings(running: Service, pair: Pair) -> None:
    assert right(pair)
    running.settle()

    def shown() -> bool:
        text = running.machine.show("ksmd.service", "StatusText")
        found = re.search(r"saving (\d+) MiB in 2 targets", text)
        return found is not None and int(found[1]) >= 3

    until(shown, "the savings in the status text")


# -- signals --------------------------------------------------------------------------------------


def test_reload_takes_new_settings_and_says_what_changed(running: Service, pair: Pair) -> None:
    reload = ("systemctl", "reload", "ksmd.service")
    running.settings("")
    running.machine.run(*reload)
    until(lambda: running.settle()["targets"] == [], "nobody selected")
    running.settings(SETTINGS)
    running.machine.run(*reload)
    until(lambda: running.settle()["pages_sharing"] >= 0.9 * PAGES, "victims selected anew")
    assert "settings read again: targets.victims" in running.journal("--unit=ksmd")
    assert running.state == "active/running/success"
    assert right(pair)


def test_reload_of_a_wrong_file_keeps_the_old_settings_and_says_why(
    running: Service, pair: Pair
) -> None:
    running.settle()
    running.settings("version: 1\nrun: stop\n")  # ksmd.yaml says merge
    running.machine.run("systemctl", "reload", "ksmd.service")

    def told() -> bool:
        return "conf.d/test.yaml:2:1: run" in running.journal("--unit=ksmd", "--priority=err")

    until(told, "the reason in the journal, as an error")
    assert running.status()["run"] == "merge"
    assert merged(pair)
    assert running.state == "active/running/success"
    running.settings(SETTINGS)
    running.machine.run("systemctl", "reload", "ksmd.service")


def test_usr1_scans_now(running: Service, pair: Pair) -> None:
    assert running.status()["paused"]  # so that no other scan does it
    unit = ("--kill-whom=main", "--signal=USR1", "ksmd.service")

    def grown() -> bool:
        running.machine.run("systemctl", "kill", *unit)
        return bool(running.status()["pages_sharing"] >= 0.9 * PAGES)

    until(grown, "pages merged by scans that a signal asked for")
    assert right(pair)


# -- accidents ------------------------------------------------------------------------------------


def test_killing_the_daemon_leaves_targets_merged_guarded_and_right(
    running: Service, pair: Pair
) -> None:
    running.settle()
    before = running.main_pid
    running.signal("KILL")
    assert right(pair)
    until(lambda: running.has_restarted(before), "another daemon")
    assert int(running.machine.show("ksmd.service", "NRestarts")) >= 1
    assert merged(pair)
    assert guarded(pair)
    assert running.knows_what_is_merged()
    running.machine.run("systemctl", "stop", "ksmd.service")
    assert given_back(pair)
    assert running.machine.run("pgrep", "^ksmd-(main|tracer|pager)") == str(running.pager_pid)


@pytest.mark.parametrize("helper", ["ksmd-pager", "ksmd-tracer"])
def test_killing_a_helper_neither_stops_the_service_nor_harms_a_target(
    running: Service, pair: Pair, helper: str
) -> None:
    running.settle()
    before, killed = running.main_pid, running.helper(helper)
    running.signal("KILL", killed)
    assert guarded(pair)
    assert running.settle()["pages_sharing"] >= 0.9 * PAGES
    assert running.main_pid == before
    assert running.state == "active/running/success"
    assert right(pair)


# -- who may do what ------------------------------------------------------------------------------


def test_only_root_controls_and_the_group_may_read_the_counters(running: Service) -> None:
    running.call("Resume")

    def code(group: str, *arguments: str) -> int:
        who = ("setpriv", "--reuid=65534", f"--regid={group}", "--clear-groups")
        return running.machine.code(*who, "ksmctl", "--json", *arguments)

    assert code("ksmd", "status") == 0
    assert code("ksmd", "pause") == 3
    assert code("ksmd", "unmerge") == 3
    assert code("nogroup", "status") == 3
    assert not running.status()["paused"]


def test_the_exporter_serves_the_counters_without_privilege_or_network(
    running: Service, pair: Pair
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    text = f"[Socket]\nListenStream=\nListenStream=127.0.0.1:{port}\n"
    running.drop_in("ksmd-exporter.socket", text)
    machine = running.machine
    try:
        running.settle()
        machine.run("systemctl", "start", "ksmd-exporter.socket")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
            told = answer.read().decode()
        values = dict(line.rsplit(" ", 1) for line in told.splitlines() if line[:1] != "#")
        assert values["ksmd_user_up"] == "1.0"
        assert float(values["ksmd_user_pages_sharing"]) >= 0.9 * PAGES
        name = 'ksmd_user_target_processes{domain="victims",name="victims"}'
        assert values.get(name) == "2.0", told
        pid = machine.show("ksmd-exporter.service", "MainPID")
        status = machine.run("cat", f"/proc/{pid}/status")
        assert re.search(r"^CapBnd:\t0+$", status, re.MULTILINE)
        interfaces = machine.run("nsenter", "-t", pid, "-n", "ls", "/sys/class/net", check=False)
        links = machine.run("readlink", f"/proc/{pid}/ns/net", "/proc/1/ns/net").split()
        assert links[0] != links[1], interfaces
        machine.run("kill", "-KILL", pid)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
            assert "ksmd_user_up 1.0" in answer.read().decode().splitlines()
        running.machine.run("systemctl", "stop", "ksmd.socket", "ksmd.service")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
            assert "ksmd_user_up 0.0" in answer.read().decode().splitlines()
    finally:
        machine.run("systemctl", "stop", "ksmd-exporter.socket", "ksmd-exporter.service")
        running.drop_in("ksmd-exporter.socket", "")
    assert right(pair)


# -- what needs a daemon of its own ---------------------------------------------------------------


def test_stopping_gives_every_page_back_and_leaves_the_socket_and_an_idle_pager(
    running: Service, pair: Pair
) -> None:
    running.settle()
    assert merged(pair)
    running.machine.run("systemctl", "stop", "ksmd.service")
    assert running.state == "inactive/dead/success"
    assert running.machine.show("ksmd.service", "ExecMainStatus") == "0"
    assert given_back(pair)
    assert running.machine.run("pgrep", "^ksmd-(main|tracer|pager)") == str(running.pager_pid)
    assert running.machine.show("ksmd.socket", "ActiveState") == "active"
    assert running.status()["pages_sharing"] == 0  # and the socket starts it again


# -- seccomp --------------------------------------------------------------------------------------


@pytest.fixture
def filtered(machine: Machine, service: Service):
    """Two victims that a seccomp filter confines, as transient services; their pids."""
    names = ["filtered-a.service", "filtered-b.service"]
    for name in names:
        machine.run(
            "systemd-run",
            *(f"--unit={name}", "--property=User=nobody", "--property=SystemCallFilter=~@mount"),
            *("/opt/ksmd/bin/python", "-I", "/run/test/victim.py", PAGES, "alone"),
        )
    service.settings(SETTINGS.replace("victim\\.py", "victim\\.py .* alone"))
    yield [int(machine.show(name, "MainPID")) for name in names]
    machine.run("systemctl", "stop", *names)


def test_a_program_with_a_filter_is_refused_by_name_in_the_sandbox(
    service: Service, filtered: list[int]
) -> None:
    service.settle()
    told = {one["pid"]: one["refused"] for one in service.status()["targets"]}
    assert told == dict.fromkeys(filtered, "seccomp")
    for pid in filtered:  # the journal is searched by field
        line = service.journal(
            f"KSMD_TARGET_PID={pid}", "KSMD_REASON=seccomp", "KSMD_DOMAIN=victims"
        )
        assert f"pid {pid} refused" in line
        priority = service.journal(f"KSMD_TARGET_PID={pid}", "--output-fields=PRIORITY")
        assert set(priority.split()) == {"6"}


def test_with_the_shipped_drop_in_programs_with_a_filter_are_merged(
    service: Service, filtered: list[int]
) -> None:
    for unit in ("ksmd.service", "ksmd-pager.service"):
        service.drop_in(unit, (UNITS / "seccomp-targets.conf").read_text())
    status = service.settle()
    told = service.machine.run("cat", f"/proc/{service.main_pid}/status")
    assert re.search(r"^Seccomp:\t0$", told, re.MULTILINE)
    assert {one["pid"]: one["refused"] for one in status["targets"]} == dict.fromkeys(filtered, "")
    assert status["pages_sharing"] >= 0.9 * PAGES


# -- the end --------------------------------------------------------------------------------------


def test_it_powers_off_cleanly_with_a_daemon_that_merges_and_no_unit_failed(
    machine: Machine, running: Service, pair: Pair
) -> None:
    running.settle()
    assert merged(pair)
    assert machine.run("systemctl", "--failed", "--no-legend") == ""
    # reboot(2) in a pid namespace: SIGINT stands for power off, pid_namespaces(7)
    assert machine.poweroff() in (-signal.SIGINT, 128 + signal.SIGINT)
