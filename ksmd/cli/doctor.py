"""``ksmctl doctor``: what keeps ksmd from working well here, and what to do about each.

Looks at the kernel, the settings, the daemon, and at who else merges pages. Changes nothing. The
exit code is 0 when nothing is to be done, 1 when there is a finding, and 3 or 4 when a privilege or
a kernel feature is missing without which nothing is merged.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

from ksmd.cli import features as features_verb
from ksmd.cli import render, words
from ksmd.cli.common import console, print_json
from ksmd.client import Client, DaemonUnavailableError
from ksmd.guard import door
from ksmd.kernel import ksm, memcg, procfs, rivals
from ksmd.kernel.rivals import Running
from ksmd.model.errors import Exit, KsmdError, PrivilegeError
from ksmd.model.features import Feature
from ksmd.model.refusal import SENTENCES, Reason
from ksmd.model.units import PAGE_SIZE

HELP = "what is wrong here, and what to do about it; needs no daemon"
DEFAULT_CONFIG = Path("/etc/ksmd/ksmd.yaml")
_SECONDS = 10.0

Level = Literal["good", "warning", "problem"]
_STYLES = {"good": "green", "warning": "yellow", "problem": "bold red"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. ``advice`` is "" where nothing is to be done."""

    level: Level
    what: str
    advice: str = ""
    code: int = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add where the settings are."""
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        default=DEFAULT_CONFIG,
        help=f"settings to look at (default {DEFAULT_CONFIG})",
    )


def run(args: argparse.Namespace) -> int:
    """Look, and show what was found."""
    # the probes fork, so they come first
    found = list(of_features(features_verb.probe()))
    found += of_settings(args.config)
    found += of_daemon(args.socket)
    stand = set(door.standing())
    found += of_rivals([replace(one, standing=one.pid in stand) for one in rivals.running()])
    if args.json:
        print_json({"findings": [asdict(one) for one in found], "exit_code": exit_code(found)})
    else:
        show(console(), found)
    return exit_code(found)


def exit_code(found: Iterable[Finding]) -> int:
    """Choose the exit code: the most telling of the findings'."""
    codes = {one.code or int(Exit.FAILED) for one in found if one.level != "good"}
    for code in (Exit.PRIVILEGE, Exit.KERNEL):
        if code in codes:
            return int(code)
    return int(Exit.FAILED) if codes else int(Exit.OK)


def show(out: Console, found: Sequence[Finding]) -> None:
    """List the findings, those to be acted on first."""
    order = ("problem", "warning", "good")
    made = render.table("", "what was found", "what to do")
    for one in sorted(found, key=lambda one: order.index(one.level)):
        mark = Text(one.level, style=_STYLES[one.level])
        made.add_row(mark, Text(words.safe(one.what, 400)), Text(words.safe(one.advice, 400)))
    out.print(made)
    out.print()
    open_ = sum(one.level != "good" for one in found)
    out.print(Text(f"{words.count(open_, 'finding')} to act on." if open_ else "All is well."))


def of_features(found: Iterable[Feature]) -> Iterator[Finding]:
    """Judge what the kernel, and our privileges, give."""
    missing = [feature for feature in found if not feature.present]
    for feature in missing:
        if feature.name == "kernel-ksm":
            continue
        detail = f" ({feature.detail})" if feature.detail else ""
        denied = "not permitted" in feature.detail or "denied" in feature.detail
        advice = "run this as root" if denied else "use a kernel that has it (`ksmctl features`)"
        yield Finding(
            "problem" if feature.needed else "warning",
            f"{feature.name} is missing: {feature.without}{detail}",
            advice,
            int(Exit.PRIVILEGE if denied else Exit.KERNEL) if feature.needed else 0,
        )
    if not any(feature.needed for feature in missing):
        yield Finding("good", "the kernel gives all that merging needs")


def of_settings(file: Path) -> Iterator[Finding]:
    """Judge the settings file, with what conf.d adds."""
    from ksmd.settings import SettingsError, read  # noqa: PLC0415  (pydantic: slow to load)

    try:
        loaded = read(file)
    except SettingsError as error:
        first = error.problems[0]
        more = f" (and {len(error.problems) - 1} more)" if len(error.problems) > 1 else ""
        yield Finding("problem", f"{first}{more}", f"`ksmctl check-config {file}` shows every one")
        return
    if not loaded.settings.targets:
        advice = "name the processes to merge under targets:, see ksmd.yaml(5)"
        yield Finding("warning", f"{file} selects no process, so nothing is merged", advice)
        return
    yield Finding("good", f"{file} is right ({words.count(len(loaded.files), 'file')})")


def of_daemon(socket: Path | str) -> Iterator[Finding]:
    """Judge the running daemon by what it says of itself."""
    try:
        with Client(socket, _SECONDS) as ksmd:
            status = ksmd.call("Status")
    except PrivilegeError as error:
        yield Finding("problem", str(error), error.hint, int(Exit.PRIVILEGE))
        return
    except DaemonUnavailableError as error:
        yield Finding("warning", str(error), error.hint)
        return
    except KsmdError as error:
        yield Finding("problem", str(error), error.hint or "look at `journalctl -u ksmd`")
        return
    yield from of_status(status, procfs.mem_available())
    yield from of_limits(
        memcg.lacking({one["pid"]: one["merging_pages"] * PAGE_SIZE for one in status["targets"]})
    )
    namespaces = {one["pid"]: procfs.namespace(one["pid"], "pid") for one in status["targets"]}
    yield from of_domains(status["targets"], namespaces)
    yield from of_kernel_ksm(
        ksm.read() or {},
        {one["pid"]: rivals.kernel_ksm_pages(one["pid"]) for one in status["targets"]},
    )


