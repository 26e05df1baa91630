"""What the service manager keeps for who holds the guard: the third holder beside pager and daemon.

A guard ends with the last descriptor of its context. Pager and daemon hold each twice, and one of
them also stores it with the service manager (FDSTORE=1, sd_notify(3)): a pager that stands by
itself with that of ksmd-pager.service, else the daemon with its own (see holdings.py). So should
all processes be killed at once, the guard stands, targets that touch dropped memory wait, and who
is started next takes everything back, asking nobody.

Descriptors are stored under names that say what they are. What they do not say (labels, ranges that
are announced) is in the *notes*: the messages that brought it, in memory files that are stored too.
Pins are not among it, for SCM_RIGHTS passes no io_uring: the next daemon gives back what has lost
them.

One class, which does nothing where no manager listens. Nothing here waits. What does not fit into
FileDescriptorStoreMax= the manager closes, and says so in the unit's journal.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping

from ksmd.guard.context import Context
from ksmd.guard.keeper import Keeper
from ksmd.guard.notes import FILES, Header, Noted, Notes
from ksmd.guard.settle import complain
from ksmd.guard.watch import Watch
from ksmd.kernel import sdnotify
from ksmd.kernel.sdnotify import Inherited

#: The manager's queue is full, or too many descriptors are on their way.
_LATER = frozenset({errno.EAGAIN, errno.ENOBUFS, errno.ETOOMANYREFS})


class Stored:
    """The descriptors and notes at the manager behind *address*; "" stands for no manager.

    *say* is called with what an operator should know.
    """

    def __init__(
        self,
        address: str = "",
        inherited: Iterable[Inherited] = (),
        say: Callable[[str], None] = complain,
    ) -> None:
        self._address = address
        self._say = say
        self._queue: deque[tuple[str, int]] = deque()
        self._earlier = {one.name: one.fd for one in inherited}
        #: Names that the manager knows, or will when it has all that we have to say.
        self._there = set(self._earlier)
        self._files: list[int] = []
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
        self.store(_names(context))

    def let_go(self, context: Context) -> None:
        """Have a context closed that is held no more."""
        self.forget(_names(context))
        if not context.key:
            self.note({"do": "drop", "id": context.target})

    def hold_extent(self, inode: int, fd: int, part: Header) -> None:
        """Store an extent of which a part is kept from now on; a second time for its next part."""
        self.note({"do": "keep", "inode": inode} | part)
        self.store({extent_name(inode): fd})

    def let_extent_go(self, inode: int) -> None:
        """Have an extent closed."""
        self.forget([extent_name(inode)])
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
        except OSError as error:
            self._give_notes_up(error)

    def _give_notes_up(self, error: OSError) -> None:
        # out of memory: the guard goes on, and notes with gaps are none
        self._say(f"no notes any more: {error}")
        self._drop_notes()

    def _drop_notes(self) -> None:
        self.forget([name for name in FILES if name in self._there])
        for fd in self._files:
            os.close(fd)
        self._notes, self._files = None, []

    def flush(self) -> bool:
        """Send what the manager did not take yet; tell whether it has all."""
        while self._queue:
            text, fd = self._queue[0]
            try:
                sdnotify.send(self._address, text, fd, seconds=0)
            except OSError as error:
                if error.errno in _LATER:
                    return False
                self._say(f"the service manager was not told {text.partition(chr(10))[0]}: {error}")
            self._queue.popleft()
        return True

    def store(self, named: Mapping[str, int]) -> None:
        """Store descriptors, each of which has its name once and for all."""
        for name, fd in named.items():
            if self._address and name not in self._there:
                self._there.add(name)
                self._queue.append((sdnotify.store(name), fd))

    def forget(self, names: Iterable[str]) -> None:
        """Have these closed. What waits to be sent has a descriptor that is about to be closed."""
        for name in names:
            if self._address:
                self._there.discard(name)
                text = sdnotify.store(name)
                self._queue = deque(one for one in self._queue if one[0] != text)
                self._queue.append((sdnotify.forget(name), -1))

    # the start and the end

    def recall(self) -> tuple[Noted, dict[str, int]]:
        """Give what the manager kept for who was before us: what notes say, and descriptors.

        These are the caller's, who tells by :meth:`begin` what of it is held further.
        """
        fds, self._earlier = self._earlier, {}
        self._files = [fds.pop(name) for name in FILES if name in fds]
        if len(self._files) == len(FILES):
            return Noted(Notes(self._files).read()), fds
        self._drop_notes()
        return Noted(), fds

    def begin(self, held: Mapping[str, int]) -> None:
        """Hold what *held* names and nothing else, and note from now on."""
        if not self._address:
            return
        self.forget(self._there - set(held) - set(FILES))
        try:
            self._notes = Notes(self._files)
            self._files = self._notes.fds
            self._notes.rewrite(self.all())
        except OSError as error:
            self._give_notes_up(error)
        self.store(dict(zip(FILES, self._files, strict=False)))
        self.store(held)

    def end(self) -> None:
        """Hold nothing any more: another does."""
        self._drop_notes()
        self.forget(set(self._there))

    def restore(self, watch: Watch, keeper: Keeper, *, discard: bool = False) -> Noted:
        """Take back what the manager kept for a pager before us; from now on things are noted.

        *discard*: have it closed instead, for another pager holds it.
        """
        noted, fds = self.recall()
        if discard:
            noted = Noted()
        # first what keeps the store in place, then who answers faults on it
        for inode, (about, parts) in noted.extents.items():
            if (fd := fds.pop(extent_name(inode), -1)) >= 0:
                try:
                    for offset, length in parts.items():
                        keeper.keep(fd, offset, length, about)
                except OSError as error:  # who maps it must be guarded in any case
                    self._say(f"part of an extent is not locked: {error}")
                os.close(fd)
        for target, (owed, about) in noted.targets.items():
            guard, track = (fds.pop(f"{kind}-{target}", -1) for kind in ("guard", "track"))
            if not _taken(watch, guard, (target, 0), owed, track, about):
                _close(track)
        for name, key, root in [] if discard else children_among(fds):
            _taken(watch, fds.pop(name), (root, key))
        watch.highest = max(watch.highest, noted.highest)
        for fd in fds.values():  # let go of, and the manager did not hear it
            os.close(fd)
        held = {extent_name(inode): kept.fd for inode, kept in keeper.items()}
        for context in watch:
            held |= _names(context)
        self.begin(held)
        return noted


def names(target: int, fd: int, track: int = -1, key: int = 0) -> dict[str, int]:
    """Name the descriptors of a context: a target's, or with its *key* that of a child."""
    if key:
        return {f"child-{key}-{target}": fd}
    named = {f"guard-{target}": fd}
    if track >= 0:
        named[f"track-{target}"] = track
    return named


def extent_name(inode: int) -> str:
    """Name the descriptor of an extent."""
    return f"extent-{inode}"


def children_among(kept: Iterable[str]) -> list[tuple[str, int, int]]:
    """Find the contexts of children: name, key, id of the target."""
    found = []
    for name in kept:
        if name.startswith("child-"):
            key, root = name.split("-")[1:]
            found.append((name, int(key), int(root)))
    return found


def _names(context: Context) -> dict[str, int]:
    return names(context.target, context.fd, context.track, context.key)


def _taken(
    watch: Watch,
    fd: int,
    whose: tuple[int, int],
    owed: Iterable[tuple[int, int]] = (),
    track: int = -1,
    about: Header | None = None,
) -> bool:
    """Have *watch* take a context over; False, and it is closed, when it is none."""
    if fd >= 0:
        with contextlib.suppress(OSError):
            watch.add(fd, *whose, owed, track, about)
            return True
    _close(fd)
    return False


def _close(fd: int) -> None:
    if fd >= 0:
        os.close(fd)
