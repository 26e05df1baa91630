"""``ksmd run``: read the settings, become the daemon, leave with an exit code."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from ksmd.daemon.service import Service
from ksmd.model.errors import KsmdError
from ksmd.settings import defaults, load

log = logging.getLogger(__name__)


def run(config: Path | None, socket: Path | None) -> int:
    """Run in the foreground until a signal says stop; the exit code.

    Raises KsmdError for everything that keeps the daemon from starting: wrong settings, a missing
    privilege, a kernel that lacks a needed feature, a socket that another daemon answers.
    """
    settings = load(config) if config is not None else defaults()
    service = Service(settings, config, socket or settings.socket)
    try:
        return service.run()
    except KsmdError as error:
        log.error("%s", error)
        return int(error.exit_code)


if __name__ == "__main__":
    sys.exit(run(None, None))