def of_status(status: Mapping[str, Any], available: int) -> Iterator[Finding]:
    """Judge the counters. *available*: bytes of memory that are available."""
    targets = status["targets"]
    saved = words.size(status["general_profit"])
    yield Finding("good", f"ksmd runs: {words.count(len(targets), 'target')}, profit {saved}")
    if status["paused"]:
        yield Finding("warning", "scanning is paused", "`ksmctl resume` goes on")
    if status["headroom_bytes"] > available:
        yield Finding(
            "warning",
            f"un-sharing all would take {words.size(status['headroom_bytes'])}, and only"
            f" {words.size(available)} are available",
            "free memory, or unmerge process by process (`ksmctl unmerge --pid N`)",
        )
    if status["run"] == "merge" and status["full_scans"] and status["general_profit"] < 0:
        yield Finding(
            "warning",
            f"ksmd costs more than it saves ({saved})",
            "`ksmctl estimate` shows where there is something to save; select only that",
        )
    refused: dict[str, int] = {}
    for one in targets:
        if one["refused"]:
            refused[one["refused"]] = refused.get(one["refused"], 0) + 1
    for reason, count in refused.items():
        known = reason in Reason.__members__.values()
        sentence = SENTENCES[Reason(reason)] if known else reason
        yield Finding(
            "warning",
            f"{words.count(count, 'target')} left alone: {sentence}",
            "`ksmctl why PID` says more",
        )


def of_limits(lacking: Iterable[tuple[memcg.Limit, int]]) -> Iterator[Finding]:
    """Judge memory cgroups that have no room for what is merged in them, and is not any more."""
    for limit, needed in lacking:
        yield Finding(
            "warning",
            f"what is merged in it would take {words.size(needed)} by itself: {limit}",
            "raise the limit, or free memory there: its programs may be held up or killed when they"
            " write to what is merged, and ksmd gives none of it back until it fits",
        )


def of_domains(
    targets: Iterable[Mapping[str, Any]], namespaces: Mapping[int, str]
) -> Iterator[Finding]:
    """Judge domains that nobody named. *namespaces*: the pid namespace of each target, by pid."""
    found: dict[str, set[str]] = {}
    for one in targets:
        if one["domain"].startswith("uid:") and namespaces.get(one["pid"]):
            found.setdefault(one["domain"], set()).add(namespaces[one["pid"]])
    for domain, inside in sorted(found.items()):
        if len(inside) > 1:
            yield Finding(
                "warning",
                f"processes of {len(inside)} pid namespaces (containers) are in the trust domain"
                f" {domain}, and may find out what memory the others have",
                "if they may not know of each other, give them domains of their own (domain: in"
                " their rules)",
            )


def of_kernel_ksm(values: Mapping[str, int | str], merged: Mapping[int, int]) -> Iterator[Finding]:
    """Judge kernel KSM: *values* of /sys/kernel/mm/ksm, pages it merged by pid of our targets."""
    both = {pid: pages for pid, pages in merged.items() if pages}
    if both:
        listed = ", ".join(map(str, sorted(both)[:8]))
        yield Finding(
            "warning",
            f"kernel KSM merges memory of targets too (pids {listed}), and then ksmd cannot",
            "let one of the two do it: echo 2 > /sys/kernel/mm/ksm/run gives it back, or take"
            " these processes out of the settings",
        )
    elif values.get("run") == 1:
        yield Finding("good", "kernel KSM runs, on no memory of our targets")


def of_rivals(found: Sequence[Running]) -> Iterator[Finding]:
    """Judge who else runs."""
    steering = [one for one in found if one.comm in rivals.STEERING]
    for one in steering:
        yield Finding(
            "warning",
            f"{one.comm} (pid {one.pid}) steers kernel KSM, and starts it under memory pressure",
            f"stop it where both would take the same processes: systemctl disable --now {one.comm}",
        )
    daemons = [one for one in found if one.comm == rivals.MAIN_COMM]
    if len(daemons) > 1:
        pids = ", ".join(str(one.pid) for one in daemons)
        yield Finding(
            "problem",
            f"{len(daemons)} daemons of ksmd run (pids {pids}); what they save is counted twice,"
            " and they stop each other's targets",
            "stop all but one",
        )
    known = {one.pid for one in daemons}
    pagers = [one for one in found if one.comm == rivals.PAGER_COMM and not one.standing]
    left = [one for one in pagers if one.parent not in known]
    for one in left:
        yield Finding(
            "warning",
            f"the pager {one.pid} of a daemon that has ended still guards merged memory",
            "leave it: it ends with the processes it guards; killing it would leave their memory"
            " unguarded",
        )
    if not (steering or left or len(daemons) > 1):
        yield Finding("good", "nobody else merges pages here")
