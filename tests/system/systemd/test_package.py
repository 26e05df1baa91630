"""The Debian package under a real systemd: installed, upgraded and removed as apt would do it."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
from beside import Lane, Story
from inside import HERE, PAGES, SETTINGS, Service, given_back, guarded, merged, two_targets
from machine import Machine

pytestmark = [pytest.mark.root, pytest.mark.slow]


@contextlib.contextmanager
def bare_machine(tree: Path, package: Future[Path]) -> Iterator[Callable[[Story], None]]:
    """A machine of its own, without any ksmd; the package lies in it."""
    there = package.result()
    booted = Machine(tree)
    try:
        shutil.copy(HERE / "victim.py", booted.shared)
        shutil.copy(there, booted.shared / "ksmd.deb")
        yield lambda story: story(booted)
    finally:
        booted.close()


lane = Lane(bare_machine, "bare_tree", "package_build")


@lane.test
def test_a_package_is_upgraded_without_unmerging_and_removed_after_it(bare: Machine) -> None:
    bare.run("dpkg", "--install", "/run/test/ksmd.deb")
    bare.run("sed", "-i", "s/^  deadline_ms:.*/  deadline_ms: 1000/", "/etc/ksmd/ksmd.yaml")
    service = Service(bare)
    service.settings(SETTINGS)
    bare.run("systemctl", "enable", "--now", "ksmd.service")
    with two_targets(bare) as pair:
        assert service.settle()["pages_sharing"] >= 0.9 * PAGES
        pager, main = service.pager_pid, service.main_pid

        bare.run("dpkg", "--install", "/run/test/ksmd.deb")
        assert merged(pair)
        assert guarded(pair)
        assert service.main_pid not in (0, main)
        assert service.pager_pid == pager
        assert service.status()["pages_sharing"] >= 0.9 * PAGES

        bare.run("dpkg", "--remove", "ksmd")
        assert given_back(pair)
        assert bare.code("pgrep", "^ksmd-(main|tracer|pager)") == 1
        assert bare.run("systemctl", "--failed", "--no-legend") == ""
        assert bare.code("test", "-e", "/usr/lib/ksmd") == 1
        assert bare.code("test", "-e", "/etc/ksmd/conf.d/test.yaml") == 0
