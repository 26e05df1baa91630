"""Commands that are told to stop when who started them ends, in whatever way: prctl(2)."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

# The parent-death signal outlives execve. PR_SET_PDEATHSIG is 1.
_TIED = """\
import ctypes, os, sys
parent = int(sys.argv[1])
ctypes.CDLL(None).prctl(1, 15, 0, 0, 0)
if os.getppid() == parent:
    os.execvp(sys.argv[2], sys.argv[2:])
"""


def tied(command: Sequence[str]) -> list[str]:
    """Give what to start instead of *command*: it gets SIGTERM when the thread that did has ended.

    So ksmd gives everything back when a demonstration or a benchmark is killed.
    """
    return [sys.executable, "-P", "-c", _TIED, str(os.getpid()), *command]
