"""The command lines: usage, exit codes, what is shown and that it fits."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import selectors
import subprocess
import sys
import threading

import pytest
from rich.console import Console

from ksmd import __version__
from ksmd.cli import check_config, features, ksmctl, unmerge, verbs, why, words
from ksmd.cli import ksmd as ksmd_command
from ksmd.cli.common import WIDTH, console, global_options, guarded
from ksmd.cli.demo_workers import Sizes, expected_sums, shared_byte
from ksmd.cli.screens import status as status_screen
from ksmd.cli.screens import why as why_screen
from ksmd.daemon import interface
from ksmd.daemon.control import ControlServer
from ksmd.daemon.protocol import DEFAULT_SOCKET
from ksmd.model.errors import KernelFeatureError, KsmdError, PrivilegeError, UsageError
from ksmd.model.features import Feature
from ksmd.model.refusal import SENTENCES, Reason
from ksmd.model.status import Status, TargetStatus
from ksmd.settings import defaults

NASTY = "wörker\x1b[31m\n[bold]x[/bold]\udcff" + "y" * 300


def golden(**changes) -> dict:
    targets = [
        TargetStatus(
            4_194_303, NASTY, "uid:1000", 26_214_400, 1_000_000, 98 << 30, 32_000, 123_456,
            9.87, 1234.5, 4_000_000,
        ),
        TargetStatus(17, "infer@1.service", "inference", 12, 0, -4096, 2, 1, 0.4, 0.4, 0),
        TargetStatus(18, "sshd", "inference", refused=Reason.SECCOMP),
    ]  # fmt: skip
    made = Status(
        pages_shared=6_553_600, pages_sharing=26_214_412, pages_unshared=812_345_678,
        pages_volatile=99, pages_scanned=10**12, pages_skipped=10**11, full_scans=31_337,
        zero_pages=1_000_000, cow_breaks=4_000_000, general_profit=76_543_210_987,
        metadata_bytes=321 << 20, headroom_bytes=101 << 30,
        refusals={reason.value: 10 ** (index % 13) for index, reason in enumerate(Reason)},
        targets=targets,
    )  # fmt: skip
    return json.loads(json.dumps({**dataclasses.asdict(made), **changes}))


def shown(show, *args) -> str:
    file = io.StringIO()
    show(console(file), *args)
    return file.getvalue()


def fits(text: str) -> bool:
    return all(len(line) <= WIDTH for line in text.splitlines()) and "\x1b" not in text


# -- usage -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["nonsense"],
        ["status", "extra"],
        ["why"],
        ["why", "-1"],
        ["why", "0"],
        ["why", "self"],
        ["why", "1", "here"],
        ["unmerge", "--pid"],
        ["unmerge", "--pid", "99999999"],
        ["estimate"],
        ["estimate", "--all", "--pid", "1"],
        ["check-config"],
        ["--socket"],
    ],
)
def test_wrong_usage_of_ksmctl_is_exit_code_2_and_says_how_it_is_meant(argv, capsys):
    with pytest.raises(SystemExit) as left:
        ksmctl.main(argv)
    assert left.value.code == 2
    assert "usage: ksmctl" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv", [[], ["nonsense"], ["run", "--nonsense"], ["demo", "--workers", "1"], ["demo", "--mib"]]
)
def test_wrong_usage_of_ksmd_is_exit_code_2_and_says_how_it_is_meant(argv, capsys):
    with pytest.raises(SystemExit) as left:
        ksmd_command.main(argv)
    assert left.value.code == 2
    assert "usage: ksmd" in capsys.readouterr().err


@pytest.mark.parametrize("verb", [None, *ksmctl.VERBS])
def test_every_verb_of_ksmctl_explains_itself(verb, capsys):
    with pytest.raises(SystemExit) as left:
        ksmctl.main([verb, "--help"] if verb else ["--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert "--socket" in text
    assert "--json" in text
    assert all(name in text for name in ksmctl.VERBS) or verb


@pytest.mark.parametrize("verb", [None, *ksmd_command.VERBS])
def test_every_verb_of_ksmd_explains_itself(verb, capsys):
    with pytest.raises(SystemExit) as left:
        ksmd_command.main([verb, "--help"] if verb else ["--help"])
    assert left.value.code == 0
    assert "usage: ksmd" in capsys.readouterr().out


def test_the_version_is_told(capsys):
    for main, name in ((ksmctl.main, "ksmctl"), (ksmd_command.main, "ksmd")):
        with pytest.raises(SystemExit) as left:
            main(["--version"])
        assert left.value.code == 0
        assert capsys.readouterr().out == f"{name} {__version__}\n"


def test_ksmctl_calls_where_ksmd_listens_by_default():
    assert str(defaults().socket) == DEFAULT_SOCKET


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [(KsmdError, 1), (UsageError, 2), (PrivilegeError, 3), (KernelFeatureError, 4)],
)
def test_an_expected_failure_is_one_line_and_a_hint_and_its_exit_code(error, code, capsys):
    def fail() -> int:
        raise error("it is so", "do this")

    assert guarded("ksmctl", fail) == code
    assert capsys.readouterr().err == "ksmctl: it is so\n        do this\n"


def test_an_interrupt_is_quiet(capsys):
    def interrupted() -> int:
        raise KeyboardInterrupt

    assert guarded("ksmctl", interrupted) == 130
    assert capsys.readouterr() == ("", "")


def test_a_mistake_of_ours_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        guarded("ksmctl", lambda: 1 // 0)


def test_without_a_daemon_every_verb_that_needs_one_says_so(tmp_path, capsys):
    for argv in (
        ["status"],
        ["scan"],
        ["unmerge"],
        ["pause"],
        ["resume"],
        ["targets"],
        ["why", "1"],
    ):
        assert ksmctl.main(["--socket", str(tmp_path / "none"), *argv]) == 1
        err = capsys.readouterr().err
        assert err.startswith("ksmctl: ksmd is not running")
        assert len(err.splitlines()) == 2


# -- what is shown ---------------------------------------------------------------------------------


def test_sizes_and_counts_read_well():
    assert [words.size(n) for n in (0, 1, 1023, 4096, 10_485_760, -(3 << 29), 5 << 50)] == [
        "0 B", "1 B", "1023 B", "4.00 KiB", "10.0 MiB", "-1.50 GiB", "5.00 PiB",
    ]  # fmt: skip
    assert words.count(1, "page") == "1 page"
    assert words.count(12_345, "page") == "12,345 pages"
    assert words.pages_size(256) == "1.00 MiB"


def test_status_fits_a_hundred_columns_and_starts_with_the_savings():
    text = shown(status_screen.show, golden(), 50 << 30)
    assert fits(text)
    assert text.splitlines()[0] == "ksmd saves 71.3 GiB, after its own costs"


def test_status_names_every_refusal_with_its_sentence():
    words = " ".join(shown(status_screen.show, golden(), None).split())
    for reason in Reason:
        assert reason.value in words
    # sentences are folded over lines inside their column, so compare by words of the last cell
    for text in (SENTENCES[Reason.SECCOMP], SENTENCES[Reason.VMA_BUDGET]):
        assert all(word in words for word in text.split())


def test_names_of_processes_cannot_drive_the_terminal():
    text = shown(status_screen.show, golden(), None)
    assert "\x1b" not in text
    assert "\udcff" not in text
    assert "wörker?[31m?[bo" in "".join(text.split())


def test_status_warns_when_the_host_could_not_hold_everything_unshared():
    assert "Take care" in shown(status_screen.show, golden(headroom_bytes=10 << 30), 9 << 30)
    assert "Take care" not in shown(status_screen.show, golden(headroom_bytes=9 << 30), 10 << 30)


def test_status_says_how_often_and_how_long_anybody_was_stopped():
    text = shown(status_screen.show, golden(stops=1234, stop_ms_p99=3.21, stop_ms_max=7.89), None)
    assert "1,234, 99 of 100 no longer than 3.2 ms, the longest 7.9 ms" in text
    assert "none so far" in shown(status_screen.show, golden(), None)


def test_status_says_how_to_undo():
    assert "ksmctl unmerge" in shown(status_screen.show, golden(), None)
    assert "ksmctl pause" in shown(status_screen.show, golden(), None)


def test_a_loss_is_called_a_loss():
    text = shown(status_screen.show, golden(general_profit=-4096), None)
    assert text.splitlines()[0] == "ksmd costs 4.00 KiB more than it saves"
    assert "does not pay" in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"settled": True}, "settled"),
        ({"settled": False}, "not settled yet"),
        ({"paused": True}, "ksmctl resume"),
        ({"run": "stop"}, "run: stop"),
        ({"run": "unmerge"}, "giving every merged page back"),
        ({"targets": []}, "no process is selected"),
    ],
)
def test_the_state_of_the_daemon_is_one_sentence(changes, words):
    assert words in status_screen.state(golden(**changes))


def test_an_empty_status_is_shown_too():
    text = shown(status_screen.show, dataclasses.asdict(Status()), 1 << 30)
    assert fits(text)
    assert text.startswith("ksmd saves 0 B")


WHY = {
    "pid": 4_194_303, "name": NASTY, "domain": "uid:1000", "target": True, "reason": "",
    "sentence": "", "detail": "", "state": "volatile",
    "areas": [
        {
            "start": 0x7F0000000000 + index * 4096, "end": 0x7FFFFFFFF000, "perms": "rw-p",
            "path": "/" + NASTY, "merging": 10**9, "zero": 10**9,
            "reason": reason.value if index else "",
            "sentence": SENTENCES[reason], "detail": "detail " * 20,
        }
        for index, reason in enumerate(Reason)
    ],
}  # fmt: skip


def test_why_fits_and_answers_for_the_page():
    assert interface.load().gives("Why", WHY) is None
    text = shown(why_screen.show, WHY, 0x7F0000000000)
    assert fits(text)
    assert "The page at 0x7f0000000000 is volatile" in text
    assert "7f0000000000-7ffffffff000" in text.split()


class Pages:
    """A client whose daemon gives ranges ten at a time."""

    def __init__(self, areas: list[dict]) -> None:
        self._areas = areas

    def call(self, method: str, /, **parameters) -> dict:
        assert (method, parameters["pid"]) == ("Why", 7)
        left = [area for area in self._areas if area["start"] >= parameters.get("start", 0)]
        reply = {**WHY, "areas": left[:10]}
        return reply | ({"next": left[10]["start"]} if len(left) > 10 else {})


@pytest.mark.parametrize("count", [0, 1, 9, 10, 11, 20, 35])
def test_why_asks_for_every_range_of_a_process_that_has_many(count):
    areas = [WHY["areas"][0] | {"start": number * 4096} for number in range(count)]
    reply = why.ask(Pages(areas), 7, None)
    assert reply["areas"] == areas
    assert "next" not in reply


def test_why_sums_up_what_is_left_alone_and_lists_the_rest():
    text = shown(why_screen.show, WHY, None)
    assert fits(text)
    assert text.count("7ffffffff000") == 1
    assert "Left alone" in text
    many = {**WHY, "areas": [WHY["areas"][0]] * 5000}
    text = shown(why_screen.show, many, None)
    assert "and 4,940 more ranges" in text
    assert len(text.splitlines()) < 700


def test_the_costs_shown_are_what_is_missing_between_savings_and_profit():
    words = shown(
        status_screen.show,
        golden(
            pages_shared=100, pages_sharing=300, zero_pages=12, general_profit=52 * 4096,
            metadata_bytes=4096,
        ),
        None,
    )  # fmt: skip
    assert "400 pages (1.56 MiB) share 100 in the store: 1.17 MiB saved" in words
    assert "1.02 MiB in all, 4.00 KiB of it tables and VMAs" in words


def test_why_says_what_is_wrong_with_a_process_as_a_whole():
    refused = {**WHY, "reason": "seccomp", "sentence": SENTENCES[Reason.SECCOMP], "areas": []}
    assert "Left alone as a whole: its seccomp filter" in shown(why_screen.show, refused, None)
    assert "No rule" in shown(why_screen.show, {**WHY, "target": False}, None)


FEATURES = [
    Feature("a", True, True, "fine", "nothing is merged"),
    Feature("b", False, False, "refused", "x" * 150),
]


def test_features_fit_and_tell_needed_ones_from_others():
    text = shown(features.show, FEATURES)
    assert fits(text)
    assert "ksmd can merge here." in text
    text = shown(features.show, [*FEATURES, Feature("c", False, True, "", "no guard")])
    assert "cannot merge here. Missing: c." in text


def test_features_exits_with_4_when_a_needed_one_is_missing(monkeypatch, capsys):
    for present, code in ((True, 0), (False, 4)):
        one = Feature("c", present, True, "", "no guard")
        monkeypatch.setattr(features, "probe", lambda one=one: [one])
        assert ksmctl.main(["features", "--json"]) == code
        answer = json.loads(capsys.readouterr().out)
        assert answer == {"can_merge": present, "features": [dataclasses.asdict(one)]}


def test_what_unmerge_could_not_do_is_told_and_fails(tmp_path, capsys):
    refusal = {
        "reason": "memory", "sentence": SENTENCES[Reason.MEMORY], "subject": "12", "detail": "",
    }  # fmt: skip
    with served(tmp_path / "s", {"Unmerge": {"pages": 3, "refused": [refusal]}}):
        assert ksmctl.main(["unmerge", "--wait", "--socket", str(tmp_path / "s")]) == 1
    out, err = capsys.readouterr()
    assert "3 pages (12.0 KiB) given back" in out
    assert err == f"ksmctl: 12: {SENTENCES[Reason.MEMORY]}\n"
    assert unmerge.HELP


def test_check_config_lists_every_problem_with_its_place(tmp_path, capsys):
    file = tmp_path / "ksmd.yaml"
    file.write_text("version: 1\nrun: perhaps\nspeed: 3\n")
    assert ksmctl.main(["check-config", str(file)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"{file}:2:6", f"{file}:3:1"]
    assert ksmctl.main(["check-config", "--json", str(file)]) == 2
    answer = json.loads(capsys.readouterr().out)
    assert [problem["line"] for problem in answer["problems"]] == [2, 3]
    assert answer["valid"] is False


def test_check_config_says_what_a_right_file_means(tmp_path, capsys):
    file = tmp_path / "ksmd.yaml"
    file.write_text("version: 1\ntargets: [{name: web, match: {comm: nginx}}]\n")
    assert ksmctl.main(["check-config", str(file)]) == 0
    assert "targets: web" in capsys.readouterr().out
    assert ksmctl.main(["--json", "check-config", str(file)]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["settings"]["targets"][0]["match"] == {"comm": "nginx"}
    assert check_config.HELP


def test_a_missing_settings_file_is_a_usage_error(tmp_path, capsys):
    assert ksmctl.main(["check-config", str(tmp_path / "none")]) == 2
    assert ksmctl.main(["estimate", "--config", str(tmp_path / "none")]) == 2
    assert "does not exist" in capsys.readouterr().err


# -- against a server ------------------------------------------------------------------------------


class served:
    """A control server in a thread that answers with given replies."""

    def __init__(self, path, replies):
        self._replies = replies
        self._selector = selectors.DefaultSelector()
        self._server = ControlServer(path, self._dispatch)
        self.calls = []
        self._running = True
        self._thread = threading.Thread(target=self._turn)

    def _dispatch(self, method, parameters, call):
        self.calls.append((method, parameters))
        reply = self._replies[method]
        if isinstance(reply, list):
            for one in reply[:-1]:
                call.reply(one, continues=True)
            return reply[-1]
        return reply

    def _turn(self):
        self._server.register(self._selector)
        while self._running:
            for key, mask in self._selector.select(0.02):
                key.data(key, mask)
        self._server.close()

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._running = False
        self._thread.join()
        self._selector.close()


@pytest.mark.parametrize(
    ("argv", "verb"),
    [
        (["status"], "status"),
        (["--socket", "status", "pause"], "pause"),
        (["--socket=status", "--json", "pause"], "pause"),
        (["why", "7", "--socket", "scan"], "why"),
        (["check-config", "--help"], "check-config"),
    ],
)
def test_only_the_verb_that_is_meant_is_loaded(argv, verb):
    assert verbs.chosen(argv, ksmctl.VERBS, [global_options()]) == (verb,)


@pytest.mark.parametrize(
    "argv", [[], ["--help"], ["--version", "status"], ["--socket"], ["--json=1", "scan"], ["stat"]]
)
def test_all_verbs_are_loaded_where_none_is_named(argv):
    assert verbs.chosen(argv, ksmctl.VERBS, [global_options()]) == ksmctl.VERBS


def test_json_is_the_daemon_s_answer_in_full_wherever_the_options_stand(tmp_path, capsys):
    path = str(tmp_path / "s")
    whole = golden()
    with served(path, {"Status": whole, "Targets": {"targets": whole["targets"]}}):
        for argv in (
            ["--socket", path, "--json", "status"],
            ["status", "--socket", path, "--json"],
            ["--json", "status", "--socket", path],
        ):
            assert ksmctl.main(argv) == 0
            assert json.loads(capsys.readouterr().out) == whole
        assert ksmctl.main(["targets", "--json", "--socket", path]) == 0
        assert json.loads(capsys.readouterr().out) == {"targets": whole["targets"]}


def test_status_and_targets_are_shown_for_people(tmp_path, capsys):
    path = str(tmp_path / "s")
    whole = golden()
    with served(path, {"Status": whole, "Targets": {"targets": whole["targets"]}}):
        assert ksmctl.main(["status", "--socket", path]) == 0
        assert capsys.readouterr().out.startswith("ksmd saves 71.3 GiB")
        assert ksmctl.main(["targets", "--socket", path]) == 0
        text = capsys.readouterr().out
        assert fits(text)
        assert "infer@1.service" in text
        assert "Targets left alone" in text


def test_scan_passes_its_options_on_and_tells_the_result(tmp_path, capsys):
    path = str(tmp_path / "s")
    done = {"scanned": 1000, "merged": 512, "settled": True, "passes": 3}
    steps = [{**done, "passes": 1, "settled": False}, done]
    with served(path, {"Scan": steps, "Pause": {}, "Resume": {}}) as server:
        assert ksmctl.main(["scan", "--socket", path]) == 0
        assert "was asked for" in capsys.readouterr().out
        assert ksmctl.main(["scan", "--wait", "--until-settled", "--socket", path]) == 0
        assert capsys.readouterr().out == (
            "1,000 pages scanned, 512 merged (2.00 MiB) in 3 passes;"
            " settled: the last pass merged nothing more.\n"
        )
        assert ksmctl.main(["scan", "--wait", "--json", "--socket", path]) == 0
        assert json.loads(capsys.readouterr().out) == done
        assert ksmctl.main(["pause", "--json", "--socket", path]) == 0
        assert json.loads(capsys.readouterr().out) == {}
        assert ksmctl.main(["resume", "--socket", path]) == 0
    assert server.calls == [
        ("Scan", {}),
        ("Scan", {"wait": True, "until_settled": True}),
        ("Scan", {"wait": True, "until_settled": False}),
        ("Pause", {}),
        ("Resume", {}),
    ]


def test_a_scan_that_did_not_settle_fails_when_that_was_asked_for(tmp_path, capsys):
    path = str(tmp_path / "s")
    done = {"scanned": 1, "merged": 0, "settled": False, "passes": 9}
    with served(path, {"Scan": done}):
        assert ksmctl.main(["scan", "--wait", "--until-settled", "--socket", path]) == 1
        assert "before it settled" in capsys.readouterr().err
        assert ksmctl.main(["scan", "--wait", "--socket", path]) == 0


def test_addresses_are_understood_in_hexadecimal(tmp_path, capsys):
    path = str(tmp_path / "s")
    with served(path, {"Why": WHY}) as server:
        assert ksmctl.main(["why", "7", "0x7f0000000000", "--json", "--socket", path]) == 0
        assert json.loads(capsys.readouterr().out) == WHY
        assert ksmctl.main(["why", "7", "--socket", path]) == 0
    assert server.calls == [("Why", {"pid": 7, "address": 0x7F0000000000}), ("Why", {"pid": 7})]


def test_a_reader_that_goes_away_ends_it_quietly(tmp_path):
    path = str(tmp_path / "s")
    for extra in ([], ["--json"]):
        reader, writer = os.pipe()
        os.close(reader)
        with served(path, {"Status": golden()}):
            done = subprocess.run(
                [sys.executable, "-P", "-m", "ksmd.cli.ksmctl", "--socket", path, "status", *extra],
                stdout=writer,
                stderr=subprocess.PIPE,
                check=False,
            )
        os.close(writer)
        assert (done.returncode, done.stderr) == (141, b"")


def test_colours_are_for_terminals_only():
    file = io.StringIO()
    status_screen.show(Console(file=file, force_terminal=True, width=100), golden(), None)
    assert "\x1b[" in file.getvalue()
    assert "\x1b" not in shown(status_screen.show, golden(), None)


# -- demo ------------------------------------------------------------------------------------------


def test_the_demo_refuses_without_root_before_it_starts_anything(monkeypatch, capsys):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(subprocess, "Popen", None)
    assert ksmd_command.main(["demo"]) == 3
    assert capsys.readouterr().err.splitlines()[1].strip() == "run it as root"


def test_the_demo_refuses_a_kernel_that_lacks_something_needed(monkeypatch, capsys):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(subprocess, "Popen", None)
    lacking = [Feature("guard self-test", False, True, "", "")]
    monkeypatch.setattr(features, "probe", lambda: lacking)
    assert ksmd_command.main(["demo"]) == 4
    assert "guard self-test" in capsys.readouterr().err


def test_the_demo_refuses_when_memory_would_not_suffice(monkeypatch, capsys):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(subprocess, "Popen", None)
    monkeypatch.setattr(features, "probe", lambda: FEATURES)
    assert ksmd_command.main(["demo", "--workers", "64", "--mib", "65536"]) == 1
    assert "--mib" in capsys.readouterr().err


def test_the_sums_that_a_demo_expects_are_those_of_the_seeded_content():
    sizes = Sizes(3 << 20, 4096, 8192)
    first, second = expected_sums(0, sizes), expected_sums(1, sizes)
    assert first[0] == second[0]
    assert first[1] != second[1]
    assert first[2] == second[2] == hashlib.sha256(bytes(8192)).hexdigest()
    byte = shared_byte(sizes, (2 << 20) + 5)
    assert expected_sums(0, sizes, {(2 << 20) + 5: byte}) == first
    changed = expected_sums(0, sizes, {(2 << 20) + 5: byte ^ 1})
    assert (changed[0] != first[0], changed[1:]) == (True, first[1:])
