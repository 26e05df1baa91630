"""rich's console as the verbs use it. A module of its own: the daemon is to stay small."""

from __future__ import annotations

from rich.console import Console


class Terminal(Console):
    """Leaves broken pipes to ``common.guarded``."""

    def on_broken_pipe(self) -> None:
        """Pass it on."""
        raise BrokenPipeError
