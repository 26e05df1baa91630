"""The pager's shadow: a process that owns its descriptor table too, and does nothing.

fork of a guarded process makes a context for the child, which comes to be in the table of whoever
reads the FORK event; and the parent goes on before read(2) has returned. A pager that is killed
between that and telling the daemon would let the child's guard fall. So the table has a second
owner: a clone(2) of the pager with CLONE_FILES, which shares no memory. When the pager has died it
hangs up on everybody, as the kernel would have done, and lasts for a moment; the daemon takes out
of it whatever nobody has told it of, and ends it (:func:`inherit`).

It is found by its command line, a pager's with another module.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import time
from collections.abc import Collection
from typing import Final, NoReturn

from ksmd.kernel import libc, userfaultfd

#: In place of the pager's module in the command line, and as long.
MODULE: Final = "ksmd.guard.shade"
COMM: Final = "ksmd-shadow"
#: Seconds that it lasts for a daemon to come: one that lives is there in some milliseconds.
LASTS: Final = 2.0

_NR_CLONE: Final = 56
_NR_SHUTDOWN: Final = 48
_CLONE_FILES: Final = 0x400
_KCMP_FILE: Final = 0
_ENDS: Final = 10.0


def cast(module: str) -> int:
    """Start the shadow of this process, whose command line names *module*; its pid.

    All that needs a descriptor is done before, for the table is one from then on.
    """
    with open("/proc/self/stat", encoding="ascii") as file:  # noqa: PTH123 - no pathlib in here
        fields = file.read().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])  # arg_start, arg_end
    pidfd = os.pidfd_open(os.getpid())
    words = ctypes.string_at(start, end - start)
    pid = libc.syscall("clone", _NR_CLONE, _CLONE_FILES | signal.SIGCHLD, 0, 0, 0, 0)
    if not pid:
        at = words.find(module.encode() + b"\0")
        if at >= 0:
            ctypes.memmove(start + at, MODULE.encode(), len(MODULE))
        _last(pidfd)
    return pid


def _last(pager: int) -> NoReturn:
    try:
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        libc.set_name(COMM)
        poll = select.poll()
        poll.register(pager, select.POLLIN)
        poll.poll()
        for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
            with contextlib.suppress(OSError):
                libc.syscall("shutdown", _NR_SHUTDOWN, int(name), 2)
        time.sleep(LASTS)
    finally:
        os._exit(0)


def end(pid: int) -> None:
    """End the shadow of this process, which is about to leave."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def dispel(pidfd: int) -> None:
    """End a shadow."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.poll(_ENDS * 1000)


def inherit(pid: int, pidfd: int, known: Collection[int]) -> list[int]:
    """Give the living contexts in the table of a shadow that are none of *known*; and end it.

    They are the caller's. Its pager has ended.
    """
    found: list[int] = []
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):  # noqa: PTH208
            with contextlib.suppress(OSError):
                if "[userfaultfd]" in os.readlink(f"/proc/{pid}/fd/{name}"):  # noqa: PTH115
                    found.append(libc.pidfd_getfd(pidfd, int(name)))
    except OSError:  # it is gone
        pass
    dispel(pidfd)
    ours = []
    for fd in found:
        if any(_same(fd, one) for one in known) or userfaultfd.is_dead(fd):
            os.close(fd)
        else:
            ours.append(fd)
    return ours


def _same(one: int, other: int) -> bool:
    """Tell whether two of our descriptors are of one file."""
    pid = os.getpid()
    return libc.syscall("kcmp", libc.NR_KCMP, pid, pid, _KCMP_FILE, one, other) == 0
