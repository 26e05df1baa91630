"""``ksmctl``: the operator's command. One module per verb; this one only finds it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from types import ModuleType

import ksmd
from ksmd.cli import (
    check_config,
    doctor,
    estimate,
    features,
    pause,
    plan,
    resume,
    scan,
    status,
    sysfs,
    targets,
    unmerge,
    why,
)
from ksmd.cli.common import fill_in, global_options, guarded

VERBS: dict[str, ModuleType] = {
    "status": status,
    "targets": targets,
    "why": why,
    "scan": scan,
    "pause": pause,
    "resume": resume,
    "unmerge": unmerge,
    "estimate": estimate,
    "plan": plan,
    "features": features,
    "check-config": check_config,
    "sysfs": sysfs,
    "doctor": doctor,
}

_EPILOG = """\
exit codes: 0 well, 1 failed, 2 usage or wrong settings, 3 lacking privilege, 4 lacking a kernel
feature. estimate, features, check-config and doctor need no daemon.
"""


def parser() -> argparse.ArgumentParser:
    """Make the parser of the whole command line."""
    options = global_options()
    made = argparse.ArgumentParser(
        prog="ksmctl",
        description="Control ksmd, the page-merging daemon in user space.",
        epilog=_EPILOG,
        parents=[options],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--version", action="version", version=f"ksmctl {ksmd.__version__}")
    verbs = made.add_subparsers(metavar="VERB", required=True, dest="verb")
    for name, module in VERBS.items():
        verb = verbs.add_parser(
            name, help=module.HELP, description=(module.__doc__ or "").strip(), parents=[options],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        module.add_arguments(verb)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says; the exit code."""
    args = fill_in(parser().parse_args(argv))
    return guarded("ksmctl", lambda: int(VERBS[args.verb].run(args)))


if __name__ == "__main__":
    sys.exit(main())
