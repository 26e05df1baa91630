"""``ksmd run``: read the settings, become the daemon, leave with an exit code."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from ksmd.daemon import listening
from ksmd.daemon.notify import Manager
from ksmd.daemon.protocol import DEFAULT_SOCKET
from ksmd.daemon.service import Service
from ksmd.guard.client import Pager
from ksmd.kernel import footprint, libc, rlimits
from ksmd.kernel.rivals import MAIN_COMM
from ksmd.model.errors import KsmdError
from ksmd.settings.apart import Reading

log = logging.getLogger(__name__)

#: Objects that are made before the garbage collector looks for cycles. By its own choice it would
#: go through hundreds of thousands of mappings, which are in none, again and again.
_COLLECT_AFTER = 50_000


def run(
    config: Path | None,
    socket: Path | None,
    manager: Manager | None = None,
    early: Sequence[int] = (),
    settings: Reading | None = None,
) -> int:
    """Run in the foreground until a signal says stop; the exit code.

    *settings*: *config* where it is being read already. *early*: signals that came before we could
    heed them; it may grow.

    Raises KsmdError for everything that keeps the daemon from starting: wrong settings, a missing
    privilege, a kernel that lacks a needed feature, a socket that another daemon answers.
    """
    libc.set_name(MAIN_COMM)  # the kernel's own thread is called ksmd
    gc.set_threshold(_COLLECT_AFTER)
    rlimits.raise_open_files()
    manager = manager or Manager()
    name = listening.inherited_path(manager.inherited) or socket or Path(DEFAULT_SOCKET)
    try:
        given = (settings or Reading(config)).result()
        service = Service(given, config, socket or given.settings.socket, manager)
    except BaseException:
        if manager.kept:
            _leave_guarded(manager, str(name.absolute()))
        raise
    footprint.settle_down()
    try:
        return service.run(early)
    except KsmdError as error:
        log.error("%s", error)
        return int(error.exit_code)


def _leave_guarded(manager: Manager, name: str) -> None:
    """Give what the service manager kept to a pager: it closes all when we fail for good."""
    try:
        guarded = Pager(name)
        if guarded.recall(manager.stored()):
            log.warning("what an earlier ksmd merged is guarded by the pager %d", guarded.pid)
    except (KsmdError, OSError) as error:
        log.critical("what an earlier ksmd merged is not guarded any more: %s", error)


if __name__ == "__main__":
    sys.exit(run(None, None))
