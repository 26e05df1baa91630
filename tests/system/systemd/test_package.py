"""The Debian package under a real systemd: installed, upgraded and removed as apt would do it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import install_tree
import pytest
from inside import PAGES, SETTINGS, Service, Target
from machine import Machine

pytestmark = [pytest.mark.root, pytest.mark.slow]

HERE = Path(__file__).parent


@pytest.fixture
def bare(tmp_path: Path, debian_package: Path) -> Iterator[Machine]:
    """A machine of its own, without any ksmd; the package lies in it."""
    tree = tmp_path / "tree"
    tree.mkdir()
    tree.chmod(0o755)
    install_tree.make(tree)  # for the interpreter that the targets run
    for name in ("usr", "etc/ksmd"):
        shutil.rmtree(tree / name)
    booted = Machine(tree)
    try:
        shutil.copy(HERE / "victim.py", booted.shared)
        shutil.copy(debian_package, booted.shared / "ksmd.deb")
        yield booted
    finally:
        booted.close()


def test_a_package_is_upgraded_without_unmerging_and_removed_after_it(bare: Machine) -> None:
    bare.run("dpkg", "--install", "/run/test/ksmd.deb")
    bare.run("sed", "-i", "s/^  deadline_ms:.*/  deadline_ms: 1000/", "/etc/ksmd/ksmd.yaml")
    service = Service(bare)
    service.settings(SETTINGS)
    bare.run("systemctl", "enable", "--now", "ksmd.service")
    pair = Target(bare), Target(bare)
    try:
        assert service.settle()["pages_sharing"] >= 0.9 * PAGES
        pager, main = service.pager_pid, service.main_pid

        bare.run("dpkg", "--install", "/run/test/ksmd.deb")
        assert all(one.store_pages() >= 0.9 * PAGES for one in pair)
        assert [one.ask("drop 77") for one in pair] == ["0", "0"]
        assert [one.ask("check") for one in pair] == ["right", "right"]
        assert service.main_pid not in (0, main)
        assert service.pager_pid == pager
        assert service.status()["pages_sharing"] >= 0.9 * PAGES

        bare.run("dpkg", "--remove", "ksmd")
        assert [one.store_pages() for one in pair] == [0, 0]
        assert [one.ask("check") for one in pair] == ["right", "right"]
        assert bare.code("pgrep", "^ksmd-(main|tracer|pager)") == 1
        assert bare.run("systemctl", "--failed", "--no-legend") == ""
        assert bare.code("test", "-e", "/usr/lib/ksmd") == 1
        assert bare.code("test", "-e", "/etc/ksmd/conf.d/test.yaml") == 0
    finally:
        for one in pair:
            one.end()
