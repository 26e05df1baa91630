"""Reading a settings file: what is accepted, and how each mistake is told."""

import os
from pathlib import Path

import pytest

from ksmd.model.errors import Exit, UsageError
from ksmd.settings import Settings, SettingsError, defaults, load, loads
from ksmd.settings.tree import MAX_CHARACTERS


def problems(text: str) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        loads(text, "f")
    return [str(problem) for problem in caught.value.problems]


def target(body: str) -> str:
    return f"version: 1\ntargets:\n- name: a\n  match: {{pid: 1}}\n  {body}\n"


def test_a_file_of_nothing_but_its_version_means_the_defaults():
    assert loads("version: 1\n") == defaults()


def test_the_example_of_the_contract_loads():
    settings = loads(
        "version: 1\n"
        "run: merge   # stop | merge | unmerge\n"
        "on_stop: keep\n"
        "scan:   {pages_to_scan: 100, sleep_millisecs: 0, max_pages_to_merge: 7}\n"
        "tables: {page_hash_size: 0, rmap_hash_size: 4096, sha1_hash_size: 1}\n"
        "targets:\n"
        "  - name: inference\n"
        "    match: {exe: /usr/bin/python3*, cmdline: 'worker', user: www,\n"
        "            cgroup: /system.slice/*, unit: infer@*.service, comm: p, pid: [1, 2]}\n"
        "    regions: anon\n"
        "    domain: inference\n"
        "  - {name: b, match: {pid: 3}, regions: [{start: 0x7f0000000000, npages: 65536}]}\n"
    )
    first, second = settings.targets
    assert settings.on_stop == "keep"
    given = {"pages_to_scan": 100, "sleep_millisecs": 0, "max_pages_to_merge": 7}
    assert settings.scan.model_dump() == defaults().scan.model_dump() | given
    assert (first.match.exe, first.match.unit) == ("/usr/bin/python3*", "infer@*.service")
    assert first.match.pid == (1, 2)
    assert (first.regions, first.domain, second.domain) == ("anon", "inference", None)
    assert second.match.pid == (3,)
    assert second.regions[0].start == 0x7F0000000000
    assert second.regions[0].end == 0x7F0000000000 + 65536 * 4096


def test_every_mistake_of_a_file_is_told_at_once_in_file_order():
    text = (
        "version: 2\n"
        "run: yes\n"
        "sokcet: /x\n"
        "scan:\n"
        "  pages_to_scan: 0\n"
        "  pages_to_scan: 5\n"
        "window: {deadline_ms: 1001, max_runs: true}\n"
        "targets:\n"
        "  - name: a\n"
        "    match: {pid: [1, x], cmdline: '('}\n"
        "    regions: [{start: 0x1000, npages: 2}, {start: 0x5001, npages: 1},"
        " {start: 8192, npages: 1}]\n"
        "  - name: a\n"
        "    match: {pid: 1}\n"
        "    regions: anon\n"
        "    colour: red\n"
    )
    assert problems(text) == [
        "f:1:10: version: must be 1, the only version of this format",
        "f:2:6: run: must be stop, merge or unmerge, not 'yes'"
        " (a bare yes is a truth value in YAML)",
        "f:3:1: sokcet: unknown key; did you mean socket?",
        "f:5:18: scan.pages_to_scan: must be at least 1, not '0'",
        "f:6:3: scan.pages_to_scan: duplicate key, first given at line 5",
        "f:7:23: window.deadline_ms: must be at most 1000, not '1001'",
        "f:7:39: window.max_runs: must be an integer, not 'true'",
        "f:10:22: targets[0].match.pid[1]: must be an integer, not 'x'",
        "f:10:35: targets[0].match.cmdline: is not a regular expression: missing ), unterminated"
        " subpattern at position 0",
        "f:11:51: targets[0].regions[1].start: must be a multiple of the page size, 0x1000;"
        " the page begins at 0x5000",
        "f:11:71: targets[0].regions[2]: [0x2000, 0x3000) overlaps targets[0].regions[0],"
        " [0x1000, 0x3000)",
        "f:12:11: targets[1].name: 'a' is the name of targets[0] too",
        "f:14:14: targets[1].regions: claims the same memory as targets[0].regions[0]"
        " (target 'a'), and both match pid 1",
        "f:15:5: targets[1].colour: unknown key; known here: name, match, regions, domain,"
        " accept_seccomp_risk, min_age_secs",
    ]


