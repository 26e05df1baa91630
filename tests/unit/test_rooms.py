"""The rooms and their doors: imports go one way, and the small processes stay small."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ksmd

ROOT = Path(ksmd.__file__).parent
#: What each room may import of ksmd, besides itself. cli is the outermost and may use all.
ALLOWED = {
    "model": set(),
    "settings": {"model"},
    "core": {"model"},
    "kernel": {"model"},
    "remap": {"model", "kernel"},
    "guard": {"model", "kernel"},
    "daemon": {"model", "settings", "core", "kernel", "remap", "guard"},
}
#: What a pure room may not touch.
IMPURE = {"os", "ctypes", "socket", "threading", "time", "subprocess", "psutil", "mmap", "fcntl"}
FILES = sorted(ROOT.rglob("*.py"))


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_only_the_rooms_before_it(room: str) -> None:
    files = [path for path in FILES if path.relative_to(ROOT).parts[0] in {room, f"{room}.py"}]
    assert files
    for path in files:
        used = {name.split(".")[1] for name in imported(path) if name.startswith("ksmd.")}
        used &= set(ALLOWED) | {"cli", "bench", "exporter"}
        assert used <= ALLOWED[room] | {room}, path


@pytest.mark.parametrize("room", ["core", "model"])
def test_a_pure_room_touches_neither_kernel_nor_clock(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        assert not {name.split(".")[0] for name in imported(path)} & IMPURE, path


@pytest.mark.parametrize("module", ["ksmd.remap.tracer", "ksmd.guard.pager"])
def test_the_small_processes_load_no_large_library(module: str) -> None:
    code = f"import sys, {module}; print(*sorted(sys.modules))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"numpy", "pydantic", "psutil", "rich", "yaml"} & set(loaded)


def test_the_daemon_has_its_settings_read_by_another_process() -> None:
    code = "import sys, ksmd.daemon.main; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert not {"psutil", "pydantic", "rich", "yaml"} & set(loaded)


def test_a_command_loads_the_large_ones_only_when_it_knows_that_it_needs_them() -> None:
    """Targets may wait for `ksmd pager` to start."""
    code = "import sys, ksmd.cli.ksmd; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert not {"numpy", "pydantic", "psutil", "yaml"} & set(loaded)


@pytest.mark.parametrize("verb", ["status", "targets", "scan", "pause", "unmerge", "plan"])
def test_who_only_asks_the_daemon_loads_nothing_large(verb: str, tmp_path: Path) -> None:
    """Scripts call ksmctl every few seconds; it need not take longer than the answer."""
    code = "import sys; from ksmd.cli import ksmctl\nksmctl.main(sys.argv[1:])\nprint(*sys.modules)"
    command = [sys.executable, "-c", code, "--json", "--socket", str(tmp_path / "none"), verb]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "ksmd is not running" in done.stderr
    assert not {"numpy", "pydantic", "psutil", "rich", "yaml"} & set(done.stdout.split())


def test_files_are_short_enough_to_read_in_one_sitting() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in FILES
        if (lines := len(path.read_text().splitlines())) > 500
    }
    assert not long


def test_the_project_stands_alone() -> None:
    top = ROOT.parent
    listed = subprocess.run(
        ["git", "ls-files"], cwd=top, capture_output=True, text=True, check=True
    ).stdout.split()
    needle = "../" + "shared"
    for name in listed:
        path = top / name
        if path.suffix in {".py", ".md", ".c", ".h", ".toml", ".yaml", ".service", ""}:
            assert needle not in path.read_text(errors="replace"), name
