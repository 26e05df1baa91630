"""``ksmctl status``: what is saved, in which state the daemon is, and what keeps it from more."""

from __future__ import annotations

import argparse

from ksmd.cli.common import TIMEOUT, console, print_json
from ksmd.client import Client

HELP = "what is saved, the state of the daemon, and what is left alone"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Status takes none of its own."""


def run(args: argparse.Namespace) -> int:
    """Ask the daemon and show its counters."""
    with Client(args.socket, TIMEOUT) as ksmd:
        status = ksmd.call("Status")
    if args.json:
        print_json(status)
        return 0
    from ksmd.cli.screens import status as screen  # noqa: PLC0415

    screen.show(console(), status, screen.available_memory())
    return 0
