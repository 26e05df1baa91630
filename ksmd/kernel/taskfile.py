"""A file of /proc/PID/task/TID that stays open: the way :mod:`ksmd.kernel` looks into a process.

Memory, page map and mappings are tied to the memory the file was opened on: after exit or execve
they tell of nothing, and never of a later owner of the pid.
"""

from __future__ import annotations

import os
from types import TracebackType
from typing import Self

from ksmd.kernel import procfs


class TaskFile:
    """The file *name* of *pid*, opened through task *tid*; close it, or use it in a ``with``.

    *tid*: a task that is known to live; one is looked for when None. Raises TargetGoneError, and
    PrivilegeError without the right to trace the process.
    """

    def __init__(
        self, pid: int, name: str, *, tid: int | None = None, flags: int = os.O_RDONLY
    ) -> None:
        self.pid = pid
        self.tid = procfs.live_tid(pid) if tid is None else tid
        try:
            self._fd = os.open(procfs.task_path(pid, name, self.tid), flags | os.O_CLOEXEC)
        except OSError as error:
            raise procfs.translate(error, f"process {pid}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; a second close does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
