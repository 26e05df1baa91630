"""``ksmctl targets``: the processes that ksmd works on, and what each gains and pays."""

from __future__ import annotations

import argparse

from ksmd.cli.common import TIMEOUT, console, print_json
from ksmd.client import Client

HELP = "the processes that ksmd works on: savings, VMAs used, stops"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Targets takes none of its own."""


def run(args: argparse.Namespace) -> int:
    """Ask the daemon and list its targets."""
    with Client(args.socket, TIMEOUT) as ksmd:
        reply = ksmd.call("Targets")
    if args.json:
        print_json(reply)
        return 0
    from ksmd.cli import render  # noqa: PLC0415  (rich)

    out = console()
    if not reply["targets"]:
        out.print("No process is selected: see `targets:` in the settings.")
        return 0
    out.print(render.targets_table(reply["targets"]))
    refused = render.refused_targets_table(reply["targets"])
    if refused is not None:
        out.print()
        out.print(refused)
    return 0
