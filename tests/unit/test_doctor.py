"""``ksmctl doctor``: each finding for what it stands for, with what to do, and its exit code."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from ksmd.cli import doctor, ksmctl
from ksmd.cli.doctor import Finding
from ksmd.kernel import rivals
from ksmd.kernel.rivals import Running
from ksmd.model.features import Feature
from ksmd.model.status import Status, TargetStatus

GOOD = Finding("good", "x")


def status(**values: object) -> dict:
    return dataclasses.asdict(Status(**values))  # type: ignore[arg-type]


def open_(found) -> list[Finding]:
    return [one for one in found if one.level != "good"]


def feature(**values: object) -> Feature:
    base = {"name": "mlock", "present": False, "needed": True, "detail": "", "without": "lost"}
    return Feature(**(base | values))  # type: ignore[arg-type]


def test_every_finding_to_act_on_says_what_to_do() -> None:
    found = [
        *doctor.of_features([feature(), feature(needed=False), feature(detail="Access denied")]),
        *doctor.of_settings(Path("/nonexistent/ksmd.yaml")),
        *doctor.of_daemon("/nonexistent/ksmd.sock"),
        *doctor.of_status(
            status(paused=True, full_scans=1, general_profit=-5, headroom_bytes=9,
                   targets=[TargetStatus(1, "a", "d", refused="seccomp")]), 8,
        ),
        *doctor.of_kernel_ksm({"run": 1}, {7: 3}),
        *doctor.of_rivals([
            Running(1, "ksmtuned", 0), Running(2, "ksmd-main", 1), Running(3, "ksmd-main", 1),
            Running(4, "ksmd-pager", 1),
        ]),
    ]  # fmt: skip
    assert len(open_(found)) == 13
    assert [one for one in open_(found) if not one.advice] == []


def test_containers_that_share_a_domain_nobody_named_are_told_of() -> None:
    targets = [
        {"pid": pid, "domain": domain}
        for pid, domain in ((1, "uid:0"), (2, "uid:0"), (3, "uid:7"), (4, "web"), (5, "web"))
    ]
    apart = {1: "pid:[1]", 2: "pid:[2]", 3: "pid:[1]", 4: "pid:[1]", 5: "pid:[2]"}
    (found,) = doctor.of_domains(targets, apart)
    assert found.level == "warning"
    assert "2 pid namespaces (containers) are in the trust domain uid:0" in found.what
    assert "domain:" in found.advice
    assert list(doctor.of_domains(targets, apart | {2: "pid:[1]"})) == []
    assert list(doctor.of_domains(targets, apart | {2: ""})) == []  # it has ended


def test_a_needed_feature_is_a_problem_and_another_a_warning() -> None:
    (needed,) = open_(doctor.of_features([feature()]))
    assert (needed.level, needed.code) == ("problem", 4)
    (denied,) = open_(doctor.of_features([feature(detail="Operation not permitted")]))
    assert (denied.code, denied.advice) == (3, "run this as root")
    (other,) = open_(doctor.of_features([feature(needed=False)]))
    assert (other.level, other.code) == ("warning", 0)
    fine = [feature(present=True), feature(name="kernel-ksm", needed=False)]
    assert open_(doctor.of_features(fine)) == []


def test_settings_that_select_nobody_are_noticed_and_wrong_ones_are_named(tmp_path) -> None:
    file = tmp_path / "ksmd.yaml"
    file.write_text("version: 1\n")
    (nobody,) = doctor.of_settings(file)
    assert "selects no process" in nobody.what
    file.write_text("version: 1\nrum: 1\nspeed: 2\n")
    (wrong,) = doctor.of_settings(file)
    assert wrong.level == "problem"
    assert f"{file}:2:1" in wrong.what
    assert "(and 1 more)" in wrong.what
    file.write_text("version: 1\ntargets: [{name: a, match: {comm: b}}]\n")
    assert open_(doctor.of_settings(file)) == []


def test_more_saved_than_memory_is_left_for_is_a_warning() -> None:
    told = status(headroom_bytes=10 << 20)
    assert any("un-sharing all" in one.what for one in doctor.of_status(told, 9 << 20))
    assert open_(doctor.of_status(told, 11 << 20)) == []


def test_kernel_ksm_matters_only_on_memory_of_targets() -> None:
    (both,) = doctor.of_kernel_ksm({"run": 1}, {7: 3, 8: 0})
    assert both.level == "warning"
    assert "pids 7)" in both.what
    (beside,) = doctor.of_kernel_ksm({"run": 1}, {8: 0})
    assert beside.level == "good"
    assert list(doctor.of_kernel_ksm({"run": 0}, {8: 0})) == []


def test_a_pager_of_a_living_daemon_is_no_finding_and_an_orphan_is() -> None:
    daemon = Running(10, "ksmd-main", 1)
    assert open_(doctor.of_rivals([daemon, Running(11, "ksmd-pager", 10)])) == []
    (orphan,) = open_(doctor.of_rivals([daemon, Running(12, "ksmd-pager", 1)]))
    assert "pager 12" in orphan.what
    assert open_(doctor.of_rivals([daemon, Running(13, "ksmd-pager", 1, standing=True)])) == []
    assert orphan.level == "warning"


def test_two_daemons_are_a_problem() -> None:
    (found,) = open_(doctor.of_rivals([Running(2, "ksmd-main", 1), Running(3, "ksmd-main", 1)]))
    assert found.level == "problem"
    assert "pids 2, 3" in found.what


@pytest.mark.parametrize(
    ("findings", "code"),
    [
        ([GOOD], 0),
        ([], 0),
        ([GOOD, Finding("warning", "x", "y")], 1),
        ([Finding("problem", "x", "y", 4), Finding("warning", "x", "y")], 4),
        ([Finding("problem", "x", "y", 4), Finding("problem", "x", "y", 3)], 3),
    ],
)
def test_the_exit_code_tells_the_worst(findings: list[Finding], code: int) -> None:
    assert doctor.exit_code(findings) == code


def test_the_screen_puts_what_is_to_be_done_first(capsys) -> None:
    found = [GOOD, Finding("warning", "w", "do w"), Finding("problem", "p", "do p")]
    doctor.show(doctor.console(), found)
    out = capsys.readouterr().out
    assert out.index("problem") < out.index("warning") < out.index("good")
    assert "2 findings to act on." in out
    doctor.show(doctor.console(), [GOOD])
    assert "All is well." in capsys.readouterr().out


def test_the_verb_prints_json_with_the_exit_code(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("ksmd.cli.features.probe", lambda: [feature(present=True)])
    monkeypatch.setattr(rivals, "running", list)
    code = ksmctl.main(["doctor", "--json", "--socket", str(tmp_path / "s"), "--config",
                        str(tmp_path / "c")])  # fmt: skip
    told = json.loads(capsys.readouterr().out)
    assert code == told["exit_code"] == 1
    levels = [one["level"] for one in told["findings"]]
    assert levels == ["good", "problem", "warning", "good"]


def test_ksm_stat_is_read_as_the_kernel_writes_it() -> None:
    text = b"ksm_rmap_items 5\nksm_merging_pages 12\nksm_process_profit -3\nksm_merge_any: no\n"
    assert rivals.parse_ksm_stat(text) == {"ksm_rmap_items": 5, "ksm_merging_pages": 12}
    assert rivals.kernel_ksm_pages(1 << 22) == 0
