"""What happens to targets, as lines of the log: the few that an operator asks the journal for.

A target is told of when it begins to be merged, when it begins to be given back, and when it ends;
not window by window, of which there may be thousands. Memory that programs registered by themselves
is told of in the verbose log only: any user could fill the other.
"""

from __future__ import annotations

import logging

from ksmd.daemon.journal import fields
from ksmd.daemon.state import Target

log = logging.getLogger(__name__)

_TEXTS = {
    "merged": "pid %d (%s): merging, %d pages so far",
    "unmerged": "pid %d (%s): giving back, %d pages so far",
}


class Chronicle:
    """Remembers which targets were told of."""

    def __init__(self, registered: str) -> None:
        self._registered = registered
        self._last: dict[int, str] = {}  # by slot

    def note(self, kind: str, target: Target, pages: int) -> None:
        """Log an event, where it is one that begins something."""
        level = logging.DEBUG if target.selected.name == self._registered else logging.INFO
        about = fields(
            target_pid=target.pid,
            target_name=target.selected.name,
            domain=target.selected.domain,
            event=kind,
            pages=pages,
        )
        named = target.pid, target.selected.name
        if kind in _TEXTS and self._last.get(target.slot) != kind:
            self._last[target.slot] = kind
            log.log(level, _TEXTS[kind], *named, pages, extra=about)
        elif kind == "cow_storm":
            level += logging.WARNING - logging.INFO
            text = "pid %d (%s): %d merged pages were written since the last pass"
            log.log(level, text, *named, pages, extra=about)
        elif kind == "target_gone" and self._last.pop(target.slot, None) is not None:
            log.log(level, "pid %d (%s) is a target no more", *named, extra=about)
