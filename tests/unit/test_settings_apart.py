"""Settings that another process has read are those that the models say, mistakes included."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ksmd.model.errors import KsmdError
from ksmd.settings import SettingsError, defaults, effective, models, read, values
from ksmd.settings.apart import Reading

FULL = """\
version: 1
run: stop
socket: /tmp/a.sock
scan: {pages_to_scan: 7, advisor: scan-time}
tables: {page_hash_size: 2048}
window: {stop_ms: 9}
limits: {regions_per_user: 0}
targets:
- {name: a, match: {pid: [3, 4], comm: "x*"}, regions: heap, domain: d}
- name: b
  match: {cmdline: "-m w( |$)"}
  regions: [{start: 0x7f0000000000, npages: 3}, {start: 0x10000, npages: 1}]
  accept_seccomp_risk: true
  min_age_secs: 4
"""


@pytest.mark.parametrize(
    "name", ["Limits", "Match", "Region", "Scan", "Settings", "Tables", "Target", "Window"]
)
def test_every_key_has_its_value(name: str) -> None:
    fields = [field.name for field in dataclasses.fields(getattr(values, name))]
    assert fields == list(getattr(models, name).model_fields)


def plainly(value: object) -> Any:
    """A model, or a plain value, as tuples and dictionaries."""
    if isinstance(value, models.BaseModel):
        return {name: plainly(getattr(value, name)) for name in type(value).model_fields}
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return {field.name: plainly(getattr(value, field.name)) for field in fields}
    return tuple(map(plainly, value)) if isinstance(value, tuple) else value


def test_it_is_as_if_read_here(tmp_path: Path) -> None:
    file = tmp_path / "ksmd.yaml"
    file.write_text(FULL)
    here, given = read(file), Reading(file).result()
    assert plainly(given.settings) == plainly(here.settings)
    assert given.settings == here.settings.plain()
    assert given.content == effective(here.settings)
    assert given.sources == here.sources
    assert given.sources["scan", "pages_to_scan"] == f"{file}:4"
    assert given.settings.targets[1].regions[0] == values.Region(0x7F0000000000, 3)
    assert hash(given.settings)


def test_without_a_file_it_is_the_defaults() -> None:
    given = Reading(None).result()
    assert given.settings == defaults().plain()
    assert not given.sources
    assert given.changes(given) == "nothing changed"
    other = dataclasses.replace(given, content={**given.content, "run": "stop"})
    assert other.changes(given) == "run"


def test_whatever_is_wrong_comes_back_with_its_place(tmp_path: Path) -> None:
    file = tmp_path / "ksmd.yaml"
    file.write_text("version: 1\nrun: maybe\nscan: {pages_to_scan: 0}\n")
    for path in (file, tmp_path / "missing", tmp_path):
        with pytest.raises(SettingsError) as here:
            read(path)
        with pytest.raises(SettingsError) as apart:
            Reading(path).result()
        assert apart.value.problems == here.value.problems
        assert str(apart.value) == str(here.value)


def test_where_no_process_may_be_had_it_is_read_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError

    monkeypatch.setattr(subprocess, "Popen", refuse)
    file = tmp_path / "ksmd.yaml"
    file.write_text(FULL)
    assert Reading(file).result().settings == read(file).settings.plain()
    with pytest.raises(SettingsError):
        Reading(tmp_path / "missing").result()


@pytest.mark.parametrize("code", ["pass", "raise SystemError('no more')", "print('{')"])
def test_a_reader_that_does_not_answer_is_an_error(
    monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    popen = subprocess.Popen

    def other(_command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        return popen([sys.executable, "-c", code], **options)

    monkeypatch.setattr(subprocess, "Popen", other)
    with pytest.raises(KsmdError, match="the settings could not be read") as error:
        Reading(None).result()
    assert ("no more" in str(error.value)) == ("raise" in code)
