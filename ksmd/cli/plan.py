"""``ksmctl plan``: what the next pass would merge, from what was read so far; changes nothing."""

from __future__ import annotations

import argparse

from ksmd.cli import words
from ksmd.cli.common import TIMEOUT, console, print_json
from ksmd.client import Client

HELP = "what the next pass would merge, without doing it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Plan takes none of its own."""


def run(args: argparse.Namespace) -> int:
    """Ask the daemon and describe its plan."""
    with Client(args.socket, TIMEOUT) as ksmd:
        plan = ksmd.call("Plan")
    if args.json:
        print_json(plan)
        return 0
    out = console()
    out.print(
        f"Would save {words.pages_size(plan['saved_pages'])} for {plan['cost_bytes']} bytes of"
        f" VMAs: {words.count(plan['runs'], 'run')} into"
        f" {words.count(plan['extents'], 'new extent')},"
        f" {words.count(plan['zero_runs'], 'run')} of zero pages."
    )
    for target in plan["targets"]:
        out.print(
            f"  {target['pid']} {words.safe(target['name'], 40)}:"
            f" {words.count(target['pages'], 'page')} in {words.count(target['runs'], 'run')},"
            f" {words.count(target['zero_pages'], 'zero page')}"
        )
    if not plan["targets"]:
        out.print("Nothing is planned: pages are candidates when two scans saw them unchanged.")
    return 0
