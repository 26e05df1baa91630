"""``ksmd``: the daemon's command. One module per verb; this one only finds it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

import ksmd
from ksmd.cli.common import guarded

VERBS = ("run", "demo", "pager", "exporter", "install", "uninstall")

_EPILOG = """\
signals to a running daemon: HUP reads the settings again, USR1 scans now, USR2 logs the status,
TERM and INT stop it. Everything else is `ksmctl`.
"""


def _module(verb: str) -> ModuleType:
    return import_module(f"ksmd.cli.{verb}")


def parser(only: str | None = None) -> argparse.ArgumentParser:
    """Make the parser of the whole command line, or of what one verb needs of it.

    A daemon lives long: it shall not carry the other verbs' libraries with it.
    """
    made = argparse.ArgumentParser(
        prog="ksmd",
        description="Merge identical anonymous pages of running processes, copy-on-write.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--version", action="version", version=f"ksmd {ksmd.__version__}")
    verbs = made.add_subparsers(metavar="VERB", required=True, dest="verb")
    for name in VERBS if only is None else (only,):
        module = _module(name)
        verb = verbs.add_parser(
            name, help=module.HELP, description=(module.__doc__ or "").strip(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        module.add_arguments(verb)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says; the exit code."""
    # numpy's BLAS, of which nothing is used, starts a thread for each processor
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    given = sys.argv[1:] if argv is None else argv
    only = given[0] if given and given[0] in VERBS else None
    args = parser(only).parse_args(given)
    return guarded("ksmd", lambda: int(_module(args.verb).run(args)))


if __name__ == "__main__":
    sys.exit(main())
