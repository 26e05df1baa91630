"""``ksmctl features``: what this kernel gives, what is missing and what that costs.

The probes are run here, not asked of the daemon: the verb is for before ksmd runs, and for when it
refuses to.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.text import Text

from ksmd.cli import render, words
from ksmd.cli.common import console, print_json
from ksmd.model.errors import Exit
from ksmd.model.features import Feature

HELP = "what this kernel gives, what is missing and what that costs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Features takes none of its own."""


def run(args: argparse.Namespace) -> int:
    """Probe and show; exit code 4 when something is missing without which nothing is merged."""
    found = probe()
    missing = [feature for feature in found if feature.needed and not feature.present]
    if args.json:
        features = [asdict(feature) for feature in found]
        print_json({"can_merge": not missing, "features": features})
    else:
        show(console(), found)
    return int(Exit.KERNEL) if missing else 0


def probe() -> list[Feature]:
    """Probe the kernel, then prove the guard's policy on it."""
    # the probes fork: they come before anything that might start a thread
    from ksmd.guard import selftest  # noqa: PLC0415
    from ksmd.kernel import features  # noqa: PLC0415

    return [*features.probe(), selftest.run()]


def show(out: Console, found: Sequence[Feature]) -> None:
    """List the features, and say what it comes to."""
    made = render.table("feature", "", "detail, or what its absence costs")
    for feature in found:
        if feature.present:
            mark, told = Text("yes", style="green"), feature.detail
        else:
            mark = Text("no", style="bold red" if feature.needed else "yellow")
            told = f"{feature.without} ({feature.detail})" if feature.detail else feature.without
        made.add_row(feature.name, mark, Text(words.safe(told, 300)))
    out.print(made)
    out.print()
    missing = [feature.name for feature in found if feature.needed and not feature.present]
    if missing:
        names = ", ".join(missing)
        out.print(Text(f"ksmd cannot merge here. Missing: {names}.", style="bold red"))
    else:
        out.print(Text("ksmd can merge here.", style="bold green"))
