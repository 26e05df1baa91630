"""``ksmd``: the daemon's command. One module per verb; this one only finds it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from types import ModuleType

import ksmd
from ksmd.cli import demo, exporter, install, pager, run, uninstall
from ksmd.cli.common import guarded

VERBS: dict[str, ModuleType] = {
    "run": run,
    "demo": demo,
    "pager": pager,
    "exporter": exporter,
    "install": install,
    "uninstall": uninstall,
}

_EPILOG = """\
signals to a running daemon: HUP reads the settings again, USR1 scans now, USR2 logs the status,
TERM and INT stop it. Everything else is `ksmctl`.
"""


def parser() -> argparse.ArgumentParser:
    """Make the parser of the whole command line."""
    made = argparse.ArgumentParser(
        prog="ksmd",
        description="Merge identical anonymous pages of running processes, copy-on-write.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--version", action="version", version=f"ksmd {ksmd.__version__}")
    verbs = made.add_subparsers(metavar="VERB", required=True, dest="verb")
    for name, module in VERBS.items():
        verb = verbs.add_parser(
            name, help=module.HELP, description=(module.__doc__ or "").strip(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        module.add_arguments(verb)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says; the exit code."""
    args = parser().parse_args(argv)
    return guarded("ksmd", lambda: int(VERBS[args.verb].run(args)))


if __name__ == "__main__":
    sys.exit(main())
