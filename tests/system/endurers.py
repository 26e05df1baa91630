"""Victims of endure.c, which do one thing for ever and note whatever is done to it."""

from __future__ import annotations

import atexit
import contextlib
import mmap
import os
import shutil
import struct
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path

from harness import PAGE, descriptors

from ksmd.kernel import procfs
from ksmd.remap.places import SCRATCH, SCRATCH_STEP, SCRATCH_TRIES

MODES = (
    "compute", "tiles", "nanosleep", "epoll", "futex", "pipe", "poll", "storm", "churn", "write",
    "drop", "fork",
)  # fmt: skip
#: No victim may stand still for so long, whoever is killed.
DEADLINE = 20.0
ARENA = 0x510000000000
_END = SCRATCH + SCRATCH_TRIES * SCRATCH_STEP


@cache
def binary() -> Path:
    """Build endure.c, once per session."""
    directory = Path(tempfile.mkdtemp(prefix="endurers-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    source = Path(__file__).parents[1] / "victims/endure.c"
    flags = "-std=gnu11 -D_GNU_SOURCE -O2 -Wall -Wextra -Werror -pthread".split()
    subprocess.run(["gcc", *flags, source, "-o", directory / "endure"], check=True)
    return directory / "endure"


class Endurer:
    """One victim. ``stall``: the longest time that it took to go on after a kill, in seconds.

    ``starved``: for how much of that one of its threads stood in line for a processor.
    """

    ROUNDS, WRONG, EINTRS, LATEST_US, LAST, READY = range(6)

    def __init__(self, mode: str, pages: int) -> None:
        self.mode = mode
        self.region = ARENA, pages
        self.stall = self.starved = 0.0
        self._control = os.memfd_create("endure-control")
        os.ftruncate(self._control, PAGE)
        self._words = mmap.mmap(self._control, PAGE)
        self._process = subprocess.Popen(
            # some keep all processors busy, and the daemon is to come to its windows
            ["nice", "-n", "15", binary(), str(self._control), mode, str(pages)],
            pass_fds=(self._control,),
        )
        self.pid = self._process.pid
        self._wait_for(self.READY, 1)
        self._descriptors = descriptors(self.pid)

    def word(self, index: int) -> int:
        """Read one word of its control block."""
        return int(struct.unpack_from("=Q", self._words, index * 8)[0])

    def _wait_for(self, index: int, value: int) -> None:
        deadline = time.monotonic() + DEADLINE
        while self.word(index) < value:
            code = self._process.poll()
            assert code is None, f"{self.mode}: it died: {code}"
            assert time.monotonic() < deadline, f"{self.mode}: it hangs: {self.where()}"
            time.sleep(0.0005)

    def where(self) -> str:
        """Tell what its threads, and those of its children, do."""
        lines = [f"fault or call {self.left()}"]
        for pid in (self.pid, *self.children()):
            for tid in procfs.tasks(pid):
                task = f"/proc/{pid}/task/{tid}"
                words = [Path(f"{task}/{name}").read_text() for name in ("syscall", "wchan")]
                lines.append(f"{tid}: {' '.join(words)}")
        return "\n".join(lines)

    def children(self) -> list[int]:
        """Give the pids of its children."""
        return [int(pid) for pid in self._task("children").split()]

    def _task(self, name: str) -> str:
        return Path(f"/proc/{self.pid}/task/{self.pid}/{name}").read_text()

    def must_be_well(self) -> None:
        """It goes on, and nothing of what it saw was wrong."""
        began, rounds, lines = time.monotonic(), self.word(self.ROUNDS), self._in_line()
        self._wait_for(self.ROUNDS, rounds + 3)
        if (stall := time.monotonic() - began) > self.stall:
            waits = [spent - lines.get(tid, 0.0) for tid, spent in self._in_line().items()]
            self.stall, self.starved = stall, max(waits, default=0.0)
        wrong, last = self.word(self.WRONG), self.word(self.LAST)
        assert not wrong, f"{self.mode}: {wrong} wrong results, the last was {last}"

    def _in_line(self) -> dict[int, float]:
        """Seconds that each thread has stood in line for a processor so far."""
        found = {}
        for tid in procfs.tasks(self.pid):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{self.pid}/task/{tid}/schedstat").read_text().split()
                found[tid] = int(words[1]) / 1e9
        return found

    def traced(self) -> bool:
        """Tell whether it stands in a stop window now."""
        return "TracerPid:\t0\n" not in self._task("status")

    def left(self) -> list[str]:
        """Name what a window has left in it: mappings, descriptors."""
        extra = set(descriptors(self.pid).items()) - set(self._descriptors.items())
        maps = [f"{v.start:#x}" for v in procfs.maps(self.pid) if SCRATCH <= v.start < _END]
        return maps + [f"fd {number}: {what}" for number, what in extra]

    def must_be_clean(self) -> None:
        """Nothing of ours is left in it, guards included."""
        deadline = time.monotonic() + DEADLINE
        while (left := self.left()) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not left, f"{self.mode}: {left}"
        watched = [v for v in procfs.smaps(self.pid) if v.flags & {"um", "ui", "uw"}]
        assert not watched, f"{self.mode}: {watched}"

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        self._words.close()
        os.close(self._control)
