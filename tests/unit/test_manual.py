"""The manual says everything: every verb, option, key, refusal, counter, metric, signal."""

from __future__ import annotations

import argparse
import dataclasses
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from ksmd.cli import completions, manual
from ksmd.exporter.metrics import PREFIX, StatusCollector
from ksmd.model.errors import Exit, KsmdError
from ksmd.model.refusal import SENTENCES
from ksmd.model.status import Status, TargetStatus
from ksmd.settings import explain

COMMANDS = {"ksmd": "ksmd.8", "ksmctl": "ksmctl.1"}


def section(page: str, title: str) -> str:
    """The part of a page below "# TITLE"."""
    parts = re.split(r"^# (.+)$", manual.markdown(page), flags=re.MULTILINE)
    return parts[parts.index(title) + 1]


def everything(command: str) -> list[tuple[str, argparse.Action]]:
    """Every option of a command, with the verb that takes it."""
    parser = manual.parsers()[command]
    found = [("", action) for action in manual.options(parser)]
    for name, (_, verb) in manual.verbs(parser).items():
        found += [(name, action) for action in manual.options(verb)]
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_every_verb_and_option_says_what_it_does(command: str) -> None:
    assert all(told for told, _ in manual.verbs(manual.parsers()[command]).values())
    assert [(verb, action.dest) for verb, action in everything(command) if not action.help] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_no_verb_and_no_option_is_undocumented(command: str) -> None:
    text = manual.markdown(COMMANDS[command])
    headings = re.split(r"^##? ", text, flags=re.MULTILINE)
    by_heading = {part.partition("\n")[0]: part for part in headings}
    shared = {action.dest for verb, action in everything(command) if not verb}
    for name in manual.verbs(manual.parsers()[command]):
        assert f"{command} {name}" in by_heading
    for verb, action in everything(command):
        place = text if not verb or action.dest in shared else by_heading[f"{command} {verb}"]
        for written in action.option_strings or [f"*{action.metavar}*"]:
            assert written in place, (verb, written)


def test_no_key_of_the_settings_is_undocumented() -> None:
    text = section("ksmd.yaml.5", "KEYS")
    for key in explain():
        name = key.path.replace("_", "\\_").replace("[", "\\[").replace("]", "\\]")
        assert re.search(rf"^\*\*{re.escape(name)}\*\*", text, re.MULTILINE), key.path
        assert key.help


def test_no_refusal_is_undocumented() -> None:
    text = section("ksmctl.1", "REFUSALS")
    assert re.findall(r"^\*\*([a-z-]+)\*\*$", text, re.MULTILINE) == [str(one) for one in SENTENCES]


def test_no_counter_is_undocumented() -> None:
    documented = set(re.findall(r"\*\*([a-z_0-9]+)\*\*", section("ksmctl.1", "COUNTERS")))
    known = {field.name for kind in (Status, TargetStatus) for field in dataclasses.fields(kind)}
    assert known - documented == set()
    assert documented - known == {"pause"}  # the verb


def test_the_metrics_that_are_documented_are_those_that_are_served() -> None:
    one = TargetStatus(1, "web", "d")
    status = dataclasses.asdict(Status(targets=[one], refusals={"stack": 1}))
    registry = CollectorRegistry(auto_describe=False)
    registry.register(StatusCollector(lambda: status))
    served = set(re.findall(rf"^({PREFIX}\w+)", generate_latest(registry).decode(), re.MULTILINE))
    documented = re.findall(rf"\*\*({PREFIX}\w+)\*\*", section("ksmd.8", "METRICS"))
    assert set(documented) == served
    assert len(documented) == len(served)


def test_the_exit_codes_are_documented() -> None:
    text = section("ksmd.8", "EXIT STATUS")
    assert [int(code) for code in re.findall(r"^(\d)$", text, re.MULTILINE)] == list(Exit)


def test_an_unknown_mark_in_a_page_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ksmd.cli.shipped.resource", lambda _: "<!-- options -->\n")
    with pytest.raises(KsmdError, match="unknown mark"):
        manual.markdown("ksmd.8")


@pytest.mark.parametrize("page", manual.PAGES)
def test_a_page_has_no_mark_left_and_names_itself(page: str) -> None:
    text = manual.markdown(page)
    assert "<!--" not in text
    assert re.match(r"\s+\S+ - \S", section(page, "NAME").replace("\n", " "))
    name = page.rpartition(".")[0]
    assert section(page, "NAME").strip().startswith(f"{name} - ")


@pytest.mark.parametrize("page", manual.PAGES)
def test_a_page_becomes_roff_that_man_reads_without_a_warning(page: str, tmp_path: Path) -> None:
    file = tmp_path / page
    file.write_bytes(manual.roff(page))
    command = ["man", "--warnings=all", "--encoding=UTF-8", "-Tutf8", "--local-file", str(file)]
    environ = {"MANWIDTH": "100", "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environ)
    assert done.stderr == ""
    assert "NAME" in re.sub(".\x08", "", done.stdout).splitlines()


def test_without_its_tool_the_manual_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(KsmdError, match="go-md2man is not installed"):
        manual.roff("ksmd.8")


# -- completions --------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("shell", completions.SHELLS)
def test_a_completion_is_valid_in_its_shell(command: str, shell: str, tmp_path: Path) -> None:
    file = tmp_path / "completion"
    file.write_text(completions.script(command, shell))
    subprocess.run([shell, "-n", file], check=True, capture_output=True)


def complete(command: str, *words: str) -> set[str]:
    """What bash offers for the last of *words*."""
    script = completions.script(command, "bash") + (
        f'COMP_WORDS=({command} "$@"); COMP_CWORD=$#\n'
        f"$(complete -p {command} | sed 's/.*-F \\([^ ]*\\).*/\\1/') {command} \"${{@: -1}}\"\n"
        'printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(
        ["bash", "-c", script, "bash", *words], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_bash_completes_every_verb_and_every_option(command: str) -> None:
    parser = manual.parsers()[command]
    assert complete(command, "") >= set(manual.verbs(parser))
    for name, (_, verb) in manual.verbs(parser).items():
        known = {text for action in manual.options(verb) for text in action.option_strings}
        assert complete(command, name, "--") >= {one for one in known if one.startswith("--")}
