"""The pager settles in: a name, no signal that ends it, memory that stays; and how it speaks."""

from __future__ import annotations

import gc
import os
import resource
import signal
import sys
from collections.abc import Callable

from ksmd.kernel import libc, priority

COMM = "ksmd-pager"
OOM_SCORE_ADJ = -900
MCL_ONFAULT = 4  # include/uapi/asm-generic/mman.h, Linux 4.4


def complain(text: str) -> None:
    """Write a line to stderr, with its priority (sd-daemon(3)) where that leads to the journal."""
    prefix = "<4>" if "JOURNAL_STREAM" in os.environ else ""
    print(f"{prefix}ksmd-pager: {text}", file=sys.stderr, flush=True)


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def _protect() -> None:
    fd = os.open("/proc/self/oom_score_adj", os.O_RDONLY | os.O_CLOEXEC)
    try:
        given = int(os.read(fd, 16))
    finally:
        os.close(fd)
    if given > OOM_SCORE_ADJ:  # a service may be given more protection than this
        _write("/proc/self/oom_score_adj", str(OOM_SCORE_ADJ))


def _lock_memory() -> None:
    libc.mlockall(libc.MCL_CURRENT)
    # locked once touched: the channel's large receive buffers are never touched but for their start
    libc.mlockall(libc.MCL_FUTURE | MCL_ONFAULT)


def in_place(*also: signal.Signals) -> list[str]:
    """Make this process hard to disturb; what failed, as sentences. *also* is ignored too."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE, *also):
        signal.signal(number, signal.SIG_IGN)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    gc.freeze()  # what start-up made lives for ever: collections stay short
    libc.trim_heap()  # nor is what it left lying locked
    failed = []
    steps: tuple[tuple[str, Callable[[], None]], ...] = (
        ("set its name", lambda: _write("/proc/self/comm", COMM)),
        ("raise RLIMIT_NOFILE", lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))),
        ("protect itself from the OOM killer", _protect),
        ("lock its memory", _lock_memory),
        ("go before others that want a processor", priority.go_before_others),
    )
    for what, step in steps:
        try:
            step()
        except (OSError, ValueError) as error:
            failed.append(f"cannot {what}: {error}")
    return failed
