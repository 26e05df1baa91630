"""What is told about settings: the list of keys, the shipped file, values, differences."""

import re
from pathlib import Path

import pytest
import yaml

from ksmd.settings import (
    Match,
    Region,
    Settings,
    Target,
    changed,
    defaults,
    dump,
    effective,
    explain,
    load,
    loads,
    render_default_config,
)

SHIPPED = Path(__file__).parents[2] / "config" / "ksmd.yaml"


def differences(old: Settings, new: Settings) -> list[str]:
    return changed(effective(old), effective(new))


def uncommented(text: str) -> str:
    """Prose of the file without comment marks and line breaks."""
    return " ".join(re.sub(r"^[\s#]*", "", line) for line in text.splitlines())


def example() -> str:
    """Give the commented example of the shipped file, with its first comment marks removed."""
    text = SHIPPED.read_text()
    lines = text[text.index("\n#targets:") :].strip().splitlines()
    assert all(line.startswith("#") for line in lines)
    return "version: 1\n" + "\n".join(line[1:] for line in lines)


def test_the_shipped_file_is_made_from_the_models():
    assert SHIPPED.read_text() == render_default_config()


def test_the_shipped_file_means_the_defaults_and_selects_nothing():
    assert load(SHIPPED) == defaults()
    assert load(SHIPPED).targets == ()


def test_the_shipped_file_gives_every_default_in_the_open():
    assert yaml.safe_load(SHIPPED.read_text()) == effective(defaults())


def test_the_shipped_file_names_and_explains_every_key():
    text = SHIPPED.read_text()
    prose = uncommented(text)
    for key in explain():
        name = key.path.rpartition(".")[2]
        assert re.search(rf"^[\s#-]*{name}:", text, re.MULTILINE), key.path
        assert key.help in prose, key.path
        assert key.type == "mapping" or f"({key.type}" in prose, key.path


def test_the_shipped_example_is_valid_and_uses_every_key_of_match():
    (target,) = loads(example()).targets
    assert set(target.model_dump()["match"]) == {
        key.path.rpartition(".")[2] for key in explain() if key.path.startswith("targets[].match.")
    }
    assert all(value is not None for value in target.model_dump()["match"].values())
    assert target.domain is not None


def test_the_shipped_example_of_a_list_of_regions_is_valid_too():
    before, after = example().split("    # or, as a list:\n")
    lines = after.splitlines()
    ranges = [line.replace("# ", "", 1) for line in lines[:6]]
    assert ranges[0] == "    regions:"
    text = before.replace("    regions: anon\n", "") + "\n".join(ranges + lines[6:])
    (target,) = loads(text).targets
    assert target.regions == (Region(start=0x7F0000000000, npages=65536),)


def test_no_line_of_the_shipped_file_is_too_long():
    assert max(map(len, SHIPPED.read_text().splitlines())) <= 100


def test_explain_covers_each_key_of_the_contract_once():
    paths = [key.path for key in explain()]
    assert len(paths) == len(set(paths))
    assert set(paths) >= {
        "version",
        "run",
        "on_stop",
        "socket",
        "scan.pages_to_scan",
        "tables.sha1_hash_size",
        "window.interval_secs",
        "store.large_folios",
        "limits.vma_percent",
        "targets",
        "targets[].name",
        "targets[].match.cmdline",
        "targets[].match.pid",
        "targets[].regions",
        "targets[].regions[].start",
        "targets[].accept_seccomp_risk",
    }


def test_explain_tells_type_default_and_help():
    keys = {key.path: key for key in explain()}
    assert all(key.help and key.type for key in keys.values())
    assert keys["run"][1:3] == ("stop | merge | unmerge", "merge")
    assert keys["window.deadline_ms"][1:3] == ("integer, 1..1000", "10")
    assert keys["targets[].accept_seccomp_risk"][1:3] == ("true | false", "false")
    assert keys["targets[].match.exe"][1:3] == ("glob", "not set")
    assert keys["targets[].name"].default == "required"
    assert keys["targets"][1:3] == ("list of targets", "[]")


def full() -> Settings:
    return Settings(
        version=1,
        targets=[
            Target(
                name="a", match=Match(comm="x", pid=[1, 2]), regions=[Region(start=0, npages=1)]
            ),
            Target(name="b.c", match=Match(exe="no"), domain="1e3", min_age_secs=5),
        ],
    )


def test_dumped_settings_read_back_as_they_were():
    assert loads(dump(full())) == full()
    assert loads(dump(defaults())) == defaults()


def test_effective_settings_leave_out_what_is_not_set():
    first, second = effective(full())["targets"]
    assert first["match"] == {"comm": "x", "pid": [1, 2]}
    assert first["regions"] == [{"start": 0, "npages": 1}]
    assert "domain" not in first
    assert second["domain"] == "1e3"


def test_nothing_changed_between_equal_settings():
    assert differences(full(), full()) == []


@pytest.mark.parametrize(
    ("update", "paths"),
    [
        ({"run": "stop"}, ["run"]),
        ({"scan": {"pages_to_scan": 1, "sleep_millisecs": 9}},
         ["scan.pages_to_scan", "scan.sleep_millisecs"]),
        ({"socket": "/x", "limits": {"vma_percent": 9}}, ["socket", "limits.vma_percent"]),
        ({"targets": []}, ["targets.a", "targets.b.c"]),
    ],
)  # fmt: skip
def test_changes_are_told_by_dotted_path(update, paths):
    new = Settings.model_validate(full().model_dump() | update)
    assert differences(full(), new) == paths


def test_changes_of_targets_are_told_by_name():
    old = full()
    first, second = (target.model_dump() for target in old.targets)
    first["match"] = {"pid": [1], "user": "u"}
    first["regions"] = "heap"
    third = {"name": "d", "match": {"comm": "d"}}

    def with_targets(*targets):
        return Settings(version=1, targets=[Target.model_validate(target) for target in targets])

    assert differences(old, with_targets(first, second)) == [
        "targets.a.match.comm",
        "targets.a.match.pid",
        "targets.a.regions",
        "targets.a.match.user",
    ]
    assert differences(old, with_targets(third, *old.model_dump()["targets"])) == ["targets.d"]
    assert differences(old, with_targets(*reversed(old.model_dump()["targets"]))) == ["targets"]
