"""What the service manager keeps for a pager that is a service of its own (ksmd-pager.service).

A guard ends with the last descriptor of its context. Pager and daemon hold each twice, and a pager
that stands by itself also stores it with the service manager (FDSTORE=1, sd_notify(3)): so should
both be killed at once, the guard stands, targets that touch dropped memory wait, and the next pager
takes everything back, asking nobody.

Descriptors are stored under names that say what they are. What they do not say (labels, ranges that
are announced) is in the *notes*: the messages that brought it, in memory files that are stored too.
Pins are not among it, for SCM_RIGHTS passes no io_uring: the next daemon gives back what has lost
them.

One class, which does nothing where no manager listens. Nothing here waits.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from ksmd.guard.context import Context
from ksmd.guard.intervals import Intervals
from ksmd.guard.keeper import Keeper
from ksmd.guard.settle import complain
from ksmd.guard.watch import Watch
from ksmd.kernel import sdnotify
from ksmd.kernel.sdnotify import Inherited

#: Bytes of notes after which they are written anew, from what is held by then.
REWRITE = 1 << 20

#: The manager's queue is full, or too many descriptors are on their way.
_LATER = frozenset({errno.EAGAIN, errno.ENOBUFS, errno.ETOOMANYREFS})
_HEAD = 8  # bytes of the generation
_FILES = ("notes-0", "notes-1")

Header = dict[str, Any]


class Notes:
    """Messages in two files, of which the one with the higher generation counts.

    To write them anew is to fill the other file, and to give it its generation last: whoever dies
    in the middle leaves the old ones.
    """

    def __init__(self, fds: Sequence[int] = ()) -> None:
        self.fds = list(fds) or [os.memfd_create("ksmd-notes", os.MFD_CLOEXEC) for _ in _FILES]
        numbers = [int.from_bytes(os.pread(fd, _HEAD, 0), "little") for fd in self.fds]
        self._generation = max(numbers)
        self._active = numbers.index(self._generation)
        self._end = max(_HEAD, os.fstat(self.fds[self._active]).st_size)
        self._limit = REWRITE

    @property
    def long(self) -> bool:
        """Whether they should be written anew."""
        return self._end > self._limit

    def append(self, header: Header) -> None:
        """Note one message."""
        self._end += os.pwrite(self.fds[self._active], _line(header), self._end)

    def rewrite(self, headers: Iterable[Header]) -> None:
        """Replace all notes by *headers*."""
        other = 1 - self._active
        data = b"".join(map(_line, headers))
        os.ftruncate(self.fds[other], 0)
        os.pwrite(self.fds[other], data, _HEAD)
        self._generation += 1
        os.pwrite(self.fds[other], self._generation.to_bytes(_HEAD, "little"), 0)
        self._active, self._end = other, _HEAD + len(data)
        self._limit = max(REWRITE, 2 * self._end)

    def read(self) -> Iterator[Header]:
        """Give what was noted, up to the end or to a line that was never finished."""
        data = os.pread(self.fds[self._active], self._end - _HEAD, _HEAD)
        for line in data.splitlines():
            try:
                header = json.loads(line)
            except ValueError:
                return
            yield header


def _line(header: Header) -> bytes:
    return json.dumps(header, separators=(",", ":")).encode() + b"\n"


class Noted:
    """What a sequence of messages comes to."""

    def __init__(self, headers: Iterable[Header] = ()) -> None:
        self.secret = ""
        self.highest = 0
        self.targets: dict[int, tuple[Intervals, Header]] = {}
        self.extents: dict[int, tuple[Header, dict[int, int]]] = {}
        for header in headers:
            self._take(header)

    def _take(self, header: Header) -> None:
        match header["do"]:
            case "guard":
                self.highest = max(self.highest, header["id"])
                owed = Intervals((start, end) for start, end in header["ranges"])
                self.targets[header["id"]] = owed, header["about"]
            case "extend" | "settle" as verb if header["id"] in self.targets:
                owed, _ = self.targets[header["id"]]
                change = owed.add if verb == "extend" else owed.remove
                for start, end in header["ranges"]:
                    change(start, end)
            case "drop":
                self.targets.pop(header["id"], None)
            case "keep":
                about = header["about"]
                _, parts = self.extents.setdefault(header["inode"], (about, {}))
                parts[header["offset"]] = header["length"]
            case "release":
                self.extents.pop(header["inode"], None)
            case "secret":
                self.secret = header["key"]
            case "highest":
                self.highest = max(self.highest, header["id"])


class Stored:
    """The descriptors and notes at the manager behind *address*; "" stands for no manager."""

    def __init__(self, address: str = "", inherited: Iterable[Inherited] = ()) -> None:
        self._address = address
        self._queue: deque[tuple[str, int]] = deque()
        self._earlier = {one.name: one.fd for one in inherited}
        self._notes: Notes | None = None
        #: Gives the messages that what is held now comes to.
        self.all: Callable[[], Iterable[Header]] = lambda: ()

    @property
    def guards(self) -> list[int]:
        """The targets' own contexts that the manager kept for a pager before us."""
        return [fd for name, fd in self._earlier.items() if name.startswith("guard-")]

    # what changes

    def ready(self) -> None:
        """Say that we serve."""
        if self._address:
            self._queue.append(("READY=1", -1))
            self.flush()

    def hold(self, context: Context) -> None:
        """Store a context that is held from now on."""
        for name, fd in _names(context).items():
            self._store(name, fd)

    def let_go(self, context: Context) -> None:
        """Have a context closed that is held no more."""
        for name in _names(context):
            self._forget(name)
        if not context.key:
            self.note({"do": "drop", "id": context.target})

    def hold_extent(self, inode: int, fd: int, part: Header) -> None:
        """Store an extent of which a part is kept from now on; a second time for its next part."""
        self.note({"do": "keep", "inode": inode} | part)
        self._store(f"extent-{inode}", fd)

    def let_extent_go(self, inode: int) -> None:
        """Have an extent closed."""
        self._forget(f"extent-{inode}")
        self.note({"do": "release", "inode": inode})

    def note(self, header: Header) -> None:
        """Note a message that changed what is held."""
        if self._notes is None:
            return
        try:
            if self._notes.long:
                self._notes.rewrite(self.all())
            else:
                self._notes.append(header)
        except OSError as error:  # out of memory: the guard goes on, and notes with gaps are none
            complain(f"no notes any more: {error}")
            self._notes = None
            for name in _FILES:
                self._forget(name)

    def flush(self) -> bool:
        """Send what the manager did not take yet; tell whether it has all."""
        while self._queue:
            text, fd = self._queue[0]
            try:
                sdnotify.send(self._address, text, fd, seconds=0)
            except OSError as error:
                if error.errno in _LATER:
                    return False
                complain(f"the service manager was not told {text.partition(chr(10))[0]}: {error}")
            self._queue.popleft()
        return True

    def _store(self, name: str, fd: int) -> None:
        if self._address:
            self._queue.append((sdnotify.store(name), fd))

    def _forget(self, name: str) -> None:
        if self._address:
            # what waits to be sent has a descriptor that is about to be closed
            text = sdnotify.store(name)
            self._queue = deque(one for one in self._queue if one[0] != text)
            self._queue.append((sdnotify.forget(name), -1))

    # the start

    def restore(self, watch: Watch, keeper: Keeper, *, discard: bool = False) -> Noted:
        """Take back what the manager kept for a pager before us; from now on things are noted.

        *discard*: have it closed instead, for another pager holds it.
        """
        if not self._address:
            return Noted()
        fds, self._earlier = self._earlier, {}
        files = [fds.pop(name) for name in _FILES if name in fds]
        whole = len(files) == len(_FILES)
        noted = Noted(Notes(files).read() if whole and not discard else ())
        # first what keeps the store in place, then who answers faults on it
        for inode, (about, parts) in noted.extents.items():
            if (fd := fds.pop(f"extent-{inode}", -1)) >= 0:
                try:
                    for offset, length in parts.items():
                        keeper.keep(fd, offset, length, about)
                except OSError as error:  # who maps it must be guarded in any case
                    complain(f"part of an extent is not locked: {error}")
                os.close(fd)
        for target, (owed, about) in noted.targets.items():
            guard, track = fds.pop(f"guard-{target}", -1), fds.pop(f"track-{target}", -1)
            if not _taken(watch, guard, (target, 0), owed, track, about):
                _close(track)
        children = [name for name in fds if name.startswith("child-") and not discard]
        for name in children:
            key, root = name.split("-")[1:]
            _taken(watch, fds.pop(name), (int(root), int(key)))
        watch.highest = max(watch.highest, noted.highest)
        for name, fd in fds.items():  # let go of, and the manager did not hear it
            os.close(fd)
            self._forget(name)
        self._notes = Notes(files if whole else ())
        self._notes.rewrite(self.all())
        if not whole:
            for name, fd in zip(_FILES, self._notes.fds, strict=True):
                self._store(name, fd)
        return noted


def _names(context: Context) -> dict[str, int]:
    if context.key:
        return {f"child-{context.key}-{context.target}": context.fd}
    named = {f"guard-{context.target}": context.fd}
    if context.track >= 0:
        named[f"track-{context.target}"] = context.track
    return named


def _taken(
    watch: Watch,
    fd: int,
    whose: tuple[int, int],
    owed: Iterable[tuple[int, int]] = (),
    track: int = -1,
    about: Header | None = None,
) -> bool:
    """Have *watch* take a context over; False, and it is closed, when its process is gone."""
    if fd >= 0:
        with contextlib.suppress(OSError):
            watch.add(fd, *whose, owed, track, about)
            return True
    _close(fd)
    return False


def _close(fd: int) -> None:
    if fd >= 0:
        os.close(fd)
