"""conf.d: files add to each other, never override, and every mistake names its own file."""

from __future__ import annotations

import os
from pathlib import Path

import jsonschema
import pytest
import yaml

from ksmd.settings import SettingsError, json_schema, load, loads, read, render_default_config

BASE = "version: 1\ntargets:\n  - name: web\n    match: {comm: nginx}\n    domain: front\n"


@pytest.fixture
def write(tmp_path: Path):
    """Write ksmd.yaml, and files of conf.d by name; the path of the first."""

    def write(base: str, **more: str) -> Path:
        file = tmp_path / "ksmd.yaml"
        file.write_text(base)
        (tmp_path / "conf.d").mkdir(exist_ok=True)
        for name, text in more.items():
            (tmp_path / "conf.d" / f"{name}.yaml").write_text(text)
        return file

    return write


def problems(file: Path) -> list[str]:
    """Every problem, with the directory cut away."""
    with pytest.raises(SettingsError) as caught:
        load(file)
    return [str(problem).removeprefix(f"{file.parent}/") for problem in caught.value.problems]


def test_new_targets_come_after_those_of_earlier_files_in_the_order_of_names(write) -> None:
    file = write(
        BASE,
        b="targets: [{name: last, match: {comm: c}}]",
        a="targets: [{name: next, match: {comm: b}}]",
    )
    assert [target.name for target in load(file).targets] == ["web", "next", "last"]


def test_a_target_takes_keys_from_several_files_by_its_name(write) -> None:
    file = write(
        BASE,
        a="targets: [{name: web, min_age_secs: 30}]",
        b="targets: [{name: web, match: {user: www}}]",
    )
    (web,) = load(file).targets
    assert (web.match.comm, web.match.user, web.min_age_secs, web.domain) == (
        "nginx", "www", 30, "front",
    )  # fmt: skip


def test_mappings_are_merged_key_by_key(write) -> None:
    file = write(
        "version: 1\nscan: {pages_to_scan: 5}\n",
        a="version: 1\nscan: {sleep_millisecs: 7}\nrun: stop",
    )
    settings = load(file)
    assert (settings.scan.pages_to_scan, settings.scan.sleep_millisecs) == (5, 7)
    assert settings.run == "stop"


def test_what_two_files_give_differently_is_an_error_that_names_both_places(write) -> None:
    file = write("version: 1\nrun: merge\n" + BASE[11:], a="\nrun: stop\n",
                 b="targets:\n- name: web\n  domain: other\n")  # fmt: skip
    where = file.parent
    assert problems(file) == [
        f"conf.d/a.yaml:2:1: run: is given otherwise at {file}:2; files add, none overrides",
        f"conf.d/b.yaml:3:3: targets[0].domain: is given otherwise at {file}:6; files add, none"
        " overrides",
    ]
    assert where.is_dir()


def test_what_two_files_give_alike_is_no_error(write) -> None:
    assert load(write("version: 1\nrun: stop\n", a="version: 1\nrun: stop\n")).run == "stop"


def test_lists_are_one_thing(write) -> None:
    base = "version: 1\ntargets: [{name: a, match: {pid: [1, 2]}}]\n"
    told = problems(write(base, a="targets: [{name: a, match: {pid: [2, 3]}}]"))
    assert len(told) == 1
    assert "targets[0].match.pid: is given otherwise" in told[0]


def test_every_mistake_is_told_at_once_each_in_its_own_file(write) -> None:
    file = write(
        "version: 1\nrum: stop\n",
        a="targets: [{name: x, match: {comm: 5}}]",
        b="scan: {sleep_millisecs: -1}\n[",
        c="speed: 3",
    )
    told = problems(file)
    assert [line.split(": ")[0] for line in told] == [
        "ksmd.yaml:2:1", "conf.d/a.yaml:1:35", "conf.d/b.yaml:2:1", "conf.d/c.yaml:1:1",
    ]  # fmt: skip


def test_a_name_twice_in_one_file_is_a_conflict_and_not_a_merge(write) -> None:
    twice = "targets:\n- {name: web, min_age_secs: 1}\n- {name: web, match: {user: www}}\n"
    told = problems(write(BASE, a=twice))
    assert any("is the name of targets[0] too" in line for line in told)
    assert all(line.startswith("conf.d/a.yaml:") for line in told)


def test_a_conflict_between_targets_of_two_files_is_found(write) -> None:
    base = "version: 1\ntargets: [{name: a, match: {pid: 7}}]\n"
    told = problems(write(base, a="targets: [{name: b, match: {pid: 7}}]"))
    assert len(told) == 1
    assert told[0].startswith("conf.d/a.yaml:1:")
    assert "both match pid 7" in told[0]


