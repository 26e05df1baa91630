"""Counters that go on over a restart: a file in the service's state directory (StateDirectory=).

What is shared needs no file, for the kernel is asked; nor do contexts and extents, which the pager
holds. What was counted (passes, pages, CoW breaks) would begin at zero with every daemon, and a
graph of it would fall. It is counted from the boot on: what was before is nobody's business now.

A file that cannot be read or written costs the counters and nothing else.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ksmd.core.ledger import Ledger

log = logging.getLogger(__name__)

NAME = "ledger.json"
COUNTERS = ("pages_scanned", "pages_skipped", "full_scans", "cow_breaks")
#: How much of what was counted a crash may cost.
INTERVAL_SECS = 60.0


class LedgerFile:
    """The counters of *ledger* on disk; without a directory it does nothing."""

    def __init__(
        self,
        directory: Path | None,
        ledger: Ledger,
        boot: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = directory / NAME if directory is not None else None
        self._ledger = ledger
        self._boot = boot
        self._clock = clock
        self._due = clock() + INTERVAL_SECS
        self._saved: dict[str, Any] = {}

    def restore(self) -> None:
        """Go on counting where the daemon before us ended, if that was since the boot."""
        if self._path is None:
            return
        try:
            told = json.loads(self._path.read_bytes())
            if told["boot"] != self._boot:
                return
            counted = {name: int(told[name]) for name in COUNTERS}
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s cannot be read, counters begin at zero: %r", self._path, error)
            return
        for name, count in counted.items():
            setattr(self._ledger, name, getattr(self._ledger, name) + max(0, count))

    def keep(self) -> None:
        """Save from time to time. Cheap: call it at every turn."""
        if self._clock() >= self._due:
            self.save()

    def save(self) -> None:
        """Save now, whole or not at all."""
        self._due = self._clock() + INTERVAL_SECS
        told = {"boot": self._boot} | {name: getattr(self._ledger, name) for name in COUNTERS}
        if self._path is None or told == self._saved:
            return
        new = self._path.with_suffix(".new")
        try:
            # no fsync: it is worth nothing after a crash of the kernel
            new.write_text(json.dumps(told) + "\n", encoding="utf-8")
            new.replace(self._path)
        except OSError as error:
            log.warning("%s cannot be written: %s", self._path, error.strerror)
            self._path = None  # said once
            return
        self._saved = told
