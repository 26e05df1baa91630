"""The way to a pager that an earlier daemon left behind: its process is its name.

A socket file would vanish with the service manager's RuntimeDirectory=, an abstract name belongs to
a network namespace and anybody could take it first. A process has neither fault and nothing of it
is left when it ends. So the pager keeps both ends of a socket pair, the outer one at the number
:data:`OUTER`; a new daemon finds the pager by its command line, takes the outer end with
pidfd_getfd(2), and passes a channel of its own through it.

The kernel admits whoever may attach to the pager with ptrace(2), which is the right that ksmd rests
on anyway. In the other direction the daemon believes a process only if that could do everything
ksmd does by itself: our user or root, CAP_SYS_PTRACE in effect, our user and pid namespace. So
neither side can be a process that gains anything by the meeting.
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
import sys
import time
from collections.abc import Iterator

from ksmd.guard import shadow
from ksmd.kernel import channel, libc, procfs
from ksmd.kernel.patience import Patience
from ksmd.model.errors import KsmdError

MODULE = "ksmd.guard.pager"
#: The outer end's number in the pager.
OUTER = 3
#: In place of a channel: a pager that stands by itself, and waits for a daemon.
STANDING = "-"

_CAP_SYS_PTRACE = 1 << 19
_AGAIN = 0.05  # s: an open door is looked for


def command(channel_or_standing: int | str, name: str) -> list[str]:
    """Give the command line of a pager, by which it is found."""
    # -P: what lies in the current directory must not be imported
    return [sys.executable, "-P", "-m", MODULE, str(channel_or_standing), name]


def moved(fd: int) -> int:
    """Give *fd* another number where it has the door's."""
    if fd != OUTER:
        return fd
    new = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, OUTER + 1)
    os.close(fd)
    return new


def build() -> socket.socket:
    """Make the pager's door before it opens anything else: the inner end. See :func:`moved`."""
    first, second = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    outer, inner = (first, second) if first.fileno() == OUTER else (second, first)
    for end in (inner, outer):
        end.setblocking(False)
    if outer.fileno() != OUTER:
        os.dup2(outer.fileno(), OUTER, inheritable=False)
        outer.close()
    else:
        outer.detach()
    return inner


def pagers(name: str) -> list[int]:
    """Give the pids of the pagers that were started under *name*, which is not empty."""
    assert name
    return [pid for pid, words in _commands() if words[1] == os.fsencode(name)]


def standing(name: str = "") -> list[int]:
    """Give the pids of the pagers that stand by themselves, under *name* or any."""
    names = {os.fsencode(name)} if name else None
    mark = STANDING.encode()
    return [
        pid
        for pid, words in _commands()
        if words[0] == mark and (names is None or words[1] in names)
    ]


def open_standing(name: str, seconds: float) -> tuple[int, socket.socket] | None:
    """Wait for a pager that stands by itself to open its door: its pid, and a channel to it.

    Its service manager is given *seconds* to start one, and each that is started as much to load.
    """
    patience, known = Patience(seconds), set[int]()
    while True:
        pids = set(standing(name))
        for pid in pids:
            if (end := knock(pid)) is not None:
                return pid, end
        if pids - known:
            patience = Patience(seconds, *pids)
            known |= pids
        if not patience.left():
            return None
        time.sleep(_AGAIN)


def left_shadows(name: str) -> dict[int, bool]:
    """Give the pids of the shadows of pagers that are dead and were started under *name*.

    And whether the pager stood by itself.
    """
    there = set(pagers(name))
    return {
        pid: words[0] == STANDING.encode()
        for pid, words in _commands(shadows=True)
        if words[1] == os.fsencode(name) and _parent(pid) not in there
    }


def _parent(pid: int) -> int:
    try:
        return int(procfs.status_fields(pid)["PPid"])
    except KsmdError:
        return 0


def _commands(*, shadows: bool = False) -> Iterator[tuple[int, list[bytes]]]:
    """Give the pid and the last two arguments of everything that looks like a pager.

    Or like the shadow of one. What anybody started under such a name makes nobody wait.
    """
    for pid in procfs.pids():
        try:
            words = procfs.read_process(pid, "cmdline").split(b"\0")
            if words[-5:-3] != [b"-m", MODULE.encode()]:
                continue
            shade = procfs.read_process(pid, "comm").strip() == shadow.COMM.encode()
            trusted = _could_be_us(pid)
        except (KsmdError, OSError):
            continue
        if shade == shadows and trusted:
            yield pid, words[-3:-1]


def knock(pid: int) -> socket.socket | None:
    """Give a channel to the pager *pid*; None when it is none, has ended or is not to be trusted.

    A pager that has no descriptor left closes the channel unheard, as one that ends does.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    try:
        if not _could_be_us(pid):
            return None
        mine, its = channel.pair()
        with its, socket.socket(fileno=libc.pidfd_getfd(pidfd, OUTER)) as outer:
            channel.send(outer, {"do": "hand-over"}, fds=(its.fileno(),))
        # alive now, so it had its pid, and all that was read under it, all the time
        if select.select([pidfd], [], [], 0)[0]:
            mine.close()
            return None
    except (OSError, KsmdError, channel.PeerGoneError):
        return None
    finally:
        os.close(pidfd)
    return mine


def _could_be_us(pid: int) -> bool:
    fields = procfs.status_fields(pid)
    if set(fields["Uid"].split()) not in ({"0"}, {str(os.geteuid())}):
        return False
    if not int(fields["CapEff"], 16) & _CAP_SYS_PTRACE:
        return False
    for kind in ("user", "pid"):
        paths = (f"/proc/{which}/ns/{kind}" for which in (pid, "self"))
        its, ours = (os.stat(path) for path in paths)  # noqa: PTH116 - no pathlib in the pager
        if (its.st_dev, its.st_ino) != (ours.st_dev, ours.st_ino):
            return False
    return True
