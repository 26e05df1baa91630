"""The pager: a process that answers faults on merged memory, and does nothing else.

``python -m ksmd.guard.pager FD [NAME]``, where FD is its end of a SOCK_SEQPACKET channel. As long
as it lives, dropped merged memory reads as zeros; while it is dead, targets that touch dropped
memory wait. So it is small, locked in memory, hard to kill by accident, and never waits: every
descriptor is non-blocking, what cannot be sent is kept. It outlives the daemon while it holds
living contexts, and a later daemon finds it by NAME (see door.py). What that one needs to go on is
kept here for it, unread: ``about`` in the messages below, and the descriptors.

With "-" for FD it stands by itself (ksmd-pager.service): it waits for daemons at its door, outlives
them all, and leaves when it got SIGTERM and nothing is merged. What it holds, its service
manager holds too (see stored.py).

Messages (``do``), each answered with {"ok": true, ...} or {"ok": false, "error": ...}:

``guard``     {id, ranges?, child?, about?} + 1 or 2 fds: hold this context, and the target's
              tracking context beside it. ``child``: the key of a child's.
``extend``    {id, ranges}: these are about to be merged; told before the stop window.
``settle``    {id, ranges}: these are merged, populated, and each VMA had its UFFDIO_CONTINUE.
``drop``      {id}: the target is gone or has nothing merged. Its children stay guarded.
``children``  {id} -> {children}: living contexts that descend from the target.
``stats``     -> the counters.
``sweep``     -> {children}: let contexts of dead children go; how many live, of all targets.
``keep``      {offset, length, about?} + 1 fd: map and lock this part of an extent (see keeper.py).
``release``   {inode}: that extent has no user any more.
``rings``     {pid, rings}: hold these io_uring descriptors [name, fd] of the daemon, with their
              pins, and no others.
``secret``    {key, children?}: keep the key of the extents' digests; no new child gets a key up to
              ``children``.
``hand-over`` + 1 fd, at the door alone: a further channel's end.
``claim``     the sender is the owner from now on, if no other lives: it is told of all contexts
              and extents. -> {pid, shadow, version, standing, secret, highest,
              rings}; ``highest`` is the
              highest id ever used, ``rings`` are to be taken by pidfd_getfd.
``quit``      leave, if no context is held; who stands by itself stays, and lets go of the rest.
``clear``     let go of everything, for the owner holds it all and will tell it anew.

News for the owner: {"event": "hello", pid, shadow, failed, nofile} at start; for each new child
{"event": "context", id, key} + fd, so that a second process holds what a restarted pager needs; and
{"event": "gone", keys}. After ``claim`` also each target's {"event": "context", id, key: 0, ranges,
about} + fds and {"event": "extent", inode, offset, length, about} + fd.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

from ksmd import __version__
from ksmd.guard import door, settle, shadow
from ksmd.guard.keeper import Keeper
from ksmd.guard.notes import Header, summary
from ksmd.guard.stored import Stored
from ksmd.guard.watch import Ranges, Watch
from ksmd.kernel import channel, sdnotify
from ksmd.model.units import PAGE_SIZE

_SOON = 0.001  # s: the sender of an event has to run on
_LATER = 0.02  # s: the owner does not read, or a descriptor has to come free
_SWEEP = 2.0  # s: idle sweeps for dead children
_SILENCE = 0.2  # s: when we were told to leave, a daemon that says nothing needs us no more
_TOLD = 1.0  # s: a daemon tells a pager of its own everything
_GONE_KEYS = 500  # per message


class _Line:
    """One channel, and the answers that it could not take yet."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self.end = end
        self.answers: deque[dict[str, Any]] = deque()


def _ranges(header: dict[str, Any]) -> Ranges:
    ranges = [(start, end) for start, end in header.get("ranges", ())]
    for start, end in ranges:
        if not 0 <= start < end < 1 << 64 or (start | end) % PAGE_SIZE:
            raise ValueError(f"not a range of pages: [{start:#x}, {end:#x})")
    return ranges


