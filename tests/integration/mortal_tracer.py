"""The tracer with a fault, in the place of ``python -m ksmd.remap.tracer FD FD``.

MORTAL_AT=n, MORTAL_WHEN=before|after: it dies around its n-th ptrace request, as by SIGKILL, so
that nothing of it can clean up. MORTAL_LATE=n: its n-th window is over too late.
MORTAL_SLOW=seconds: so long it rests after each window, and any other request.
MORTAL_BLIND=states: it does not look at the threads' states before it stops them.
MORTAL_BLIND=rseq: it takes no heed of restartable sequences.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from ksmd.kernel import ptrace
from ksmd.remap import tracer
from ksmd.remap.session import Session
from ksmd.remap.stop import DeadlineError

_at = int(os.environ.get("MORTAL_AT", "0"))
_before = os.environ.get("MORTAL_WHEN") == "before"
_blind = os.environ.get("MORTAL_BLIND")
_late = int(os.environ.get("MORTAL_LATE", "0"))
_slow = float(os.environ.get("MORTAL_SLOW", "0"))
_request = ptrace._request
_window = tracer.Tracer._window
_answer = tracer.Tracer._answer
_count = _windows = 0


def _mortal_request(*arguments: Any) -> int:
    global _count  # noqa: PLW0603 - one process, one count
    _count += 1
    if _before and _count == _at:
        os.kill(os.getpid(), signal.SIGKILL)
    result = _request(*arguments)
    if not _before and _count == _at:
        os.kill(os.getpid(), signal.SIGKILL)
    return result


def _late_window(*arguments: Any) -> Any:
    global _windows  # noqa: PLW0603
    _windows += 1
    reply = _window(*arguments)
    if _windows == _late:
        raise DeadlineError
    return reply


def _slow_answer(*arguments: Any) -> Any:
    reply = _answer(*arguments)
    time.sleep(_slow)
    return reply


ptrace._request = _mortal_request
tracer.Tracer._answer = _slow_answer  # type: ignore[method-assign]
tracer.Tracer._window = _late_window  # type: ignore[method-assign]
if _blind == "states":
    Session._check_states = lambda self, target: None  # type: ignore[method-assign]
elif _blind == "rseq":
    Session._inside_rseq = lambda self: set()  # type: ignore[method-assign]
sys.exit(tracer.main(["tracer", *sys.argv[-2:]]))
