"""``ksmctl check-config FILE``: every mistake in a settings file, or what the file means."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from ksmd.cli.common import print_json
from ksmd.model.errors import Exit
from ksmd.settings import SettingsError, effective, load

HELP = "say what is wrong with a settings file, and where"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the file."""
    parser.add_argument("file", type=Path, metavar="FILE")


def run(args: argparse.Namespace) -> int:
    """Judge the file. No daemon is asked."""
    try:
        settings = load(args.file)
    except SettingsError as error:
        if args.json:
            print_json(
                {"valid": False, "problems": [asdict(problem) for problem in error.problems]}
            )
        else:
            for problem in error.problems:
                print(problem, file=sys.stderr)
        return int(Exit.USAGE)
    if args.json:
        print_json({"valid": True, "problems": [], "settings": effective(settings)})
        return 0
    targets = [target.name for target in settings.targets]
    chosen = f"targets: {', '.join(targets)}" if targets else "no targets: nothing would be merged"
    print(f"{args.file} is right; {chosen}.")
    return 0
