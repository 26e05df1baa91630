"""Notes of what descriptors do not say, in memory files that a service manager keeps beside them.

They are the messages that brought what is held (see pager.py): read in their order by the next
holder, they come to what is held now.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ksmd.guard.intervals import Intervals

#: Bytes of notes after which they are written anew, from what is held by then.
REWRITE = 1 << 20

#: What the two files are called where they are kept.
FILES = ("notes-0", "notes-1")

_HEAD = 8  # bytes of the generation

Header = dict[str, Any]


class Notes:
    """Messages in two files, of which the one with the higher generation counts.

    To write them anew is to fill the other file, and to give it its generation last: whoever dies
    in the middle leaves the old ones.
    """

    def __init__(self, fds: Sequence[int] = ()) -> None:
        self.fds = list(fds) or [os.memfd_create("ksmd-notes", os.MFD_CLOEXEC) for _ in FILES]
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


def summary(
    highest: int,
    key: str,
    targets: Iterable[tuple[int, Iterable[tuple[int, int]], Header]],
    extents: Iterable[tuple[int, Iterable[tuple[int, int]], Header]],
) -> Iterator[Header]:
    """Give the messages that what is held comes to.

    *targets*: id, announced ranges, label. *extents*: inode, parts (offset, length), label.
    """
    yield {"do": "highest", "id": highest}
    yield {"do": "secret", "key": key}
    for target, owed, about in targets:
        yield {"do": "guard", "id": target, "ranges": list(owed), "about": about}
    for inode, parts, about in extents:
        for offset, length in parts:
            part = {"offset": offset, "length": length, "about": about}
            yield {"do": "keep", "inode": inode} | part
