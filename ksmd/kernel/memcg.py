"""Memory cgroups: how much a process may take before one of them is full.

What is merged is charged to whoever made the store, and no longer to the programs. So a program in
a group with a limit may have grown into the room that merging made: if all its pages came back
then, the kernel would kill it, or others in its group. File pages of the group are counted as room,
since the kernel takes them before it kills anybody; that anonymous memory could be swapped is not.

Above memory.high nobody is killed, but the kernel has threads wait that take more, for up to two
seconds: in a stop window that would be the whole program. So it counts as a limit for what is given
back, and not for merging, which is what helps then.
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
    """A limit of a group: the file that says it, and in bytes the limit and what is left of it."""

    file: Path
    limit: int
    room: int

    @property
    def folder(self) -> Path:
        """The group's."""
        return self.file.parent

    def __str__(self) -> str:
        room, limit = max(0, self.room) >> 20, self.limit >> 20
        return (
            f"memory cgroup {self.folder} has room for {room} MiB below its limit of {limit} MiB"
            f" ({self.file.name})"
        )


def limits(pid: int, *, hard: bool = False) -> list[Limit]:
    """Give the limits of the groups around *pid*, the innermost first; none where it is gone.

    *hard*: those only at which the kernel kills. To ask takes some 15 us for each group, and as
    much again for each that has a limit.
    """
    found = []
    try:
        groups = cgroups.groups_of(pid, "memory")
    except TargetGoneError:
        return []
    for group in groups:
        names = _names(group.v2, hard)
        for file in (folder / name for folder in group.upwards for name in names):
            limit = _number(file)
            if limit is not None and limit < _NO_LIMIT:
                reserve = min(_RESERVE, limit // _RESERVE_SHARE)
                found.append(Limit(file, limit, limit - _taken(file.parent, group.v2) - reserve))
    return found


def _names(v2: bool, hard: bool) -> tuple[str, ...]:
    """Name the files that have limits."""
    if not v2:
        return ("memory.limit_in_bytes",)
    return ("memory.max",) if hard else ("memory.max", "memory.high")


def tightest(pid: int, *, hard: bool = False) -> Limit | None:
    """Give the limit around *pid* that leaves the least room; None where there is none."""
    return min(limits(pid, hard=hard), key=lambda one: one.room, default=None)


def lacking(needs: Mapping[int, int]) -> list[tuple[Limit, int]]:
    """Tell which limits leave no room for what processes need: *needs*, in bytes, by pid.

    Each comes with what is needed below it. Who needs nothing finds room in a group that is full.
    """
    found: dict[Path, Limit] = {}
    needed: Counter[Path] = Counter()
    for pid, nbytes in needs.items():
        for one in limits(pid):
            found[one.file] = one
            needed[one.file] += nbytes
    return [(one, needed[file]) for file, one in found.items() if needed[file] > max(0, one.room)]


def available() -> int:
    """Give the bytes of memory that we may take: the host's, or less where a group limits us.

    Or less where it keeps its promises: who maps the store keeps those that it had, and the store
    needs its own.
    """
    ours, promised = tightest(os.getpid()), procfs.may_be_promised()
    bounds = [procfs.mem_available(), promised, None if ours is None else ours.room]
    return min(bound for bound in bounds if bound is not None)


def _taken(folder: Path, v2: bool) -> int:
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
