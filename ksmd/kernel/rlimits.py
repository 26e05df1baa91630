"""Our own resource limits (getrlimit(2))."""

from __future__ import annotations

import contextlib
import resource


def raise_open_files() -> None:
    """Allow ourselves as many file descriptors as the hard limit does.

    The soft limit is 1024 by tradition, for select(2), which ksmd does not use. A target takes four
    descriptors, an extent two, a connection one, and running out of them would let what one user
    registers keep another's from being merged.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # a sandbox may forbid it
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
