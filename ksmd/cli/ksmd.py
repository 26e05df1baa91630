"""``ksmd``: the daemon's command. One module per verb."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import ksmd
from ksmd.cli import verbs
from ksmd.cli.common import guarded

VERBS = ("run", "demo", "pager", "exporter", "install", "uninstall")

_EPILOG = """\
signals to a running daemon: HUP reads the settings again, USR1 scans now, USR2 logs the status,
TERM and INT stop it. Everything else is `ksmctl`.
"""


def parser(only: Sequence[str] = VERBS) -> argparse.ArgumentParser:
    """Make the parser of the whole command line, or of these verbs alone."""
    made = argparse.ArgumentParser(
        prog="ksmd",
        description="Merge identical anonymous pages of running processes, copy-on-write.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--version", action="version", version=f"ksmd {ksmd.__version__}")
    verbs.add_to(made, only)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says; the exit code."""
    # numpy's BLAS, of which nothing is used, starts a thread for each processor
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    given = sys.argv[1:] if argv is None else argv
    args = parser(verbs.chosen(given, VERBS)).parse_args(given)
    return guarded("ksmd", lambda: int(verbs.module(args.verb).run(args)))


if __name__ == "__main__":
    sys.exit(main())
