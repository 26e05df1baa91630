"""``ksmd run``: read the settings, become the daemon, leave with an exit code."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from ksmd.daemon.notify import Manager
from ksmd.daemon.service import Service
from ksmd.kernel import libc, rlimits
from ksmd.kernel.rivals import MAIN_COMM
from ksmd.model.errors import KsmdError
from ksmd.settings import Loaded, defaults, read

log = logging.getLogger(__name__)


def run(config: Path | None, socket: Path | None, manager: Manager | None = None) -> int:
    """Run in the foreground until a signal says stop; the exit code.

    Raises KsmdError for everything that keeps the daemon from starting: wrong settings, a missing
    privilege, a kernel that lacks a needed feature, a socket that another daemon answers.
    """
    libc.set_name(MAIN_COMM)  # the kernel's own thread is called ksmd
    rlimits.raise_open_files()
    loaded = read(config) if config is not None else Loaded(defaults(), (), {})
    service = Service(loaded, config, socket or loaded.settings.socket, manager)
    try:
        return service.run()
    except KsmdError as error:
        log.error("%s", error)
        return int(error.exit_code)


if __name__ == "__main__":
    sys.exit(run(None, None))
