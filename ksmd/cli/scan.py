"""``ksmctl scan``: a full scan and merge now."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ksmd.cli import words
from ksmd.cli.common import TIMEOUT, complain, console, print_json
from ksmd.client import Client

HELP = "scan everything and merge, now"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of scan."""
    parser.add_argument("--wait", action="store_true", help="wait until it is done, and tell")
    parser.add_argument(
        "--until-settled",
        action="store_true",
        help="scan again and again until a pass merges nothing more",
    )


def run(args: argparse.Namespace) -> int:
    """Ask for the scan; with --wait show how it goes and what came of it."""
    with Client(args.socket, None if args.wait else TIMEOUT) as ksmd:
        reply = scan(ksmd, wait=args.wait, until_settled=args.until_settled)
    if args.json:
        print_json(reply)
    elif not args.wait:
        print("A scan was asked for. `ksmctl status` shows how it goes.")
    else:
        settled = (
            "settled: the last pass merged nothing more" if reply["settled"] else "not settled"
        )
        print(f"{described(reply)}; {settled}.")
    if args.wait and args.until_settled and not reply["settled"]:
        complain(
            "ksmctl",
            "the scan ended before it settled",
            "memory may be changing faster than it is scanned: see `ksmctl status`",
        )
        return 1
    return 0


def scan(ksmd: Client, *, wait: bool, until_settled: bool) -> dict[str, Any]:
    """Have *ksmd* scan; while waiting at a terminal, one line on stderr tells of each pass."""
    if not wait:
        return ksmd.call("Scan", until_settled=until_settled or None)
    reply: dict[str, Any] = {}
    if not sys.stderr.isatty():
        for reply in ksmd.stream("Scan", wait=True, until_settled=until_settled):  # noqa: B007
            pass  # the last reply is the result
        return reply
    with console(sys.stderr).status("scanning …") as line:
        for reply in ksmd.stream("Scan", wait=True, until_settled=until_settled):
            line.update(f"scanning … {described(reply)} so far")
    return reply


def described(reply: dict[str, Any]) -> str:
    """Say what a scan did until now."""
    return (
        f"{words.count(reply['scanned'], 'page')} scanned,"
        f" {words.count(reply['merged'])} merged ({words.pages_size(reply['merged'])})"
        f" in {words.count(reply['passes'])} {'pass' if reply['passes'] == 1 else 'passes'}"
    )