def test_a_settings_error_is_a_usage_error_with_places():
    with pytest.raises(UsageError) as caught:
        loads("version: 1\nscan: {sleep: 5}\n", "a.yaml")
    assert caught.value.exit_code is Exit.USAGE
    (problem,) = caught.value.problems
    assert (problem.file, problem.line, problem.column) == ("a.yaml", 2, 8)
    assert problem.path == "scan.sleep"
    assert str(caught.value) == str(problem)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("run: merge", "f:1:1: version: is missing"),
        ("[]", "f:1:1: the settings must be a mapping (key: value), not a list"),
        ("merge", "f:1:1: the settings must be a mapping (key: value), not 'merge'"),
        ("version: '1'", "f:1:10: version: must be an integer, not '1'"),
        ("version: true", "f:1:10: version: must be an integer, not 'true'"),
        ("version: 1.0", "f:1:10: version: must be an integer, not '1.0'"),
        ("version: 1\nscan:", "f:2:6: scan: has no value: give it one, or leave the key out"),
        ("version: 1\nscan: 5", "f:2:7: scan: must be a mapping (key: value), not '5'"),
        ("version: 1\ntargets: {}", "f:2:10: targets: must be a list, not a mapping"),
        ("version: 1\nsocket: ksmd.sock", "f:2:9: socket: must be an absolute path"),
        ("version: 1\nlimits: {vma_percent: 51}",
         "f:2:23: limits.vma_percent: must be at most 50, not '51'"),
        (f"version: 1\nsocket: /{'x' * 107}",
         "f:2:9: socket: is too long for a socket: at most 107 bytes"),
        ("version: 1\n? [a]\n: 1", "f:2:3: a key must be a word, not a list or a mapping"),
        ("version: 1\n'': 1", "f:2:1: '' cannot be a key"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_told_at_its_place(text, said):
    assert problems(text) == [said]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("regions: both", "f:5:12: targets[0].regions: must be anon or heap, not 'both'"),
        ("regions: {start: 0}", "f:5:12: targets[0].regions: must be anon, heap or a list of"
         " {start, npages}, not a mapping"),
        ("regions: []", "f:5:12: targets[0].regions: must not be an empty list"),
        ("regions: [{start: 4096}]", "f:5:13: targets[0].regions[0].npages: is missing"),
        ("regions: [{start: 4096, npages: 0}]",
         "f:5:35: targets[0].regions[0].npages: must be at least 1, not '0'"),
        ("regions: [{start: '0x1000', npages: 1}]",
         "f:5:21: targets[0].regions[0].start: must be an integer, not '0x1000'"),
        ("regions: [{start: 0x800000000000, npages: 1}]",
         "f:5:21: targets[0].regions[0].start: must be below 0x800000000000,"
         " not '0x800000000000'"),
        ("regions: [{start: 0x7ffffffff000, npages: 2}]",
         "f:5:13: targets[0].regions[0]: ends at 0x800000001000, beyond 2^47, the end of user"
         " memory"),
        ("domain: 'uid:0'",
         "f:5:11: targets[0].domain: must consist of A-Z a-z 0-9 _ . -, not 'uid:0'"),
        ("domain: 12", "f:5:11: targets[0].domain: must be text: put it in quotes, '12'"),
        ("domain: no", "f:5:11: targets[0].domain: must be text: put it in quotes, 'no'"),
        ("domain: [a]", "f:5:11: targets[0].domain: must be text, not a list"),
        ("min_age_secs: -1", "f:5:17: targets[0].min_age_secs: must be at least 0, not '-1'"),
        ("accept_seccomp_risk: maybe",
         "f:5:24: targets[0].accept_seccomp_risk: must be true or false, not 'maybe'"),
        ("accept_seccomp_risk: 'true'",
         "f:5:24: targets[0].accept_seccomp_risk: must be true or false, not 'true'"),
    ],
)  # fmt: skip
def test_a_wrong_value_of_a_target_is_told_at_its_place(body, said):
    assert problems(target(body)) == [said]


