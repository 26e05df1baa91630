"""The pager as the daemon sees it: found at the start, replaced when it dies or a better one comes.

A pager that stands by itself (ksmd-pager.service) is preferred, for it outlives us. When its
service is stopped, a ksmd that runs is asked to unmerge all and merges no more; when another one
stands by again, be it at once or later, it takes that and goes on.
"""

from __future__ import annotations

import logging
import selectors
import time
from collections.abc import Callable

from ksmd.daemon.adopt import find_pager
from ksmd.daemon.loop import watch_pid
from ksmd.guard import door
from ksmd.guard.client import Pager
from ksmd.guard.stored import Stored

log = logging.getLogger(__name__)

#: How often another pager is looked for, where one is awaited; and where one is missed, at first
#: and in the end: it costs a look at every process.
_LOOK_SECS, _LOOK_SELDOM_SECS = 1.0, 60.0


class Guardian:
    """Our pager. ``adopted``: it holds, or may hold, what an earlier daemon merged.

    ``awaited``: all was unmerged because its service stops, and we go on with the next one.
    ``missed``: one that stood by did not come back in time, and ours took its place till it does.
    """

    def __init__(self, name: str, manager: Stored) -> None:
        running = find_pager(name)
        self.pager = running or Pager(name)
        self.adopted = self.pager.recall(manager) or running is not None
        self.awaited = self.missed = False
        self._name = name
        self._next_look, self._pause = 0.0, _LOOK_SECS
        self._selector: selectors.BaseSelector | None = None
        self._replaced: Callable[[], None] = lambda: None

    def start(self) -> None:
        """Start one of our own, if there is none yet."""
        if not self.pager.alive():
            self._restart()  # the one that was adopted may have died since
        for failed in self.pager.failed:
            log.warning("the pager %s", failed)

    def say_if_misnamed(self) -> None:
        """Tell an operator whose pager stands by for another control socket."""
        strangers = [pid for pid in door.standing() if pid != self.pager.pid]
        if strangers and not self.pager.standing:
            log.warning(
                "the pager %d stands by for another socket than %s: its --socket (ExecStart= and"
                " ExecStop= of ksmd-pager.service) must be the path in ksmd.socket",
                strangers[0],
                self._name,
            )

    def watch(self, selector: selectors.BaseSelector, replaced: Callable[[], None]) -> None:
        """Replace it from now on when it dies. Then *replaced* is called."""
        self._selector, self._replaced = selector, replaced
        self._watch()

    def close(self) -> None:
        """Replace it no more, and let go of it."""
        self._selector = None
        self.pager.close()

    def look(self) -> None:
        """Move over to a pager that is wanted and stands by. Cheap: call it at every turn."""
        now = time.monotonic()
        wanted = self.awaited or self.missed
        if wanted and not self.pager.standing and now >= self._next_look:
            self._next_look = now + (_LOOK_SECS if self.awaited else self._pause)
            self._pause = min(2 * self._pause, _LOOK_SELDOM_SECS)
            if door.standing(self._name):
                log.info("a pager stands by itself again: it takes the place of ours")
                self.pager.standing = True
                self._replace()

    def _watch(self) -> None:
        if self._selector is not None:
            pid = self.pager.pid
            watch_pid(self._selector, self.pager.pidfd, lambda: self._died(pid))

    def _died(self, pid: int) -> None:
        if self._selector is not None and pid == self.pager.pid:
            if self.awaited and self.pager.standing:
                log.info("the pager (pid %d) was stopped; one of our own takes its place", pid)
                self.pager.standing = bool(door.standing(self._name))  # else it comes later, or not
            else:
                log.error("the pager (pid %d) died; starting another", pid)
            self._replace()

    def _restart(self) -> None:
        stood = self.pager.standing
        self.pager.restart()
        self.missed = (self.missed or stood) and not self.pager.standing
        self._next_look, self._pause = time.monotonic() + _LOOK_SECS, _LOOK_SECS

    def _replace(self) -> None:
        self._restart()
        self._watch()
        self._replaced()
