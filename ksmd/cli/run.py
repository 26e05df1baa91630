"""``ksmd run``: the daemon in the foreground.

It logs to stderr, or with fields to the journal where a service manager connected stderr to that.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from ksmd.daemon import journal
from ksmd.daemon.notify import Manager, collect_signals
from ksmd.kernel import cpu
from ksmd.settings.apart import Reading

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
    # a daemon that is told to stop while it starts must not leave merged what it is to adopt
    early = collect_signals()
    journal.configure(verbose=args.verbose, stream=sys.stderr, environ=os.environ)
    manager = Manager.take(os.environ)
    settings = Reading(args.config)  # beside all that is loaded now
    cpu.suit_numpy(os.environ)  # before numpy comes
    # `ksmd --version` and `ksmd demo` need none of it
    from ksmd.daemon import main  # noqa: PLC0415

    return main.run(args.config, args.socket, manager, early, settings)
