"""What happens to targets, as it happens: the stream behind the Monitor method.

An event says what was done to which process and to how many pages, or why not. It never says what
is on a page, nor where it lies. Nobody waits for a listener: what one does not read in time fills
its connection's buffer, and then ends the connection, as any caller's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ksmd.daemon.connection import Call, CallError
from ksmd.daemon.state import Target
from ksmd.model.process import TargetId
from ksmd.model.refusal import SENTENCES, Reason

_SERVICE = "org.varlink.service"


class Events:
    """Everybody who listens. :meth:`tell` is what ``Targets.tell`` wants."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._listeners: dict[int, tuple[Call, TargetId | None]] = {}

    def listen(self, call: Call, only: TargetId | None) -> None:
        """Let *call* hear of every target, or of *only* one. Its first reply comes at once."""
        if not call.more:
            raise CallError(f"{_SERVICE}.ExpectedMore")
        self._listeners[call.connection_id] = call, only
        call.reply({"events": []}, continues=True)

    def forget_connection(self, connection: int) -> None:
        """Forget a listener that has left."""
        self._listeners.pop(connection, None)

    def tell(self, kind: str, target: Target, pages: int = 0, reason: str = "") -> None:
        """Tell those who listen."""
        if not self._listeners:
            return
        event: dict[str, Any] = {
            "event": kind,
            "time": self._clock(),
            "pid": target.pid,
            "name": target.selected.name,
            "domain": target.selected.domain,
            "pages": pages,
            "reason": reason,
            "sentence": SENTENCES[Reason(reason)] if reason else "",
        }
        for call, only in list(self._listeners.values()):
            if only is None or only == target.id:
                call.reply({"events": [event]}, continues=True)