def test_a_file_that_is_no_mapping_and_one_that_is_empty(write) -> None:
    told = problems(write(BASE, a="- 1\n- 2\n", b="# nothing\n"))
    assert told == ["conf.d/a.yaml:1:1: the settings must be a mapping (key: value)"]


def test_other_names_in_conf_d_are_passed_over(write) -> None:
    file = write(BASE)
    for name in (".hidden.yaml", "old.yaml~", "README"):
        (file.parent / "conf.d" / name).write_text("nonsense: [")
    assert len(read(file).files) == 1


@pytest.mark.parametrize("which", ["a directory", "a link to nothing"])
def test_what_cannot_be_read_in_conf_d_is_an_error(write, which: str) -> None:
    file = write(BASE)
    odd = file.parent / "conf.d/odd.yaml"
    if which == "a directory":
        odd.mkdir()
        assert problems(file) == ["conf.d/odd.yaml: is not a regular file"]
    else:
        odd.symlink_to("nowhere")
        assert len(problems(file)) == 1


@pytest.mark.root
@pytest.mark.parametrize("part", ["conf.d", "conf.d/a.yaml"])
def test_rules_of_somebody_else_are_refused(write, part: str) -> None:
    file = write(BASE, a="run: stop")
    os.chown(file.parent / part, 65534, 65534)
    assert problems(file) == [
        f"{part}: belongs neither to root nor to the owner of the settings file"
    ]


def test_every_value_tells_its_place(write) -> None:
    file = write(BASE, a="targets: [{name: web, match: {pid: 9}}]\nscan: {sleep_millisecs: 1}\n")
    loaded = read(file)
    drop_in = file.parent / "conf.d/a.yaml"
    assert loaded.files == (str(file), str(drop_in))
    assert loaded.sources == {
        ("version",): f"{file}:1",
        ("targets", 0, "name"): f"{file}:3",
        ("targets", 0, "match", "comm"): f"{file}:4",
        ("targets", 0, "domain"): f"{file}:5",
        ("targets", 0, "match", "pid", 0): f"{drop_in}:1",
        ("scan", "sleep_millisecs"): f"{drop_in}:2",
    }


# -- the JSON Schema ----------------------------------------------------------------------------


def target(**keys: object) -> str:
    return yaml.safe_dump({"version": 1, "targets": [{"name": "a", "match": {"comm": "c"}} | keys]})


RIGHT = {
    "the shipped file": render_default_config(),
    "a pid": target(match={"pid": 4}),
    "pids": target(match={"pid": [4, 5]}),
    "heap": target(regions="heap"),
    "ranges": target(regions=[{"start": 0x1000, "npages": 3}]),
    "all keys": target(domain="d", accept_seccomp_risk=True, min_age_secs=5),
}
WRONG = {
    "no version": "run: stop",
    "another version": "version: 2",
    "an unknown key": "version: 1\nspeed: 3",
    "an unknown value": "version: 1\nrun: perhaps",
    "a value of another type": 'version: 1\nscan: {sleep_millisecs: "1"}',
    "a value out of range": "version: 1\nscan: {sleep_millisecs: -1}",
    "a relative socket": "version: 1\nsocket: ksmd.sock",
    "no match": "version: 1\ntargets: [{name: a}]",
    "an empty match": target(match={}),
    "an unknown match": target(match={"nice": 3}),
    "pid 0": target(match={"pid": 0}),
    "no pids": target(match={"pid": []}),
    "an address inside a page": target(regions=[{"start": 0x1001, "npages": 3}]),
    "no ranges": target(regions=[]),
    "another word for regions": target(regions="stack"),
    "a name with a space": target(name="a b"),
    "a key without a value": target(domain=None),
}


@pytest.mark.parametrize("text", RIGHT.values(), ids=RIGHT)
def test_the_schema_accepts_what_the_loader_accepts(text: str) -> None:
    loads(text)
    jsonschema.validate(yaml.safe_load(text), json_schema())


@pytest.mark.parametrize("text", WRONG.values(), ids=WRONG)
def test_the_schema_refuses_what_the_loader_refuses(text: str) -> None:
    with pytest.raises(SettingsError):
        loads(text)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(yaml.safe_load(text), json_schema())


def test_the_schema_is_one_and_explains_every_key() -> None:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    objects = [schema, *schema["$defs"].values()]
    for one in objects:
        assert one["additionalProperties"] is False
        assert all("description" in key for key in one["properties"].values()), one