@pytest.mark.parametrize(
    ("match", "said"),
    [
        ("{}", "f:2:28: targets[0].match: needs at least one of exe, comm, cmdline, user, cgroup,"
         " unit, pid: without one it would match everything"),
        ("{exe: ''}", "f:2:34: targets[0].match.exe: must not be empty"),
        ("{exe: }", "f:2:33: targets[0].match.exe: has no value: give it one,"
         " or leave the key out"),
        ("{exe: ~, pid: 1}", "f:2:34: targets[0].match.exe: has no value: give it one,"
         " or leave the key out"),
        ("{user: 1000}", "f:2:35: targets[0].match.user: must be text: put it in quotes, '1000'"),
        ("{pid: []}", "f:2:34: targets[0].match.pid: must not be an empty list"),
        ("{pid: 0}", "f:2:34: targets[0].match.pid: must be at least 1, not '0'"),
        ("{pid: [1, 4194305]}",
         "f:2:38: targets[0].match.pid[1]: must be at most 4194304, not '4194305'"),
        ("{pid: true}", "f:2:34: targets[0].match.pid: must be an integer or a list of"
         " integers, not 'true'"),
        ("{cmdline: 'a{99999999999999999999}'}", "f:2:38: targets[0].match.cmdline: is not a"
         " regular expression: the repetition number is too large"),
        ("{exec: /bin/sh}", "f:2:29: targets[0].match.exec: unknown key; did you mean exe?"),
    ],
)  # fmt: skip
def test_a_wrong_match_never_widens_silently(match, said):
    text = f"version: 1\ntargets: [{{name: a, match: {match}}}]"
    assert problems(text) == [said]


@pytest.mark.parametrize("word", ["yes", "Yes", "ON", "off", "no", "true", "False"])
def test_a_yaml_truth_value_is_not_a_word(word):
    (said,) = problems(f"version: 1\nrun: {word}")
    assert said.startswith(f"f:2:6: run: must be stop, merge or unmerge, not '{word}'")
    (said,) = problems(f"version: 1\ntargets: [{{name: a, match: {{comm: {word}}}}}]")
    assert said == f"f:2:35: targets[0].match.comm: must be text: put it in quotes, '{word}'"


def test_quoted_words_are_text_and_keys_are_never_truth_values():
    settings = loads("version: 1\ntargets: [{name: 'on', match: {comm: \"yes\", user: '0x10'}}]")
    assert (settings.targets[0].name, settings.targets[0].match.comm) == ("on", "yes")
    assert settings.targets[0].match.user == "0x10"
    assert problems("version: 1\non: 1")[0].startswith("f:2:1: on: unknown key")


@pytest.mark.parametrize("number", ["0x1000", "0X1000", "4096", "+4096"])
def test_addresses_may_be_hexadecimal_or_decimal(number):
    text = target(f"regions: [{{start: {number}, npages: 1}}]")
    if number == "0X1000":  # not a number to any YAML: refused, not guessed
        assert problems(text) == [
            "f:5:21: targets[0].regions[0].start: must be an integer, not '0X1000'"
        ]
    else:
        assert loads(text).targets[0].regions[0].start == 4096