class Pager:
    """The loop and the verbs of its channels."""

    def __init__(self, inner: socket.socket, stored: Stored | None = None, shadow: int = 0) -> None:
        self._shadow = shadow
        self._epoll = select.epoll()
        self._door = inner
        self._epoll.register(inner.fileno(), select.EPOLLIN)
        self._stored = stored or Stored()
        self._watch = Watch(self._epoll, self._send, self._stored)
        self._keeper = Keeper()
        self._untold: list[int] = []  # inodes of extents
        self._secret = ""
        self._lines: dict[int, _Line] = {}
        self._owner: _Line | None = None
        self._wake = socket.socketpair()
        self._standing = False
        self._dismissed = False
        self._heard = 0.0
        self._leaving = False
        self._unsent = False

    def serve(self, end: socket.socket, failed: list[str]) -> None:
        """Serve the daemon that started us, and who follows it, until nobody is left."""
        self._owner = self._connect(end)
        nofile = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._owner.answers.append(
            {
                "event": "hello",
                "pid": os.getpid(),
                "shadow": self._shadow,
                "failed": failed,
                "nofile": nofile,
            }
        )
        self._run()

    def stand(self, name: str) -> None:
        """Serve every daemon that comes, until SIGTERM: then until nothing is merged any more."""
        self._stored.all = self._everything
        discard = bool(name) and self._another_serves(name)
        self._secret = self._stored.restore(self._watch, self._keeper, discard=discard).secret
        self._stored.ready()
        self._run()

    def _another_serves(self, name: str) -> bool:
        """Tell whether another pager holds what the manager kept for us.

        A daemon that could not wait for us has told it all to a pager of its own, and of two who
        read the events of a context one would not know what the other was told. But one that began
        while there was no pager has told its own of nothing: to let go would end every guard.
        """
        deadline = time.monotonic() + _TOLD
        while guards := self._stored.guards:
            others = [pid for pid in door.pagers(name) if pid != os.getpid()]
            if any(shadow.held_by(pid, fd) for pid in others for fd in guards):
                return True
            if not others or time.monotonic() > deadline:
                break
            time.sleep(_LATER)
        return False

    def heed_term(self) -> None:
        """Stand by ourselves from now on, until SIGTERM."""

        def told(_number: int, _frame: object) -> None:
            self._standing, self._dismissed = False, True

        self._standing = True
        for end in self._wake:
            end.setblocking(False)
        signal.set_wakeup_fd(self._wake[1].fileno(), warn_on_full_buffer=False)
        self._epoll.register(self._wake[0].fileno(), select.EPOLLIN)
        signal.signal(signal.SIGTERM, told)

    def _run(self) -> None:
        self._send()
        while self._watch.live or self._standing or self._wanted:
            calls = []
            for fd, _ in self._poll():
                if fd in self._watch:
                    self._watch.serve(fd)
                elif fd == self._door.fileno():
                    self._answer_door()
                elif fd == self._wake[0].fileno():
                    self._wake[0].recv(64)
                else:
                    calls.append(fd)
            self._watch.go_on()
            for fd in calls:
                self._call(fd)
            self._send()
            if self._leaving and not self._unsent:
                return
            if not (self._lines or self._watch.live) and self._keeper.busy:
                self._let_all_go()  # as if we had left: nobody maps it

    @property
    def _wanted(self) -> bool:
        """Whether a daemon is there; when we were told to leave, one that has not fallen silent."""
        return bool(self._lines) and not (
            self._dismissed and time.monotonic() - self._heard > _SILENCE
        )

    def _poll(self) -> list[tuple[int, int]]:
        if self._watch.eager:
            return self._epoll.poll(0)
        if self._watch.busy:
            return self._epoll.poll(_SOON)
        if self._unsent or self._watch.starving:
            return self._epoll.poll(_LATER)
        if self._dismissed and not self._watch.live:
            return self._epoll.poll(_SILENCE)
        if not self._watch.live or (self._lines and self._watch.live == self._watch.contexts):
            return self._epoll.poll()
        ready = self._epoll.poll(_SWEEP)
        if not ready:
            # without a daemon nobody drops the contexts of targets that ended
            self._watch.sweep(roots=not self._lines)
        return ready

    # channels

    def _connect(self, end: socket.socket) -> _Line:
        line = _Line(end)
        self._lines[end.fileno()] = line
        self._epoll.register(end.fileno(), select.EPOLLIN)
        return line

    def _disconnect(self, line: _Line) -> None:
        if self._lines.pop(line.end.fileno(), None) is None:
            return
        self._epoll.unregister(line.end.fileno())
        line.end.close()
        if self._owner is line:
            self._owner = None

    def _answer_door(self) -> None:
        """Take a channel that a later daemon passed in; it speaks by that, not by the door."""
        fds: list[int] = []
        try:
            _, _, fds = channel.receive(self._door)
            self._hand_over(fds)
        except Exception as error:  # as in _call
            settle.complain(f"nobody could be let in: {error}")
        for left in fds:
            os.close(left)

    def _hand_over(self, fds: list[int]) -> None:
        (fd,) = fds
        self._connect(socket.socket(fileno=fd))
        fds.clear()

    def _call(self, fd: int) -> None:
        """Take one message, so that faults come between any two."""
        line = self._lines.get(fd)
        if line is None:
            return
        fds: list[int] = []
        self._heard = time.monotonic()
        try:
            header, _, fds = channel.receive(line.end)
            answer: dict[str, Any] = {"ok": True, **self._answer(line, header, fds)}
        except BlockingIOError:
            return
        except channel.PeerGoneError:
            self._disconnect(line)
            return
        except Exception as error:  # a bug of the daemon must not end the guard of its targets
            answer = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        for left in fds:
            os.close(left)
        line.answers.append(answer)

    def _send(self) -> None:
        self._unsent = False
        for line in list(self._lines.values()):
            try:
                while line.answers:
                    channel.send(line.end, line.answers[0])
                    line.answers.popleft()
                if line is self._owner:
                    self._tell(line.end)
            except channel.PeerGoneError:
                self._disconnect(line)
            except OSError:  # the peer's queue is full, or too many descriptors are in flight
                self._unsent = True
        if self._owner is None:
            self._watch.gone.clear()
        if not self._stored.flush():
            self._unsent = True

    def _tell(self, end: socket.socket) -> None:
        news = self._watch.unannounced
        while news:
            fd, context = next(iter(news.items()))
            header = {"event": "context", "id": context.target, "key": context.key}
            fds: tuple[int, ...] = (fd,)
            if not context.key:
                header |= {"ranges": list(context.owed), "about": context.about}
                fds += (context.track,) if context.track >= 0 else ()
            channel.send(end, header, fds=fds)
            del news[fd]
        while self._untold:
            self._tell_extent(end, self._untold[-1])
            self._untold.pop()
        while self._watch.gone:
            keys = self._watch.gone[:_GONE_KEYS]
            channel.send(end, {"event": "gone", "keys": keys})
            del self._watch.gone[:_GONE_KEYS]

    def _tell_extent(self, end: socket.socket, inode: int) -> None:
        kept = self._keeper.extent(inode)
        if kept is not None:
            place = {"inode": inode, "offset": kept.offset, "length": kept.length}
            channel.send(end, {"event": "extent", "about": kept.about, **place}, fds=(kept.fd,))

    # verbs

    def _answer(self, line: _Line, header: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        """Do what a message says. What is left in *fds* will be closed."""
        match header["do"]:
            case "guard":
                self._guard(header, fds)
            case "extend" | "settle" as verb:
                self._change(verb, header)
            case "drop":
                self._watch.drop(header["id"])
            case "children":
                return {"children": self._watch.children(header["id"])}
            case "stats" | "sweep" as verb:
                return self._stats() if verb == "stats" else self._sweep()
            case "keep" | "release" | "rings" | "secret" as verb:
                self._keep(verb, header, fds)
            case "claim":
                return self._claim(line)
            case "quit" | "clear" as verb:
                self._empty(verb)
            case verb:
                raise ValueError(f"unknown: {verb!r}")
        return {}

    def _change(self, verb: str, header: dict[str, Any]) -> None:
        context = self._watch.root(header["id"])
        change = context.extend if verb == "extend" else context.settle
        for start, end in _ranges(header):
            change(start, end)
        self._stored.note(header)

    def _empty(self, verb: str) -> None:
        if verb == "clear":
            self._watch.clear()
        elif self._watch.live:
            raise ValueError(f"{self._watch.live} contexts are held")
        else:
            self._leaving = not self._standing
        self._let_all_go()

    def _keep(self, verb: str, header: dict[str, Any], fds: list[int]) -> None:
        if verb == "keep":
            place = {"offset": header["offset"], "length": header["length"]}
            about = dict(header.get("about", {}))
            inode = self._keeper.keep(fds[0], **place, about=about)
            kept = self._keeper.extent(inode)
            if kept is not None:
                self._stored.hold_extent(inode, kept.fd, place | {"about": about})
        elif verb == "release":
            self._stored.let_extent_go(header["inode"])
            self._keeper.release(header["inode"])
        elif verb == "secret":
            self._secret = str(header["key"])
            self._watch.reserve(header.get("children", 0))
            self._stored.note(header)
        else:
            self._keeper.hold_rings(header["pid"], dict(header["rings"]))

    def _guard(self, header: dict[str, Any], fds: list[int]) -> None:
        target, key = int(header["id"]), int(header.get("child", 0))
        fd, *rest = fds
        (track,) = rest or (-1,)
        if not key and self._watch.has_root(target):
            raise ValueError(f"{target} is guarded already")
        about = dict(header.get("about", {}))
        ranges = _ranges(header)
        self._watch.add(fd, target, key, ranges, track, about)
        fds.clear()
        if not key:
            self._stored.note({"do": "guard", "id": target, "ranges": ranges, "about": about})

    def _let_all_go(self) -> None:
        """Let everything go that is no context."""
        for inode in self._keeper:
            self._stored.let_extent_go(inode)
        self._keeper.clear()
        self._untold.clear()
        self._secret = ""
        self._stored.note({"do": "secret", "key": ""})

    def _everything(self) -> Iterator[Header]:
        """Give the messages that what is held comes to."""
        targets = ((one.target, one.owed, one.about) for one in self._watch.roots)
        extents = (
            (inode, [(offset, part[1]) for offset, part in kept.parts.items()], kept.about)
            for inode, kept in self._keeper.items()
        )
        return summary(self._watch.highest, self._secret, targets, extents)

    def _claim(self, line: _Line) -> dict[str, Any]:
        owner = self._owner
        if owner is not None and owner is not line:
            if not _hung_up(owner.end):
                raise ValueError("another daemon owns the pager")
            fd = owner.end.fileno()
            while self._lines.get(fd) is owner:  # what it said before it died comes first
                self._call(fd)
        self._owner = line
        self._watch.announce_all()
        self._untold = list(self._keeper)
        return {
            "pid": os.getpid(),
            "shadow": self._shadow,
            "version": __version__,
            "standing": self._standing,
            "secret": self._secret,
            "highest": self._watch.highest,
            "rings": list(self._keeper.rings.items()),
        }

    def _sweep(self) -> dict[str, int]:
        self._watch.sweep()
        return {"children": self._watch.live - self._watch.contexts}

    def _stats(self) -> dict[str, int]:
        watch, count = self._watch, self._watch.count
        return {
            "contexts": watch.contexts,
            "children": watch.live - watch.contexts,
            "faults": count.faults,
            "zeroed": count.zeroed,
            "woken": count.woken,
            "filled": count.filled,
            "forks": count.forks,
            "removes": count.removes,
            "remaps": count.remaps,
            "reaped": count.reaped,
            "starved": watch.starved,
            "extents": len(self._keeper),
            "untold": len(watch.unannounced) + len(self._untold),
            "fds": _fds(),
        }


def _hung_up(end: socket.socket) -> bool:
    """Tell whether the other process has closed its end, even if that was not read yet."""
    poll = select.poll()
    poll.register(end, 0)
    return bool(poll.poll(0))


def _fds() -> int:
    try:
        return len(os.listdir("/proc/self/fd")) - 1  # noqa: PTH208 - no pathlib in here
    except OSError:  # none is left to look with
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _shadow() -> tuple[int, list[str]]:
    try:
        return shadow.cast(), []
    except OSError as error:
        return 0, [f"cannot cast a shadow: {error}"]


def main(arguments: list[str]) -> int:
    """Run the pager on the channel whose descriptor is the first argument, or by itself."""
    first = arguments[0] if arguments else ""
    if len(arguments) not in (1, 2) or not (first.isdigit() or first == door.STANDING):
        print("usage: python -m ksmd.guard.pager FD|- [NAME]", file=sys.stderr)
        return 2
    if first == door.STANDING:
        inherited, _ = sdnotify.take_inherited(os.environ)
        inherited = [one._replace(fd=door.moved(one.fd)) for one in inherited]
        inner = door.build()
        shade, failed = _shadow()
        pager = Pager(inner, Stored(os.environ.pop("NOTIFY_SOCKET", ""), inherited), shade)
        pager.heed_term()
        for sentence in failed + settle.in_place():
            settle.complain(sentence)
        pager.stand("".join(arguments[1:]))
    else:
        fd = door.moved(int(first))
        inner = door.build()
        shade, failed = _shadow()
        pager = Pager(inner, shadow=shade)
        pager.serve(
            socket.socket(fileno=fd),
            failed + settle.in_place(signal.SIGTERM),
        )
    shadow.end(shade)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
