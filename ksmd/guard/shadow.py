"""The pager's shadow: a process that owns its descriptor table too, and does nothing.

fork of a guarded process makes a context for the child, which comes to be in the table of whoever
reads the FORK event; and the parent goes on before read(2) has returned. A pager that is killed
between that and telling the daemon would let the child's guard fall. So the table has a second
owner: a clone(2) of the pager with CLONE_FILES, and with CLONE_VM, so that it takes no memory. When
the pager has died it hangs up on everybody, as the kernel would have done, and lasts for a moment;
the daemon takes out of it whatever nobody has told it of, and ends it (:func:`inherit`).

What it runs is shadow.S. In /proc it looks like the pager, but for its name.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import struct
from collections.abc import Collection
from typing import Final

from ksmd.kernel import libc, userfaultfd

COMM: Final = "ksmd-shadow"
#: Seconds that it lasts for a daemon to come: one that lives is there in some milliseconds.
LASTS: Final = 2

_CLONE_VM: Final = 0x100
_CLONE_FILES: Final = 0x400
_KCMP_FILE: Final = 0
_PAGE: Final = 4096
_ENDS: Final = 10.0


def cast() -> int:
    """Start the shadow of this process; its pid. OSError."""
    code = _code()
    kind = libc.MAP_PRIVATE | libc.MAP_ANONYMOUS
    room = libc.mmap(0, _PAGE, libc.PROT_READ | libc.PROT_WRITE, kind)  # data below, stack above
    pidfd = os.pidfd_open(os.getpid())
    libc.view(room, 24)[:] = struct.pack("=ihhqq", pidfd, select.POLLIN, 0, LASTS, 0)
    # its handlers are Python's, and would act in the pager
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    name = open("/proc/self/comm", encoding="utf-8")  # noqa: PTH123, SIM115 - no pathlib in here
    with name:
        ours = name.read().strip()
    libc.set_name(COMM)
    try:
        return libc.clone(code, room + _PAGE, _CLONE_VM | _CLONE_FILES | signal.SIGCHLD, room)
    finally:
        libc.set_name(ours)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _code() -> int:
    fd = os.open(os.path.join(os.path.dirname(__file__), "shadow.bin"), os.O_RDONLY)  # noqa: PTH118, PTH120
    try:
        return libc.mmap(0, _PAGE, libc.PROT_READ | libc.PROT_EXEC, libc.MAP_PRIVATE, fd)
    finally:
        os.close(fd)


def end(pid: int) -> None:
    """End the shadow of this process, which is about to leave; 0: it has none."""
    if not pid:
        return
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


def held_by(pid: int, fd: int) -> bool:
    """Tell whether process *pid* holds this context of ours too."""
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):  # noqa: PTH208
            with contextlib.suppress(OSError):
                link = os.readlink(f"/proc/{pid}/fd/{name}")  # noqa: PTH115
                if "[userfaultfd]" in link and _same(fd, int(name), pid):
                    return True
    return False


def _same(one: int, other: int, pid: int = 0) -> bool:
    """Tell whether a descriptor of ours, and another of ours or of *pid*, are of one file."""
    ours = os.getpid()
    return libc.syscall("kcmp", libc.NR_KCMP, ours, pid or ours, _KCMP_FILE, one, other) == 0
