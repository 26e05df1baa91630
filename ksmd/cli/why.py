"""``ksmctl why PID [ADDR]``: what of a process is merged, and why the rest is not."""

from __future__ import annotations

import argparse
from typing import Any

from ksmd.cli.common import TIMEOUT, console, print_json, process_id, whole_number
from ksmd.client import Client

HELP = "why memory of a process is merged or not"


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
        return 0
    from ksmd.cli.screens import why as screen  # noqa: PLC0415

    screen.show(console(), reply, args.address)
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
