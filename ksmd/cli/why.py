"""``ksmctl why PID [ADDR]``: what of a process is merged, and why the rest is not."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ksmd.cli import render
from ksmd.cli.common import console, print_json, process_id, whole_number
from ksmd.cli.status import TIMEOUT
from ksmd.client import Client

HELP = "why memory of a process is merged or not"

#: More ranges than this are not listed for people.
_LISTED = 60

_STATES = {
    "merged": "merged: it shares a page of the store until somebody writes to it",
    "zero": "given back as a zero page",
    "candidate": "a candidate: it is scanned, and no other page has had the same content yet",
    "volatile": "volatile: it changed since the last full scan, so merging it would not last",
    "unread": "not read yet, or not in memory",
    "refused": "left alone, for the reason of its range",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the process and the address."""
    parser.add_argument("pid", type=process_id, metavar="PID", help="the process")
    parser.add_argument(
        "address",
        type=whole_number,
        metavar="ADDR",
        nargs="?",
        help="an address in the process (0x7f...): only the range and the page that hold it",
    )


def run(args: argparse.Namespace) -> int:
    """Ask the daemon and show its answer."""
    with Client(args.socket, TIMEOUT) as ksmd:
        reply = ask(ksmd, args.pid, args.address)
    if args.json:
        print_json(reply)
    else:
        show(console(), reply, args.address)
    return 0


def ask(ksmd: Client, pid: int, address: int | None) -> dict[str, Any]:
    """Put the replies for a process of many ranges together."""
    reply = ksmd.call("Why", pid=pid, address=address)
    start = reply.pop("next", None)
    while start is not None:
        more = ksmd.call("Why", pid=pid, start=start)
        reply["areas"] += more["areas"]
        start = more.get("next")
    return reply


def show(out: Console, reply: Mapping[str, Any], address: int | None) -> None:
    """Show the answer: the process first, then the page, then range by range."""
    who = f"{reply['pid']} {render.safe(reply['name'], 40)}".rstrip()
    if reply["target"]:
        head = f"Process {who} is a target in domain {render.safe(reply['domain'], 40)}"
    else:
        head = f"Process {who} is no target"
    out.print(Text(head, style="bold"))
    if reply["reason"]:
        out.print(Text(f"Left alone as a whole: {reply['sentence']}"))
        if reply["detail"]:
            out.print(Text(render.safe(reply["detail"])))
    elif not reply["target"]:
        out.print("No rule under `targets:` in the settings matches it.")
    state = reply.get("state")
    if state and address is not None:
        out.print(Text(f"The page at {address:#x} is {_STATES.get(state, render.safe(state))}."))
    open_ = [area for area in reply["areas"] if not area["reason"] or address is not None]
    refused = [area for area in reply["areas"] if area["reason"]]
    for part in (_ranges(open_), _refused(refused)):
        if part is not None:
            out.print()
            out.print(part)


def _ranges(areas: Sequence[Mapping[str, Any]]) -> Table | None:
    """List ranges one by one: what is merged, given back or scanned, or what was asked about."""
    made = render.table("=range", ">size", ">merged", ">zero", "mapping", "")
    for area in areas[:_LISTED]:
        made.add_row(
            f"{area['start']:x}-{area['end']:x}",
            render.size(area["end"] - area["start"]),
            render.pages_size(area["merging"]) if area["merging"] else "",
            render.pages_size(area["zero"]) if area["zero"] else "",
            Text(render.safe(f"{area['perms']} {area['path']}", 60)),
            Text(render.safe(": ".join(filter(None, (area["reason"], area["detail"]))))),
        )
    if len(areas) > _LISTED:
        made.caption = Text(f"and {len(areas) - _LISTED:,} more ranges (all are in --json)")
        made.caption_justify = "left"
    return made if areas else None


def _refused(areas: Sequence[Mapping[str, Any]]) -> Table | None:
    """Sum up the ranges that are left alone, by reason, the largest first."""
    sums: dict[str, list[int]] = {}
    sentences = {area["reason"]: area["sentence"] for area in areas}
    for area in areas:
        one = sums.setdefault(area["reason"], [0, 0])
        one[0] += 1
        one[1] += area["end"] - area["start"]
    made = render.table(">ranges", ">size", "=reason", "what it means", title="Left alone")
    for reason, (number, nbytes) in sorted(sums.items(), key=lambda item: -item[1][1]):
        made.add_row(
            render.count(number),
            render.size(nbytes),
            Text(render.safe(reason, 40)),
            Text(render.safe(sentences[reason])),
        )
    return made if sums else None
