"""``ksmd run``: the daemon in the foreground, logging to stderr."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

HELP = "run the daemon in the foreground, logs on stderr"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of run."""
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="settings; without it nothing is selected"
    )
    parser.add_argument(
        "--socket", type=Path, metavar="PATH", help="where to listen, instead of what FILE says"
    )
    parser.add_argument("--verbose", action="store_true", help="log every decision")


def run(args: argparse.Namespace) -> int:
    """Start logging, then the daemon; returns when it has stopped."""
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.DEBUG if args.verbose else logging.INFO,
        format="%(levelname)s %(name)s: %(message)s",
    )
    # `ksmd --version` and `ksmd demo` need none of it
    from ksmd.daemon import main  # noqa: PLC0415

    return main.run(args.config, args.socket)
