"""``ksmd pager``: the pager as a service of its own, which outlives every ksmd run.

It guards merged memory for the daemon of the same control socket, and waits for the next one when
that has ended. ksmd run uses it when it is there, and else starts a pager for itself. SIGTERM ends
it once nothing is merged; --give-back is what a service manager runs before that.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path

from ksmd.daemon.protocol import DEFAULT_SOCKET
from ksmd.guard import door
from ksmd.kernel import capabilities, priority

HELP = "guard merged memory beyond the life of ksmd run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of pager."""
    parser.add_argument(
        "--socket",
        type=Path,
        metavar="PATH",
        default=Path(DEFAULT_SOCKET),
        help=f"the control socket of the ksmd to be served (default {DEFAULT_SOCKET})",
    )
    parser.add_argument(
        "--give-back",
        action="store_true",
        help="instead, give back all that the pager guards; exit code 1: something is left",
    )


def run(args: argparse.Namespace) -> int:
    """Become the pager, or empty it."""
    name = str(args.socket.absolute())
    if args.give_back:
        # all that merging needs, which the pager must not load
        from ksmd.daemon import giveback  # noqa: PLC0415

        return giveback.run(name)
    with contextlib.suppress(OSError):  # the pager tells who is to know
        priority.go_before_others()
    # for locking, and for taking pins from a daemon; see also door.py
    capabilities.pass_on(("CAP_IPC_LOCK", "CAP_SYS_PTRACE"))
    command = door.command(door.STANDING, name)
    sys.stdout.flush()
    return os.execv(command[0], command)
