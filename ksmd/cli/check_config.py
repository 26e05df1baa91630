"""``ksmctl check-config FILE``: every mistake in the settings, or what they mean.

The files in ``conf.d`` beside FILE are read with it, as the daemon does. What they come to is shown
with the place of each value.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ksmd.cli.common import print_json
from ksmd.model.errors import Exit
from ksmd.settings import Loaded, SettingsError, effective, json_schema, read

HELP = "say what is wrong with a settings file, and where, or what it means"

_Path = tuple[str | int, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the file, or the schema in its place."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "file", type=Path, metavar="FILE", nargs="?", help="usually /etc/ksmd/ksmd.yaml"
    )
    what.add_argument(
        "--schema", action="store_true", help="print the JSON Schema of settings files, for editors"
    )


def run(args: argparse.Namespace) -> int:
    """Judge the file. No daemon is asked."""
    if args.schema:
        print_json(json_schema())
        return 0
    try:
        loaded = read(args.file)
    except SettingsError as error:
        if args.json:
            print_json(
                {"valid": False, "problems": [asdict(problem) for problem in error.problems]}
            )
        else:
            for problem in error.problems:
                print(problem, file=sys.stderr)
        return int(Exit.USAGE)
    if args.json:
        print_json(_as_json(loaded))
    else:
        show(loaded, args.file)
    return 0


def _as_json(loaded: Loaded) -> dict[str, Any]:
    return {
        "valid": True,
        "problems": [],
        "files": list(loaded.files),
        "settings": effective(loaded.settings),
        "sources": {_shown(path): source for path, source in loaded.sources.items()},
    }


def show(loaded: Loaded, file: Path) -> None:
    """Say what the file comes to, value by value, each with its place."""
    targets = [target.name for target in loaded.settings.targets]
    chosen = f"targets: {', '.join(targets)}" if targets else "no targets: nothing would be merged"
    more = len(loaded.files) - 1
    with_them = f" with {more} more of conf.d" if more else ""
    print(f"{file}{with_them} is right; {chosen}.")
    print()
    lines = [
        (f"{_shown(path)}: {_value(value)}", loaded.sources.get(path, "default"))
        for path, value in _leaves(effective(loaded.settings), ())
    ]
    width = min(60, max(len(text) for text, _ in lines))
    for text, source in lines:
        print(f"{text:<{width}}  # {source}")


def _leaves(value: Any, path: _Path) -> Iterator[tuple[_Path, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key))
    elif isinstance(value, list) and value:
        for at, inner in enumerate(value):
            yield from _leaves(inner, (*path, at))
    else:
        yield path, value


def _shown(path: _Path) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
