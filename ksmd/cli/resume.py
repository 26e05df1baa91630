"""``ksmctl resume``: scan on after a pause."""

from __future__ import annotations

import argparse

from ksmd.cli.common import TIMEOUT, print_json
from ksmd.client import Client

HELP = "scan on after a pause"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Resume takes none of its own."""


def run(args: argparse.Namespace) -> int:
    """Ask the daemon."""
    with Client(args.socket, TIMEOUT) as ksmd:
        reply = ksmd.call("Resume")
    if args.json:
        print_json(reply)
    else:
        print("Scanning goes on.")
    return 0
