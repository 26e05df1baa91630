"""How ``ksmd`` and ``ksmctl`` come to their verbs: one module each, of which only one is loaded.

All verbs together need most of ksmd and of its libraries; a call of one, and a daemon that lives
for months, shall carry only its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from importlib import import_module
from types import ModuleType


def module(verb: str) -> ModuleType:
    """Load the module of a verb: HELP, ``add_arguments(parser)`` and ``run(args)``."""
    return import_module(f"ksmd.cli.{verb.replace('-', '_')}")


def add_to(
    parser: argparse.ArgumentParser,
    verbs: Iterable[str],
    options: Sequence[argparse.ArgumentParser] = (),
) -> None:
    """Let *parser* take these verbs, each with its own arguments and *options*."""
    made = parser.add_subparsers(metavar="VERB", required=True, dest="verb")
    for name in verbs:
        found = module(name)
        verb = made.add_parser(
            name, help=found.HELP, description=(found.__doc__ or "").strip(), parents=options,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        found.add_arguments(verb)


def chosen(
    argv: Sequence[str], verbs: Sequence[str], options: Sequence[argparse.ArgumentParser] = ()
) -> Sequence[str]:
    """Give the verbs that the command line may mean: the one it names behind *options*, or all."""
    before = argparse.ArgumentParser(add_help=False, exit_on_error=False, parents=options)
    try:
        _, rest = before.parse_known_args(argv)
    except argparse.ArgumentError:
        return verbs  # the whole parser tells it better
    return (rest[0],) if rest and rest[0] in verbs else verbs
