"""``ksmd install`` and ``uninstall``: what lands where, twice, and what is left alone."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import ksmd
from ksmd.cli import install, shipped
from ksmd.cli import ksmd as command
from ksmd.model.errors import UsageError
from ksmd.settings import json_schema, render_default_config

TOP = Path(ksmd.__file__).parents[1]
PLACES = {
    "etc/ksmd/ksmd.yaml",
    "usr/include/ksmd.h",
    "usr/lib/systemd/system/ksmd.service",
    "usr/lib/systemd/system/ksmd.socket",
    "usr/lib/systemd/system/ksmd-pager.service",
    "usr/lib/systemd/system/ksmd-exporter.service",
    "usr/lib/systemd/system/ksmd-exporter.socket",
    "usr/lib/sysusers.d/ksmd.conf",
    "usr/share/bash-completion/completions/ksmctl",
    "usr/share/bash-completion/completions/ksmd",
    "usr/share/doc/ksmd/examples/share.c",
    "usr/share/doc/ksmd/examples/share.py",
    "usr/share/doc/ksmd/seccomp-targets.conf",
    "usr/share/ksmd/ksmd.schema.json",
    "usr/share/man/man1/ksmctl.1",
    "usr/share/man/man5/ksmd.yaml.5",
    "usr/share/man/man7/ksmd.news.7",
    "usr/share/man/man7/ksmd.safety.7",
    "usr/share/man/man8/ksmd.8",
    "usr/share/zsh/site-functions/_ksmctl",
    "usr/share/zsh/site-functions/_ksmd",
}


def run(verb: str, root: Path, *options: str) -> int:
    return command.main([verb, "--root", str(root), "--prefix", "/usr", *options])


def files(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    assert run("install", tmp_path, "--apply", "--program", "/opt/ksmd/bin/ksmd") == 0
    return tmp_path


def test_without_apply_it_says_what_it_would_do_and_does_nothing(tmp_path, capsys) -> None:
    assert run("install", tmp_path) == 0
    said = capsys.readouterr().out
    assert {line.split()[1] for line in said.splitlines() if line.startswith("new ")} == {
        str(tmp_path / place) for place in PLACES
    }
    assert "Nothing was changed" in said
    assert list(tmp_path.iterdir()) == []


def test_every_file_lands_in_its_place_readable_for_all(installed: Path) -> None:
    assert set(files(installed)) == PLACES
    assert (installed / "etc/ksmd/conf.d").is_dir()
    for path in installed.rglob("*"):
        expected = 0o755 if path.is_dir() else 0o644
        assert stat.S_IMODE(path.stat().st_mode) == expected, path


def test_files_are_readable_for_all_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        run("install", tmp_path, "--apply", "--no-man")
    finally:
        os.umask(before)
    unit = tmp_path / "usr/lib/systemd/system/ksmd.service"
    assert [stat.S_IMODE(path.stat().st_mode) for path in (unit, unit.parent)] == [0o644, 0o755]


def test_units_start_the_program_that_was_named(installed: Path) -> None:
    for name, verb in (("ksmd", "run"), ("ksmd-exporter", "exporter")):
        text = (installed / f"usr/lib/systemd/system/{name}.service").read_text()
        starts = [line for line in text.splitlines() if line.startswith("ExecStart=")]
        assert [line.split()[:2] for line in starts] == [["ExecStart=/opt/ksmd/bin/ksmd", verb]]


def test_settings_and_schema_are_those_of_this_version(installed: Path) -> None:
    assert (installed / "etc/ksmd/ksmd.yaml").read_text() == render_default_config()
    assert (installed / "etc/ksmd/ksmd.yaml").read_text() == (TOP / "config/ksmd.yaml").read_text()
    schema = (installed / "usr/share/ksmd/ksmd.schema.json").read_text()
    assert json.loads(schema) == json_schema()


def test_doing_it_twice_changes_nothing_more(installed: Path, capsys) -> None:
    before = {path: path.stat().st_mtime_ns for path in installed.rglob("*")}
    capsys.readouterr()
    assert run("install", installed, "--apply", "--program", "/opt/ksmd/bin/ksmd") == 0
    assert capsys.readouterr().out.startswith(f"{len(PLACES)} files: {len(PLACES)} same.")
    assert {path: path.stat().st_mtime_ns for path in installed.rglob("*")} == before


def test_units_are_replaced_and_settings_of_the_operator_are_kept(installed: Path, capsys) -> None:
    config = installed / "etc/ksmd/ksmd.yaml"
    unit = installed / "usr/lib/systemd/system/ksmd.service"
    config.write_text("version: 1\nrun: stop\n")
    unit.write_text("[Service]\n")
    capsys.readouterr()
    assert run("install", installed, "--apply", "--program", "/opt/ksmd/bin/ksmd") == 0
    said = capsys.readouterr().out.splitlines()
    assert f"keep     {config}" in said
    assert f"replace  {unit}" in said
    assert config.read_text() == "version: 1\nrun: stop\n"
    assert "ExecStart=/opt/ksmd/bin/ksmd" in unit.read_text()


def test_uninstalling_removes_all_of_it(installed: Path, capsys) -> None:
    before = files(installed)
    assert run("uninstall", installed) == 0
    assert files(installed) == before
    assert "Nothing was changed" in capsys.readouterr().out
    assert run("uninstall", installed, "--apply") == 0
    assert files(installed) == {}
    assert not (installed / "etc/ksmd").exists()
    assert not (installed / "usr/share/ksmd").exists()
    assert run("uninstall", installed, "--apply") == 0


def test_uninstalling_keeps_settings_that_were_changed(installed: Path) -> None:
    config = installed / "etc/ksmd/ksmd.yaml"
    config.write_text("version: 1\nrun: stop\n")
    (installed / "etc/ksmd/conf.d/mine.yaml").write_text("targets: []\n")
    assert run("uninstall", installed, "--apply") == 0
    assert set(files(installed)) == {"etc/ksmd/ksmd.yaml", "etc/ksmd/conf.d/mine.yaml"}


@pytest.mark.parametrize(
    "options", [["--prefix", "usr"], ["--prefix", "/usr/../etc"], ["--program", "ksmd"]]
)
def test_a_place_that_depends_on_the_directory_is_refused(tmp_path, options) -> None:
    assert command.main(["install", "--root", str(tmp_path), *options]) == 2


def test_what_cannot_be_written_is_told_and_leaves_no_half_file(tmp_path, capsys) -> None:
    (tmp_path / "usr/lib").mkdir(parents=True)
    (tmp_path / "usr/lib/systemd").write_text("a file")
    assert run("install", tmp_path, "--apply") == 1
    assert "usr/lib/systemd" in capsys.readouterr().err
    assert files(tmp_path) == {"usr/lib/systemd": b"a file"}


def test_a_program_that_the_service_cannot_see_is_named(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    program = closed / "ksmd"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert f"{closed} is closed to other users" in install.unreachable(program)
    assert install.unreachable(Path("/usr/bin/env")) == ""
    assert install.checked_prefix(Path("/usr")) == Path("usr")
    with pytest.raises(UsageError):
        install.checked_prefix(Path("usr"))


def test_every_unit_of_the_source_tree_is_installed_and_every_one_has_its_manual() -> None:
    known = {*install.UNITS, "ksmd.sysusers", "seccomp-targets.conf"}
    assert {path.name for path in (TOP / "systemd").iterdir()} == known
    for name in install.UNITS:
        assert "Documentation=man:ksmd(8)" in shipped.unit(name)


def test_the_drop_in_for_filtered_programs_undoes_every_filter_of_the_unit() -> None:
    """By systemd.exec(5), these options install a seccomp filter."""
    filtering = {
        "SystemCallFilter", "SystemCallArchitectures", "RestrictAddressFamilies",
        "RestrictNamespaces", "RestrictSUIDSGID", "RestrictRealtime", "LockPersonality",
        "MemoryDenyWriteExecute", "ProtectKernelTunables", "ProtectKernelModules",
        "ProtectKernelLogs", "ProtectClock", "ProtectHostname", "PrivateDevices",
    }  # fmt: skip

    def options(name: str) -> dict[str, str]:
        lines = [line for line in shipped.unit(name).splitlines() if "=" in line]
        return dict(line.split("=", 1) for line in lines if line[0].isalpha())

    undone = options("seccomp-targets.conf")
    assert set(undone) == filtering & set(options("ksmd.service"))
    assert set(undone.values()) <= {"", "no"}


@pytest.mark.slow
def test_a_wheel_carries_units_manual_and_interface(tmp_path: Path) -> None:
    """Built from a copy, so that nothing is left in the source tree."""
    source = tmp_path / "source"
    source.mkdir()
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=TOP, capture_output=True, text=True, check=True,
    ).stdout.split("\0")  # fmt: skip
    for name in filter(None, listed):
        if name.startswith(("ksmd/", "systemd/", "pyproject", "README", "LICENSE")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((TOP / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet"]
    subprocess.run([*pip, "--wheel-dir", tmp_path, source], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    carried = {name.partition("/data/share/ksmd/systemd/")[2] for name in names}
    assert carried - {""} == {path.name for path in (TOP / "systemd").iterdir()}
    pages = {f"ksmd/resources/man/{path.name}" for path in shipped.RESOURCES.glob("man/*.md")}
    assert len(pages) == 5
    assert pages <= names
    assert {"ksmd/daemon/org.ksmd.Control.varlink", "ksmd/remap/stub.bin"} <= names
    programs = {"ksmd.h", "examples/share.c", "examples/share.py"}
    assert {f"ksmd/resources/{name}" for name in programs} <= names


@pytest.mark.slow
def test_a_debian_package_is_built_and_what_is_in_it_runs(
    tmp_path: Path, debian_package: Path
) -> None:
    tree = tmp_path / "tree"
    subprocess.run(["dpkg-deb", "--extract", debian_package, tree], check=True)
    placed = {name for name in files(tree) if not name.startswith("usr/lib/ksmd/")}
    pages = {f"{name}.gz" if "/man/" in name else name for name in PLACES}
    more = {"usr/bin/ksmd", "usr/bin/ksmctl", "usr/share/doc/ksmd/copyright"}
    assert placed == pages | more
    code = "import sys; from ksmd.cli.ksmctl import main; sys.exit(main(sys.argv[1:]))"
    python = [tree / "usr/lib/ksmd/bin/python", "-B", "-P", "-c", code]
    settings = tree / "etc/ksmd/ksmd.yaml"
    said = subprocess.run(
        [*python, "check-config", settings], capture_output=True, text=True, check=True
    ).stdout
    assert f"{settings} is right; no targets" in said
    told = subprocess.run(
        ["dpkg-deb", "--field", debian_package, "Package", "Version"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert told.splitlines() == ["Package: ksmd", f"Version: {ksmd.__version__}"]
