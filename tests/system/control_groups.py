"""Control groups of our own, of whichever version has the controller on this host."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import until

from ksmd.kernel import cgroups


class ControlGroup:
    """One group. Its files have other names in each version."""

    def __init__(self, folder: Path, v2: bool) -> None:
        self.folder, self.v2 = folder, v2

    def file(self, v1: str, v2: str) -> Path:
        """Name a file."""
        return self.folder / (v2 if self.v2 else v1)

    def put(self, pid: int) -> None:
        """Move a process into it; what it takes from then on is charged here."""
        (self.folder / "cgroup.procs").write_text(str(pid))


@contextlib.contextmanager
def made_group(controller: str, name: str) -> Iterator[ControlGroup]:
    """Make a group for *controller*; when the block ends, its processes must end soon."""
    for group in cgroups.groups_of(os.getpid(), controller):
        if group.v2 and controller not in (group.top / "cgroup.controllers").read_text().split():
            continue  # a hybrid host: version 1 has it
        if group.v2:
            (group.top / "cgroup.subtree_control").write_text(f"+{controller}")
        folder = group.top / f"ksmd-test-{os.getpid()}-{name}"
        folder.mkdir()
        break
    else:
        pytest.fail(f"no {controller} controller is mounted")
    try:
        yield ControlGroup(folder, group.v2)
    finally:
        until(lambda: not (folder / "cgroup.procs").read_text(), "the group is empty")
        until(lambda: _removed(folder), "the group is gone")


def _removed(folder: Path) -> bool:
    with contextlib.suppress(OSError):  # busy for a moment, after its last process has ended
        folder.rmdir()
    return not folder.exists()
