"""``ksmctl unmerge``: give merged pages back as memory of their own."""

from __future__ import annotations

import argparse
from typing import Any

from ksmd.cli import words
from ksmd.cli.common import TIMEOUT, complain, print_json, process_id
from ksmd.client import Client

HELP = "give merged pages back to their processes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of unmerge."""
    parser.add_argument("--wait", action="store_true", help="wait until it is done")
    parser.add_argument("--pid", type=process_id, metavar="N", help="only this process")


def run(args: argparse.Namespace) -> int:
    """Ask the daemon; exit code 1 where something stays merged."""
    with Client(args.socket, None if args.wait else TIMEOUT) as ksmd:
        reply = ksmd.call("Unmerge", pid=args.pid, wait=args.wait or None)
    refused = reply.get("refused") or []
    if args.json:
        print_json(reply)
    else:
        show(reply, wait=args.wait, pid=args.pid)
    for refusal in refused:
        what = f"{refusal['subject']}: " if refusal["subject"] else ""
        detail = f" ({refusal['detail']})" if refusal["detail"] else ""
        complain("ksmctl", words.safe(f"{what}{refusal['sentence']}{detail}", 400))
    return 1 if refused else 0


def show(reply: dict[str, Any], *, wait: bool, pid: int | None) -> None:
    """Say what was done, and what scanning will do about it."""
    what = f"{words.count(reply['pages'], 'page')} ({words.pages_size(reply['pages'])})"
    whose = f" to process {pid}" if pid is not None else ""
    if wait:
        print(f"{what} given back{whose}.")
    else:
        print(f"{what} will be given back{whose}. `ksmctl status` shows how it goes.")
    if pid is None:
        print("Scanning is paused, so that nothing is merged again. `ksmctl resume` goes on.")
    else:
        print("It is left alone from now on. `ksmctl resume` lets it merge again.")
