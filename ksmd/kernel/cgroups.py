"""Where a process stands in the trees of control groups, of version 1 and of version 2.

/proc/PID/cgroup names its group in each tree, and mountinfo where we see that tree. A group that we
do not see (ours is another cgroup namespace, or nothing is mounted) has no folder here.
"""

from __future__ import annotations

import functools
import os
import time
from dataclasses import dataclass
from pathlib import Path

from ksmd.kernel import procfs

#: Seconds for which the mounts are taken to be what they were.
_MOUNTS_LAST = 10.0


@dataclass(frozen=True, slots=True)
class Group:
    """The group of a process in one tree: its ``folder``, and the ``top`` that we see of the tree.

    ``v2``: of version 2, where all controllers have one tree.
    """

    folder: Path
    top: Path
    v2: bool

    @property
    def upwards(self) -> list[Path]:
        """The folders of the group and of those around it, the outermost last."""
        above = [one for one in self.folder.parents if one.is_relative_to(self.top)]
        return [self.folder, *above]


def groups_of(pid: int, controller: str) -> list[Group]:
    """Give where *pid* stands in the trees that have *controller*, or may have. TargetGoneError."""
    found = []
    mounts = _mounts(int(time.monotonic() / _MOUNTS_LAST))
    for line in os.fsdecode(procfs.read_process(pid, "cgroup")).split("\n"):
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        v2 = number == "0" and not controllers
        if not v2 and controller not in controllers.split(","):
            continue
        for kind, options, root, point in mounts:
            if (kind == "cgroup2") != v2 or (not v2 and controller not in options.split(",")):
                continue
            inside = path[len(root) :] if root != "/" and path.startswith(root) else path
            found.append(Group(Path(point) / inside.lstrip("/"), Path(point), v2))
    return found


@functools.lru_cache(maxsize=1)
def _mounts(_when: int) -> list[tuple[str, str, str, str]]:
    """Give (file system, options, root, mount point) of every cgroup mount that we see."""
    found = []
    for line in os.fsdecode(procfs.read_file("/proc/self/mountinfo", "mountinfo")).split("\n"):
        left, dash, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if dash and len(fields) >= 5 and len(kind) >= 3 and kind[0].startswith("cgroup"):
            found.append((kind[0], kind[2], fields[3], fields[4]))
    return found
