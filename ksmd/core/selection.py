"""Which processes the operator means: the first matching rule wins, and says all the rest.

The rules are those of ``targets:`` in the settings. They are described here by protocols of what
this module reads, so that it needs nothing of how settings are written or checked. A process that a
glob happens to catch and that cannot be a target (a kernel thread, a zombie, one of ours) is passed
over in silence, for globs are broad by nature; a process that a rule names by its pid gets an
answer in any case, as the operator meant that one and no other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal, Protocol

from ksmd.model.process import ProcessInfo, TargetId
from ksmd.model.refusal import Reason, Refusal

#: Every eligible VMA, the heap alone, or (first byte, npages) of each range.
Regions = Literal["anon", "heap"] | tuple[tuple[int, int], ...]


class SpanRule(Protocol):
    """One explicit range of ``regions``."""

    @property
    def start(self) -> int:
        """First byte, page-aligned."""

    @property
    def npages(self) -> int:
        """Length in pages."""


class MatchRule(Protocol):
    """The keys of ``match``; None where a key was not given."""

    @property
    def exe(self) -> str | None:
        """Glob on the path of the executable."""

    @property
    def comm(self) -> str | None:
        """Glob on the command name."""

    @property
    def cmdline(self) -> str | None:
        """Regular expression, searched for in the command line."""

    @property
    def user(self) -> str | None:
        """Glob on the user's name, or on its number."""

    @property
    def cgroup(self) -> str | None:
        """Glob on the cgroup's path."""

    @property
    def unit(self) -> str | None:
        """Glob on the systemd unit."""

    @property
    def pid(self) -> tuple[int, ...] | None:
        """The processes themselves."""


class TargetRule(Protocol):
    """One entry of ``targets``."""

    @property
    def name(self) -> str:
        """What status and metrics call it."""

    @property
    def match(self) -> MatchRule:
        """Every key must hold."""

    @property
    def regions(self) -> Literal["anon", "heap"] | Sequence[SpanRule]:
        """What of the process's memory may be scanned."""

    @property
    def domain(self) -> str | None:
        """Trust domain; None: one per user id."""

    @property
    def accept_seccomp_risk(self) -> bool:
        """Merge although a seccomp filter would kill the stub's calls."""

    @property
    def min_age_secs(self) -> float:
        """Leave a process alone until it is this old."""


@dataclass(frozen=True, slots=True)
class Selected:
    """A process that a rule chose, with all that the rule says of it.

    ``also``: (first byte, npages) of ranges that were registered besides, over the control socket.
    """

    process: ProcessInfo
    name: str
    domain: str
    regions: Regions
    accept_seccomp_risk: bool
    also: tuple[tuple[int, int], ...] = ()


def select(
    processes: Iterable[ProcessInfo],
    rules: Sequence[TargetRule],
    *,
    ours: Collection[int] = (),
    age_of: Callable[[TargetId], float] | None = None,
) -> tuple[list[Selected], list[Refusal]]:
    """Apply *rules* to *processes*, keeping the order of the processes.

    *ours* are the pids of the daemon's own processes. *age_of* gives a process's age in seconds; a
    process younger than its rule's ``min_age_secs`` is not selected yet (that is no refusal: it
    will be); without *age_of* every process is old enough. A refusal's subject is the pid, its
    detail the name of the rule, one per pid.
    """
    named = _named(rules)
    selected: list[Selected] = []
    refusals: list[Refusal] = []
    for process in processes:
        rule_name = named.pop(process.id.pid, None)
        if (reason := _never(process, ours)) is not None:
            if rule_name is not None:
                refusals.append(Refusal(reason, str(process.id.pid), rule_name))
            continue
        rule = next((r for r in rules if matches(process, r.match)), None)
        if rule is not None and (age_of is None or age_of(process.id) >= rule.min_age_secs):
            selected.append(_selected(process, rule))
    refusals += [Refusal(Reason.GONE, str(pid), name) for pid, name in named.items()]
    return selected, refusals


def united(rule: Selected | None, registered: Selected) -> Selected:
    """Put together what a rule says of a process and what was registered of it.

    All of both is covered. The rule decides everything else, the trust domain too: it is the
    operator's word, and a process is in one domain only.
    """
    return registered if rule is None else replace(rule, also=registered.also)


def matches(process: ProcessInfo, match: MatchRule) -> bool:
    """Say whether every key of *match* holds for *process*.

    A match without any key holds for no process: "everything" is never what is meant by silence.
    """
    globs = [
        (match.exe, (process.exe,)),
        (match.comm, (process.comm,)),
        (match.user, (process.user, str(process.uid))),
        (match.cgroup, (process.cgroup,)),
        (match.unit, (process.unit,)),
    ]
    held = [
        any(fnmatchcase(value, pattern) for value in values)
        for pattern, values in globs
        if pattern is not None
    ]
    if match.cmdline is not None:
        held.append(re.search(match.cmdline, process.cmdline) is not None)
    if match.pid is not None:
        held.append(process.id.pid in match.pid)
    return bool(held) and all(held)


def _named(rules: Sequence[TargetRule]) -> dict[int, str]:
    """Map each pid that a rule names to the first such rule's name."""
    named: dict[int, str] = {}
    for rule in rules:
        for pid in rule.match.pid or ():
            named.setdefault(pid, rule.name)
    return named


def _never(process: ProcessInfo, ours: Collection[int]) -> Reason | None:
    if process.id.pid in ours:
        return Reason.OURSELVES
    if process.kernel_thread:
        return Reason.KERNEL_THREAD
    if process.zombie:
        return Reason.ZOMBIE
    return None


def _selected(process: ProcessInfo, rule: TargetRule) -> Selected:
    regions: Regions
    if rule.regions == "anon" or rule.regions == "heap":  # noqa: PLR1714  (narrows the type)
        regions = rule.regions
    else:
        regions = tuple((span.start, span.npages) for span in rule.regions)
    return Selected(
        process=process,
        name=rule.name,
        domain=rule.domain if rule.domain is not None else f"uid:{process.uid}",
        regions=regions,
        accept_seccomp_risk=rule.accept_seccomp_risk,
    )
