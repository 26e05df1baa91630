"""``ksmctl pause``: stop scanning; what is merged stays merged."""

from __future__ import annotations

import argparse

from ksmd.cli.common import TIMEOUT, print_json
from ksmd.client import Client

HELP = "stop scanning; what is merged stays merged"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Pause takes none of its own."""


def run(args: argparse.Namespace) -> int:
    """Ask the daemon."""
    with Client(args.socket, TIMEOUT) as ksmd:
        reply = ksmd.call("Pause")
    if args.json:
        print_json(reply)
    else:
        print("Paused: nothing is scanned, what is merged stays merged. `ksmctl resume` goes on.")
    return 0