@pytest.mark.parametrize("number", ["010", "1:30", "25_000", "0b11", "0x1_0"])
def test_numbers_that_yaml_readers_read_differently_are_refused(number):
    assert problems(f"version: 1\nscan: {{pages_to_scan: {number}}}") == [
        f"f:2:23: scan.pages_to_scan: {number} is not read alike by all YAML readers:"
        " write it in plain decimal or 0x..., or quote it as text"
    ]


def test_endless_digits_are_a_mistake_and_not_a_crash():
    assert problems("version: " + "9" * 5000) == ["f:1:10: version: is too large a number"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("version: 1\nscan: &a {}", "f:2:7: scan: anchors (&a) are not used here"),
        ("version: 1\nscan: *a", "f:2:7: scan: aliases (*a) are not used here: write it out"),
        ("version: 1\nscan: !!map {}",
         "f:2:7: scan: tags (tag:yaml.org,2002:map) are not used here"),
        ("version: !!python/object/apply:os.getpid []",
         "f:1:10: version: tags (tag:yaml.org,2002:python/object/apply:os.getpid)"
         " are not used here"),
        ("version: 1\n<<: {run: stop}",
         "f:2:1: merge keys (<<) are not used here: write the keys out"),
        ("*a", "f:1:1: aliases (*a) are not used here: write it out"),
    ],
)  # fmt: skip
def test_yaml_machinery_is_refused_by_name(text, said):
    assert problems(text) == [said]


def test_what_an_anchor_holds_is_judged_all_the_same():
    assert problems("version: 1\nscan: &a {sleep_millisecs: x}") == [
        "f:2:7: scan: anchors (&a) are not used here",
        "f:2:28: scan.sleep_millisecs: must be an integer, not 'x'",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "f: is empty; at least `version: 1` is needed"),
        ("# nothing\n---\n", "f: is empty; at least `version: 1` is needed"),
        ("~", "f: is empty; at least `version: 1` is needed"),
        ("version: 1: 2", "f:1:11: is not YAML: mapping values are not allowed here"),
        ("version: 1\n\trun: stop", "f:2:1: is not YAML: found character '\\t' that cannot start"
         " any token (indent by spaces)"),
        ("version: 1\n---\nversion: 1",
         "f:2:1: a settings file is one YAML document; here begins another"),
        ("version: 1\na\0", "f:2:2: the character '\\x00' is not allowed"),
        ("a: \ud800", "f:1:4: the character '\\ud800' is not allowed"),
        ("[" * 100_000, "f:1:17: is nested too deeply"),
        ("x" * (MAX_CHARACTERS + 1), f"f:1:1: is longer than {MAX_CHARACTERS} characters"),
    ],
)  # fmt: skip
def test_a_text_that_cannot_be_read_on_is_told_with_its_place(text, said):
    assert problems(text) == [said]


@pytest.mark.parametrize("escape", ["\\0", "\\ud800"])
def test_escapes_that_nothing_can_match_are_refused(escape):
    (said,) = problems(f'version: 1\ntargets: [{{name: a, match: {{exe: "{escape}"}}}}]')
    assert said.startswith("f:2:34: targets[0].match.exe: contains the character ")
    said.encode()  # must be printable


def test_an_escape_beyond_unicode_is_a_mistake_and_not_a_crash():
    (said,) = problems('run: "\\U00110000"')
    assert said.startswith("f:1:")
    assert "is not YAML" in said


def test_a_byte_order_mark_and_crlf_are_accepted():
    assert loads("\ufeffversion: 1\r\nrun: stop\r\n").run == "stop"


def test_regions_that_touch_do_not_overlap():
    settings = loads(
        target(
            "regions: [{start: 8192, npages: 1}, {start: 0, npages: 2}, {start: 12288, npages: 9}]"
        )
    )
    assert len(settings.targets[0].regions) == 3


