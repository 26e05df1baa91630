"""``ksmctl why PID [ADDR]``: what of a process is merged, and why the rest is not."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from ksmd.cli import render
from ksmd.cli.common import console, print_json, process_id, whole_number
from ksmd.cli.status import TIMEOUT
from ksmd.client import Client

HELP = "why memory of a process is merged or not"

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
    parser.add_argument("pid", type=process_id, metavar="PID")
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
        reply = ksmd.call("Why", pid=args.pid, address=args.address)
    if args.json:
        print_json(reply)
    else:
        show(console(), reply, args.address)
    return 0


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
    if reply["areas"]:
        out.print()
        out.print(_areas(reply["areas"]))
        meanings = {area["reason"]: area["sentence"] for area in reply["areas"] if area["reason"]}
        if meanings:
            out.print()
            out.print(render.facts((render.safe(name), text) for name, text in meanings.items()))


def _areas(areas: list[Mapping[str, Any]]) -> Any:
    made = render.table("=range", ">size", ">merged", ">zero", "mapping", "not merged because")
    for area in areas:
        detail = f": {area['detail']}" if area["detail"] else ""
        made.add_row(
            f"{area['start']:x}-{area['end']:x}",
            render.size(area["end"] - area["start"]),
            render.pages_size(area["merging"]) if area["merging"] else "",
            render.pages_size(area["zero"]) if area["zero"] else "",
            Text(render.safe(f"{area['perms']} {area['path']}", 60)),
            Text(render.safe(area["reason"] + detail)),
        )
    return made
