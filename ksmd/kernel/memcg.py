"""Memory cgroups: how much a process may take before one of them is full.

What is merged is charged to whoever made the store, and no longer to the programs. So a program in
a group with a limit may have grown into the room that merging made: if all its pages came back
then, the kernel would kill it, or others in its group. File pages of the group are counted as room,
since the kernel takes them before it kills anybody; that anonymous memory could be swapped is not.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ksmd.kernel import cgroups, procfs
from ksmd.model.errors import TargetGoneError

#: What is left alone of a limit: so many bytes at the most, and one part in so many of it.
_RESERVE, _RESERVE_SHARE = 16 << 20, 64
#: A limit of version 1 that is none: the largest number of pages.
_NO_LIMIT = 1 << 62


@dataclass(frozen=True, slots=True)
class Limit:
    """A group with a limit: its folder, and in bytes the limit and what may still be taken."""

    folder: Path
    limit: int
    room: int

    def __str__(self) -> str:
        room, limit = max(0, self.room) >> 20, self.limit >> 20
        return f"memory cgroup {self.folder} has room for {room} MiB below its limit of {limit} MiB"


def limits(pid: int) -> list[Limit]:
    """Give the groups around *pid* that have a limit, the innermost first; none where it is gone.

    To ask takes some 15 us for each group, and as much again for files of one that is nearly full.
    """
    found = []
    try:
        groups = cgroups.groups_of(pid, "memory")
    except TargetGoneError:
        return []
    for group in groups:
        for folder in group.upwards:
            limit = _number(folder / ("memory.max" if group.v2 else "memory.limit_in_bytes"))
            if limit is not None and limit < _NO_LIMIT:
                room = limit - _taken(folder, v2=group.v2) - min(_RESERVE, limit // _RESERVE_SHARE)
                found.append(Limit(folder, limit, room))
    return found


def tightest(pid: int) -> Limit | None:
    """Give the group around *pid* that has the least room; None where nothing limits it."""
    return min(limits(pid), key=lambda one: one.room, default=None)


def lacking(needs: Mapping[int, int]) -> list[tuple[Limit, int]]:
    """Tell which groups have no room for what their processes need: *needs*, in bytes, by pid.

    Each comes with what is needed in it.
    """
    found: dict[Path, Limit] = {}
    needed: Counter[Path] = Counter()
    for pid, nbytes in needs.items():
        for one in limits(pid):
            found[one.folder] = one
            needed[one.folder] += nbytes
    return [(one, needed[path]) for path, one in found.items() if needed[path] > one.room]


def available() -> int:
    """Give the bytes of memory that we may take: the host's, or less where a group limits us."""
    ours = tightest(os.getpid())
    host = procfs.mem_available()
    return host if ours is None else min(host, ours.room)


def _taken(folder: Path, *, v2: bool) -> int:
    """Give the bytes that a group has taken and cannot give back at once."""
    taken = _number(folder / ("memory.current" if v2 else "memory.usage_in_bytes")) or 0
    prefix = "" if v2 else "total_"
    names = {f"{prefix}inactive_file", f"{prefix}active_file", "slab_reclaimable"}
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return taken
    pairs = (line.split() for line in lines)
    return taken - sum(int(pair[1]) for pair in pairs if len(pair) == 2 and pair[0] in names)


def _number(file: Path) -> int | None:
    """Read a file of one number; None where it says "max", or is not there."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None
