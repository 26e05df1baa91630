"""One machine for all tests of this directory, and victims that end with their test."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import install_tree
import pytest
from inside import Service, Target, as_shipped
from machine import Machine

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A booted machine with ksmd installed, its user made, and its units enabled."""
    made = tmp_path_factory.mktemp("machine") / "tree"
    made.mkdir()
    made.chmod(0o755)  # it becomes the root directory
    install_tree.make(made)
    booted = Machine(made)
    try:
        shutil.copy(HERE / "victim.py", booted.shared)
        booted.run("systemd-sysusers")
        # every accident would wait for a second
        (booted.shared / "soon").write_text("[Service]\nRestartSec=100ms\n")
        folder = "/run/systemd/system/ksmd.service.d"
        booted.run("install", "-D", "-m644", "/run/test/soon", f"{folder}/soon.conf")
        booted.run("systemctl", "daemon-reload")
        booted.run("systemctl", "enable", "ksmd.service", "ksmd-exporter.service")
        # a machine that is busy with other tests is slow to stop a target, and tests are impatient:
        # not under test here
        slow = "s/^  deadline_ms:.*/  deadline_ms: 1000/; s/^  interval_secs:.*/  interval_secs: 1/"
        booted.run("sed", "-i", slow, "/etc/ksmd/ksmd.yaml")
        yield booted
    finally:
        booted.close()


@pytest.fixture
def service(machine: Machine) -> Iterator[Service]:
    """ksmd.service, enabled and not started."""
    machine.run("systemctl", "stop", "ksmd.service", check=False)
    with as_shipped(machine) as made:
        yield made


@pytest.fixture
def running(machine: Machine) -> Iterator[Service]:
    """ksmd.service, which merges nothing that it was not asked to, and has merged nothing yet.

    It may be one that an earlier test has left running.
    """
    with as_shipped(machine) as made:
        machine.run("systemctl", "start", "ksmd-pager.service", "ksmd.service")
        made.call("Unmerge", wait=True)  # it is paused from then on
        yield made


@pytest.fixture(scope="session")
def lasting(machine: Machine) -> Iterator[list[Target]]:
    """Victims that are there already."""
    started: list[Target] = []
    yield started
    for one in started:
        one.end()


@pytest.fixture
def pair(machine: Machine, lasting: list[Target]) -> tuple[Target, Target]:
    """Two victims with the same content; they serve the next test too if all is well with them."""
    if any(one.ask("check") != "right" or one.store_pages() for one in lasting):
        for one in lasting:
            one.end()
        lasting.clear()
    while len(lasting) < 2:
        lasting.append(Target(machine))
    return lasting[0], lasting[1]
