"""``ksmctl estimate``: what merging would save, before anything is merged.

It reads and changes nothing, and needs no daemon.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from ksmd.cli import render, words
from ksmd.cli.common import console, print_json, process_id
from ksmd.model.units import PAGE_SIZE

HELP = "what merging would save, without changing anything; needs no daemon"

#: More processes than this are not listed one by one for people (--json has them all).
_LISTED = 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the three ways to say which processes are meant."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--pid", type=process_id, nargs="+", action="extend", metavar="N", help="these processes"
    )
    what.add_argument(
        "--config", type=Path, metavar="FILE", help="the processes that a settings file selects"
    )
    what.add_argument("--all", action="store_true", help="every process that may be read")


def run(args: argparse.Namespace) -> int:
    """Read, and show what would be saved."""
    # numpy, the planner and the settings' models: more than all other verbs together need
    from ksmd.daemon import estimate  # noqa: PLC0415
    from ksmd.settings import load  # noqa: PLC0415

    what = load(args.config).plain() if args.config else None if args.all else args.pid
    err = console(sys.stderr)
    if err.is_terminal:
        with err.status("reading …") as line:
            found = estimate.run(what, lambda text: line.update(Text(f"reading … {text}")))
    else:
        found = estimate.run(what)
    if args.json:
        print_json(found)
    else:
        show(console(), found)
    return 0


def headline(found: Mapping[str, Any]) -> str:
    """Say in one sentence what would come of merging."""
    total = found["total"]
    if total["saved_bytes"] <= 0:
        return "Merging would save nothing."
    share = total["saved_bytes"] / (total["resident_pages"] * PAGE_SIZE)
    costs = f" ({words.size(total['vma_bytes'])} of VMAs subtracted)" if total["vma_bytes"] else ""
    return (
        f"Merging would save {words.size(total['saved_bytes'])}{costs} of"
        f" {words.pages_size(total['resident_pages'])} of memory: {share:.1%}"
    )


def show(out: Console, found: Mapping[str, Any]) -> None:
    """Show the figures, by domain, then by process, then what is left out and why."""
    good = found["total"]["saved_bytes"] > 0
    out.print(Text(headline(found), style="bold green" if good else "bold"))
    if not found["processes"]:
        out.print("No process was selected.")
    for part in (
        _domains(found["domains"]) if found["domains"] else None,
        _processes(found["processes"]) if found["processes"] else None,
        render.refusals_table(found["refusals"], "Left out"),
    ):
        if part is not None:
            out.print()
            out.print(part)
    out.print()
    out.print(
        Text(
            f"One look, {found['seconds']:.1f} s, nothing was changed. Pages that change often are"
            " counted as if they stayed; ksmd itself waits until a page has been still for a scan."
        )
    )


def _domains(domains: list[Mapping[str, Any]]) -> Any:
    made = render.table(
        "domain", ">procs", ">memory", ">zero", ">dup within", ">dup across", ">saved", ">in runs",
        title="By trust domain (pages merge only inside one)",
    )  # fmt: skip
    for one in sorted(domains, key=lambda one: (-one["saved_bytes"], one["domain"])):
        made.add_row(
            Text(words.safe(one["domain"], 40)),
            words.count(one["processes"]),
            words.pages_size(one["resident_pages"]),
            words.pages_size(one["zero_pages"]),
            words.pages_size(one["duplicates_within"]),
            words.pages_size(one["duplicates_across"]),
            words.size(one["saved_bytes"]),
            f"{one['share_of_runs_16']:.0%}",
        )
    made.caption = Text("in runs: share of the pages to be mapped in runs of 16 or more (cheap)")
    made.caption_justify = "left"
    return made


def _processes(processes: list[Mapping[str, Any]]) -> Any:
    made = render.table(">PID", "name", "domain", ">memory", ">shared by fork", "left out because")
    listed = sorted(processes, key=lambda one: (-one["pages"], one["pid"]))
    for one in listed[:_LISTED]:
        detail = f" ({one['detail']})" if one["detail"] else ""
        made.add_row(
            str(one["pid"]),
            Text(words.safe(one["name"], 40)),
            Text(words.safe(one["domain"], 40)),
            words.pages_size(one["pages"]),
            words.pages_size(one["fork_shared"]),
            Text(words.safe(one["sentence"] + detail)),
        )
    if len(listed) > _LISTED:
        made.caption = Text(f"and {len(listed) - _LISTED} smaller ones (all are in --json)")
        made.caption_justify = "left"
    return made
