"""``ksmd uninstall``: remove what ``ksmd install`` placed.

Settings that were changed since stay, and so does conf.d while there is a file in it. Stop the
services first: systemctl disable --now ksmd.service ksmd.socket; systemctl stop ksmd-pager.service.
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

from ksmd.cli import install, manual
from ksmd.cli.install import CONFIG, DROP_INS, PROGRAM_IN_UNITS, Item
from ksmd.model.errors import Exit

HELP = "remove what install placed; settings of yours stay"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of uninstall."""
    install.add_places(parser)


def run(args: argparse.Namespace) -> int:
    """Say what would be removed, or remove it."""
    prefix = install.checked_prefix(args.prefix)
    known = [*install.items(prefix, Path(PROGRAM_IN_UNITS))]
    known += [Item(install.place_of_page(prefix, page), b"") for page in manual.PAGES]
    count = 0
    for item in known:
        path = args.root / item.path
        if not path.exists():
            continue
        if item.kept and install.state_of(args.root, item) == "keep":
            print(f"keep     {path}")
            continue
        print(f"remove   {path}")
        count += 1
        if args.apply:
            _unlink(path)
    if args.apply:
        _remove_directories(args.root, prefix)
    print(f"{count} files removed." if args.apply else f"{count} files to remove.")
    if not args.apply:
        print("Nothing was changed. `ksmd uninstall --apply` does it.")
    return int(Exit.OK)


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise install.failed(path, error) from error


def _remove_directories(root: Path, prefix: Path) -> None:
    """Remove directories that nobody but ksmd uses, where they are empty."""
    documents = prefix / "share/doc/ksmd"
    ours = (DROP_INS, CONFIG.parent, prefix / "share/ksmd", documents / "examples", documents)
    for directory in ours:
        with contextlib.suppress(OSError):
            (root / directory).rmdir()
