"""Which processes the rules choose, and which answers a pid that was named gets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import pytest

from ksmd.core.selection import matches, select
from ksmd.model.process import ProcessInfo, TargetId
from ksmd.model.refusal import Reason


@dataclass(frozen=True)
class Match:
    exe: str | None = None
    comm: str | None = None
    cmdline: str | None = None
    user: str | None = None
    cgroup: str | None = None
    unit: str | None = None
    pid: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Span:
    start: int
    npages: int


@dataclass(frozen=True)
class Rule:
    name: str = "rule"
    match: Match = field(default_factory=Match)
    regions: Literal["anon", "heap"] | tuple[Span, ...] = "anon"
    domain: str | None = None
    accept_seccomp_risk: bool = False
    min_age_secs: float = 0.0


def process(pid: int = 100, **changes: object) -> ProcessInfo:
    values: dict[str, object] = {
        "id": TargetId(pid, 5000),
        "uid": 33,
        "user": "www",
        "comm": "python3",
        "exe": "/usr/bin/python3.11",
        "cmdline": "python3 -m worker --shard 3",
        "cgroup": "/system.slice/infer@1.service",
        "unit": "infer@1.service",
        "kernel_thread": False,
        "zombie": False,
    }
    return ProcessInfo(**(values | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "match",
    [
        Match(exe="/usr/bin/python3*"),
        Match(comm="pyth?n[0-9]"),
        Match(cmdline=r"worker.*shard \d"),
        Match(user="w*"),
        Match(user="33"),
        Match(cgroup="/system.slice/*"),
        Match(unit="infer@*.service"),
        Match(pid=(7, 100)),
        Match(exe="*", comm="*", cmdline="", user="*", cgroup="*", unit="*", pid=(100,)),
    ],
)
def test_a_match_holds_when_every_key_holds(match: Match) -> None:
    assert matches(process(), match)


@pytest.mark.parametrize(
    "match",
    [
        Match(exe="python3*"),  # globs are on the whole string
        Match(exe="/usr/bin/PYTHON3*"),  # and mind case
        Match(comm="python"),
        Match(cmdline="^worker"),
        Match(user="root"),
        Match(user="3"),
        Match(cgroup="/user.slice/*"),
        Match(unit=""),
        Match(pid=(10, 1000)),
        Match(exe="/usr/bin/python3*", user="root"),
        Match(user="www", pid=(7,)),
    ],
)
def test_a_match_fails_when_one_key_fails(match: Match) -> None:
    assert not matches(process(), match)


def test_a_match_without_keys_selects_nothing() -> None:
    assert select([process()], [Rule()]) == ([], [])


def test_the_first_matching_rule_wins_and_says_all_the_rest() -> None:
    rules = [
        Rule("no", Match(user="root")),
        Rule("first", Match(user="www"), "heap", "shared", True),
        Rule("second", Match(pid=(100,))),
    ]
    (chosen,), refusals = select([process()], rules)
    assert (chosen.name, chosen.regions, chosen.domain) == ("first", "heap", "shared")
    assert chosen.accept_seccomp_risk
    assert chosen.process == process()
    assert refusals == []


def test_the_default_domain_is_the_user_id() -> None:
    chosen, _ = select([process(1, uid=0), process(2, uid=33)], [Rule(match=Match(comm="*"))])
    assert [c.domain for c in chosen] == ["uid:0", "uid:33"]


def test_explicit_regions_are_carried_over_as_ranges() -> None:
    rule = Rule(match=Match(comm="*"), regions=(Span(0x1000, 2), Span(0x9000, 1)))
    (chosen,), _ = select([process()], [rule])
    assert chosen.regions == ((0x1000, 2), (0x9000, 1))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kernel_thread": True}, Reason.KERNEL_THREAD),
        ({"zombie": True}, Reason.ZOMBIE),
        ({}, Reason.OURSELVES),
    ],
)
class TestProcessesThatCannotBeTargets:
    def ours(self, reason: Reason) -> set[int]:
        return {100} if reason is Reason.OURSELVES else set()

    def test_are_passed_over_when_a_glob_catches_them(
        self, changes: dict[str, object], reason: Reason
    ) -> None:
        rules = [Rule(match=Match(comm="*"))]
        assert select([process(**changes)], rules, ours=self.ours(reason)) == ([], [])

    def test_are_refused_by_name_when_a_pid_names_them(
        self, changes: dict[str, object], reason: Reason
    ) -> None:
        rules = [Rule("globs", Match(comm="*")), Rule("pids", Match(pid=(100,), exe="/nowhere"))]
        selected, (refusal,) = select([process(**changes)], rules, ours=self.ours(reason))
        assert selected == []
        assert (refusal.reason, refusal.subject, refusal.detail) == (reason, "100", "pids")


def test_a_named_pid_that_does_not_exist_is_refused_once_as_gone() -> None:
    rules = [Rule("a", Match(pid=(100, 4000))), Rule("b", Match(pid=(4000,)))]
    selected, refusals = select([process()], rules)
    assert [s.process.id.pid for s in selected] == [100]
    assert [(r.reason, r.subject, r.detail) for r in refusals] == [(Reason.GONE, "4000", "a")]


def test_a_process_younger_than_its_rule_allows_waits_without_a_refusal() -> None:
    rules = [Rule(match=Match(comm="*"), min_age_secs=10.0)]
    ages = {1: 9.9, 2: 10.0}
    selected, refusals = select(
        [process(1), process(2)], rules, age_of=lambda target: ages[target.pid]
    )
    assert [s.process.id.pid for s in selected] == [2]
    assert refusals == []


def test_a_young_process_does_not_fall_through_to_a_later_rule() -> None:
    rules = [Rule("slow", Match(comm="*"), min_age_secs=10.0), Rule("rest", Match(comm="*"))]
    assert select([process()], rules, age_of=lambda _target: 1.0) == ([], [])