def test_an_overlap_is_told_at_the_later_of_the_two_in_the_file():
    assert problems(target("regions: [{start: 0x3000, npages: 9}, {start: 0, npages: 4}]")) == [
        "f:5:41: targets[0].regions[1]: [0x0, 0x4000) overlaps targets[0].regions[0],"
        " [0x3000, 0xc000)"
    ]


@pytest.mark.parametrize(
    ("first", "second", "conflict"),
    [
        ("anon", "anon", True),
        ("anon", "heap", True),
        ("heap", "heap", True),
        ("[{start: 0, npages: 1}]", "anon", True),
        ("heap", "[{start: 0, npages: 1}]", False),
        ("[{start: 0, npages: 2}]", "[{start: 4096, npages: 1}]", True),
        ("[{start: 0, npages: 1}]", "[{start: 4096, npages: 1}]", False),
    ],
)
def test_two_targets_may_not_claim_the_same_memory_of_a_named_process(first, second, conflict):
    def text(second_pids: str) -> str:
        return (
            f"version: 1\ntargets:\n- {{name: a, match: {{pid: [7, 8]}}, regions: {first}}}\n"
            f"- {{name: b, match: {{pid: {second_pids}}}, regions: {second}}}\n"
        )

    assert isinstance(loads(text("9")), Settings)
    if not conflict:
        assert isinstance(loads(text("[9, 8]")), Settings)
        return
    (said,) = problems(text("[9, 8]"))
    assert said.startswith("f:4:")
    assert ": targets[1].regions" in said
    assert "claims the same memory as targets[0].regions" in said
    assert said.endswith("(target 'a'), and both match pid 8")


def test_regions_left_out_mean_anon_in_the_search_for_conflicts_too():
    text = "version: 1\ntargets: [{name: a, match: {pid: 1}}, {name: b, match: {pid: 1}}]"
    assert problems(text) == [
        "f:2:39: targets[1].regions: claims the same memory as targets[0].regions (target 'a'),"
        " and both match pid 1"
    ]


def test_odd_keys_are_quoted_in_paths():
    assert problems('version: 1\n"a b\\n": 1')[0].startswith("f:2:1: 'a b\\n': unknown key")


def test_load_reads_a_file_and_names_it_in_mistakes(tmp_path: Path):
    path = tmp_path / "k.yaml"
    path.write_text("version: 1\nrun: stop\n")
    assert load(path).run == "stop"
    path.write_text("version: 1\nrun: go\n")
    with pytest.raises(SettingsError, match=rf"^{path}:2:6: run: "):
        load(path)


def test_files_that_cannot_be_read_are_told_apart(tmp_path: Path):
    def said(path: Path) -> str:
        with pytest.raises(SettingsError) as caught:
            load(path)
        return str(caught.value)

    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "empty").touch()
    (tmp_path / "latin1").write_bytes(b"version: 1\nrun: m\xe9rge\n")
    (tmp_path / "large").write_bytes(b"#" * (5 << 20))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert said(tmp_path / "none") == f"{tmp_path}/none: does not exist"
    assert said(tmp_path) == f"{tmp_path}: is not a regular file"
    assert said(tmp_path / "fifo") == f"{tmp_path}/fifo: is not a regular file"
    assert said(tmp_path / "empty").startswith(f"{tmp_path}/empty: is empty")
    assert said(tmp_path / "latin1").startswith(f"{tmp_path}/latin1:2:7: is not UTF-8: byte 0xe9")
    assert "is longer than" in said(tmp_path / "large")
    assert said(tmp_path / "loop").startswith(f"{tmp_path}/loop: cannot be read: ")
    assert "cannot be a path" in said(Path("a\0b"))


def test_a_file_without_read_permission_is_a_usage_error(tmp_path: Path, monkeypatch):
    path = tmp_path / "k.yaml"
    path.write_text("version: 1\n")

    def denied(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)  # root reads any file
    with pytest.raises(SettingsError, match="cannot be read: Permission denied"):
        load(path)
