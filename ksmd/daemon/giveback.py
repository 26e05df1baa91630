"""``ksmd pager --give-back``: everything is unmerged, by a process that does nothing else.

It is what a service manager runs before it stops the pager (ksmd-pager.service). A ksmd that lives
is asked to do it. One that is gone may have been told to keep what is merged: then the pager is
adopted as the next ksmd would, with settings that select nobody, until all is given back.
"""

from __future__ import annotations

import logging
import os
import sys
import time

from ksmd.client import Client
from ksmd.daemon import journal
from ksmd.daemon.adopt import Adoption, find_pager
from ksmd.daemon.pipeline import Pipeline
from ksmd.daemon.targets import Targets
from ksmd.guard.client import Pager
from ksmd.kernel import libc, memcg, rlimits
from ksmd.kernel.iouring import PinRing
from ksmd.model.errors import Exit, KsmdError
from ksmd.model.units import PAGE_SHIFT
from ksmd.remap.engine import Engine
from ksmd.settings import defaults

log = logging.getLogger(__name__)

COMM = "ksmd-give-back"
#: How long memory that cannot be given back is tried again.
PATIENCE_SECS = 60.0
_AGAIN_SECS = 1.0
#: How long a daemon that owns the pager may be one that is about to be gone.
_DYING_SECS = 1.0


def run(name: str) -> int:
    """Give back what the pager called *name* guards; the exit code."""
    journal.configure(verbose=False, stream=sys.stderr, environ=os.environ, identifier=COMM)
    libc.set_name(COMM)
    rlimits.raise_open_files()
    try:
        pager = find_pager(name, _DYING_SECS)
    except KsmdError:  # it belongs to a daemon that lives
        return _ask(name)
    if pager is None:
        log.info("no pager serves %s", name)
        return int(Exit.OK)
    engine = Engine()
    engine.start()
    try:
        left = _give_back(pager, engine)
    finally:
        engine.close()
        pager.close()
    if left:
        log.error("%d processes keep merged pages, and the pager stays for them", left)
    return int(Exit.FAILED if left else Exit.OK)


def _ask(name: str) -> int:
    log.info("the ksmd at %s is asked to unmerge; it goes on when a pager stands by again", name)
    with Client(name, timeout=None) as daemon:
        refused = daemon.call("Unmerge", wait=True, until_pager=True).get("refused")
    for one in refused or ():
        log.error("not given back: %s (%s)", one["sentence"], one["detail"])
    return int(Exit.FAILED if refused else Exit.OK)


def _give_back(pager: Pager, engine: Engine) -> int:
    """Unmerge all; how many processes the pager has to guard still."""
    settings = defaults().plain()
    ring = PinRing()
    available = memcg.available() >> PAGE_SHIFT
    targets = Targets(settings, settings.resolved_tables(available), ring, pager)
    targets.ours |= {pager.pid, pager.shadow, engine.pid}
    pipeline = Pipeline(targets, engine, pager)
    adoption = Adoption(pipeline, pager, ring)
    adoption.restore()
    for pause in adoption.steps():  # no rule selects anybody: all are unmerged
        time.sleep(pause)
    deadline = time.monotonic() + PATIENCE_SECS
    while (left := _held(pager)) and time.monotonic() < deadline:
        time.sleep(_AGAIN_SECS)
        try:
            for _ in pipeline.unmerger.unmerge(list(targets)):
                pass
        except KsmdError as error:
            log.warning("%s (%s)", error, error.hint)
    return left


def _held(pager: Pager) -> int:
    told = pager.stats()
    return told["contexts"] + told["children"]
