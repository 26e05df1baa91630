"""``ksmctl``: the operator's command. One module per verb."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import ksmd
from ksmd.cli import verbs
from ksmd.cli.common import fill_in, global_options, guarded

VERBS = (
    "status",
    "targets",
    "why",
    "scan",
    "pause",
    "resume",
    "unmerge",
    "estimate",
    "plan",
    "features",
    "check-config",
    "sysfs",
    "doctor",
)

_EPILOG = """\
exit codes: 0 well, 1 failed, 2 usage or wrong settings, 3 lacking privilege, 4 lacking a kernel
feature. estimate, features, check-config and doctor need no daemon.
"""


def parser(only: Sequence[str] = VERBS) -> argparse.ArgumentParser:
    """Make the parser of the whole command line, or of these verbs alone."""
    options = global_options()
    made = argparse.ArgumentParser(
        prog="ksmctl",
        description="Control ksmd, the page-merging daemon in user space.",
        epilog=_EPILOG,
        parents=[options],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--version", action="version", version=f"ksmctl {ksmd.__version__}")
    verbs.add_to(made, only, [options])
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says; the exit code."""
    given = sys.argv[1:] if argv is None else argv
    only = verbs.chosen(given, VERBS, [global_options()])
    args = fill_in(parser(only).parse_args(given))
    return guarded("ksmctl", lambda: int(verbs.module(args.verb).run(args)))


if __name__ == "__main__":
    sys.exit(main())
