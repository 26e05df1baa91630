"""The pager, which dies as by SIGKILL when it has read its MORTAL_FORK-th FORK and told nobody."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from ksmd.guard import pager
from ksmd.guard.watch import Watch

_left = int(os.environ["MORTAL_FORK"])
_forked = Watch._forked


def _mortal(self: Watch, *arguments: Any) -> None:
    global _left  # noqa: PLW0603 - one process, one count
    _left -= 1
    if not _left:
        os.kill(os.getpid(), signal.SIGKILL)
    _forked(self, *arguments)


Watch._forked = _mortal  # type: ignore[method-assign]
sys.exit(pager.main(sys.argv[1:]))
