"""A log that callers cannot fill: what one user's callers do wrong is said once for each kind."""

from __future__ import annotations

import logging

_MOST_KINDS = 1024
_LONGEST = 200


class Quiet:
    """Says each kind of thing about each user once, until so many were said that it starts anew."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._said: set[tuple[str, int]] = set()

    def info(self, kind: str, uid: int, message: str, *args: object) -> None:
        """Log *message*, unless that *kind* was said of *uid* before."""
        if (kind, uid) in self._said:
            return
        if len(self._said) >= _MOST_KINDS:
            self._said.clear()
        self._said.add((kind, uid))
        said = (message % args)[:_LONGEST]  # it may quote what the caller sent
        self._log.info("uid %d: %s (said once)", uid, said)
