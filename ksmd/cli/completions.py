"""Completion of ``ksmd`` and ``ksmctl`` for bash and zsh, made by shtab from the parsers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Literal

import shtab

from ksmd.cli import manual

SHELLS: tuple[Literal["bash", "zsh"], ...] = ("bash", "zsh")


def script(command: str, shell: Literal["bash", "zsh"]) -> str:
    """Make the completion of *command*, which is "ksmd" or "ksmctl"."""
    parser = manual.parsers()[command]
    _name_paths(parser)
    for _, verb in manual.verbs(parser).values():
        _name_paths(verb)
    text: str = shtab.complete(parser, shell)
    return text if text.endswith("\n") else text + "\n"


def _name_paths(parser: argparse.ArgumentParser) -> None:
    """Mark what takes a path: shtab does not see that by itself."""
    for action in manual.options(parser):
        if action.type is Path or action.metavar in ("FILE", "PATH", "DIR"):
            kind: Any = shtab.DIRECTORY if action.metavar == "DIR" else shtab.FILE
            action.complete = kind  # type: ignore[attr-defined]  # shtab's way of being told
