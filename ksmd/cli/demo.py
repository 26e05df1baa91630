"""``ksmd demo``: its own workers, merged, shown, verified, written to and un-merged.

Everything it claims is checked: memory by the frames that the kernel's page map shows (not by our
own counters), content by digests that each worker makes of its memory and that are compared with
what the seeds give. It touches no process but its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

HELP = "merge processes of its own: before, after, verified, undone"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of demo."""
    parser.add_argument("--workers", type=_between(2, 64), default=4, metavar="N", help="default 4")
    parser.add_argument(
        "--mib",
        type=_between(1, 65536),
        default=64,
        metavar="N",
        help="MiB of the same data in every worker, default 64",
    )
    parser.add_argument(
        "--keep",
        action="store_true",
        help="wait for Enter while everything is merged, to look around with ksmctl",
    )


def run(args: argparse.Namespace) -> int:
    """Show it all; KsmdError when anything is not as promised."""
    # targets wait while `ksmd pager` and `ksmd run` start, which need none of it
    from ksmd.cli import demo_acts  # noqa: PLC0415

    demo_acts.play(args.workers, args.mib, keep=args.keep)
    return 0


def _between(least: int, most: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {least} to {most}")
        return int(text)

    return number
