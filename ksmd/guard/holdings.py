"""What the daemon holds beside its pager: contexts of targets and of their children, and extents.

While the pager does not stand by itself, the daemon has its own service manager hold it too (see
stored.py): should all processes of its service be killed at once, the next daemon gets it from
there. A pager that stands by itself has a manager of its own, and then nothing is left with ours.

Every change goes by a method, so that the manager hears of it before the pager: what is merged was
stored before. Nothing here waits, or asks the pager.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from typing import Any

from ksmd.guard.held import Held, KeptExtent
from ksmd.guard.intervals import Intervals
from ksmd.guard.notes import Header, summary
from ksmd.guard.stored import Stored, children_among, extent_name, names
from ksmd.kernel import userfaultfd

Ranges = list[tuple[int, int]]


class Holdings:
    """Targets by id, children (id of the target, descriptor) by key, extents by inode.

    ``key`` is that of the extents' digests, ``highest`` the highest id ever used. An extent's
    descriptor stays with who gave it or has seen it in ``extents``; all others are ours to close.
    """

    def __init__(self) -> None:
        self.targets: dict[int, Held] = {}
        self.children: dict[int, tuple[int, int]] = {}
        self.extents: dict[int, KeptExtent] = {}
        self.key = secrets.token_bytes(32)
        self.highest = 0
        self._manager = Stored()
        self._stored = Stored()  # the manager, while it holds what we hold

    # the manager

    def recall(self, manager: Stored) -> Holdings:
        """Take what *manager* kept for the daemon before us and we do not hold; give that alone.

        From now on :meth:`store` is about this manager.
        """
        self._manager, self._stored = manager, Stored()
        noted, fds = manager.recall()
        found = Holdings()
        for inode, (about, parts) in noted.extents.items():
            fd = fds.get(extent_name(inode), -1)
            if fd >= 0 and inode not in self.extents:
                del fds[extent_name(inode)]
                length = sum(parts.values())
                found.extents[inode] = KeptExtent(inode, fd, min(parts), length, about)
        for target, (owed, about) in noted.targets.items():
            guard = fds.get(f"guard-{target}", -1)
            if guard >= 0 and target not in self.targets and not userfaultfd.is_dead(guard):
                del fds[f"guard-{target}"]
                found.targets[target] = Held(guard, owed, fds.pop(f"track-{target}", -1), about)
        for name, key, target in children_among(fds):
            if key not in self.children and not userfaultfd.is_dead(fds[name]):
                found.children[key] = target, fds.pop(name)
        for fd in fds.values():  # held already, or of a process that has ended
            os.close(fd)
        if found.targets or found.extents:
            found.key = bytes.fromhex(noted.secret) or found.key
        self.targets |= found.targets
        self.children |= found.children
        self.extents |= found.extents
        self.highest = max(self.highest, noted.highest)
        return found

    def store(self, wanted: bool) -> None:
        """Have the manager hold exactly what we hold, or nothing."""
        if wanted:
            self._stored = self._manager
            self._stored.all = self._everything
            self._stored.begin(self._named())
        else:
            self._stored = Stored()
            self._manager.end()
        self._manager.flush()

    def flush(self) -> None:
        """Tell the manager what it could not take before."""
        self._manager.flush()

    def _named(self) -> dict[str, int]:
        named = {extent_name(inode): kept.fd for inode, kept in self.extents.items()}
        for target, held in self.targets.items():
            named |= names(target, held.fd, held.track)
        for key, (target, fd) in self.children.items():
            named |= names(target, fd, key=key)
        return named

    def _everything(self) -> Iterator[Header]:
        targets = ((target, held.owed, held.about) for target, held in self.targets.items())
        extents = (
            (inode, [(kept.offset, kept.length)], kept.about)
            for inode, kept in self.extents.items()
        )
        return summary(self.highest, self.key.hex(), targets, extents)

    # changes

    def set_key(self, key: bytes) -> None:
        """Use this key for the digests of extents."""
        self.key = key
        self._stored.note({"do": "secret", "key": key.hex()})

    def add_target(self, target: int, held: Held) -> None:
        """Hold a target's contexts."""
        self.targets[target] = held
        self.highest = max(self.highest, target)
        note = {"do": "guard", "id": target, "ranges": list(held.owed), "about": held.about}
        self._stored.note(note)
        self._stored.store(names(target, held.fd, held.track))
        self.flush()

    def drop_target(self, target: int) -> None:
        """Let a target's contexts go. Unknown ids are no error."""
        held = self.targets.pop(target, None)
        if held is not None:
            self._stored.forget(names(target, held.fd, held.track))
            self._stored.note({"do": "drop", "id": target})
            held.close()
            self.flush()

    def announce(self, target: int, ranges: Ranges) -> None:
        """Note ranges that are about to be merged. KeyError."""
        for start, end in ranges:
            self.targets[target].owed.add(start, end)
        self._stored.note({"do": "extend", "id": target, "ranges": ranges})

    def settle(self, target: int, ranges: Ranges) -> None:
        """Note that nothing is under way in these ranges. KeyError."""
        for start, end in ranges:
            self.targets[target].owed.remove(start, end)
        self._stored.note({"do": "settle", "id": target, "ranges": ranges})

    def add_extent(self, extent: KeptExtent) -> None:
        """Hold an extent."""
        self.extents[extent.inode] = extent
        part = {"offset": extent.offset, "length": extent.length, "about": extent.about}
        self._stored.hold_extent(extent.inode, extent.fd, part)
        self.flush()

    def drop_extent(self, inode: int) -> KeptExtent | None:
        """Let an extent go; its descriptor is the caller's to close."""
        extent = self.extents.pop(inode, None)
        if extent is not None:
            self._stored.let_extent_go(inode)
            self.flush()
        return extent

    def add_child(self, fd: int) -> None:
        """Hold the context of a child of nobody knows whom: the guard need not know."""
        key = max(self.children, default=0) + 1
        self.children[key] = 0, fd
        self._stored.store(names(0, fd, key=key))
        self.flush()

    def drop_child(self, key: int) -> None:
        """Let a child's context go."""
        child = self.children.pop(key, None)
        if child is not None:
            target, fd = child
            self._stored.forget(names(target, fd, key=key))
            os.close(fd)
            self.flush()

    def take(self, news: dict[str, Any], fds: list[int]) -> None:
        """Take in what the pager tells, its answers too; *fds* are ours from then on."""
        match news.get("event"):
            case "context":
                self._take_context(news, fds)
            case "extent":
                place = {name: news[name] for name in ("inode", "offset", "length", "about")}
                if news["inode"] in self.extents:  # as in _take_context
                    os.close(fds[0])
                else:
                    self.add_extent(KeptExtent(fd=fds[0], **place))
            case "gone":
                for key in news["keys"]:
                    self.drop_child(key)

    def _take_context(self, news: dict[str, Any], fds: list[int]) -> None:
        target, key = int(news["id"]), int(news["key"])
        fd, *rest = fds
        if key:
            self.drop_child(key)
            self.children[key] = target, fd
            self._stored.store(names(target, fd, key=key))
            self.flush()
            return
        ranges = [(start, end) for start, end in news["ranges"]]
        held = Held(fd, Intervals(ranges), rest[0] if rest else -1, news["about"])
        if target in self.targets:  # an owner that claims what it has, and knows it better
            held.close()
        else:
            self.add_target(target, held)

    # the end

    def let_go(self) -> None:
        """Close the contexts here; the manager keeps what it has."""
        self.flush()
        self._manager = self._stored = Stored()
        for held in self.targets.values():
            held.close()
        for _, fd in self.children.values():
            os.close(fd)
        self.targets.clear()
        self.children.clear()

    def close_extents(self) -> None:
        """Close the descriptors of extents."""
        for extent in self.extents.values():
            os.close(extent.fd)
