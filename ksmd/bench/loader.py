"""A real worker: loads a file of weights with numpy, holds scratch memory of its own, and waits.

``python -m ksmd.bench.loader FILE NUMBER SCRATCH_MIB`` speaks the protocol of worker.c over its
arrays, except that reads are not timed: Python's own time would drown them.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ksmd.kernel import libc
from ksmd.model.units import PAGE_SHIFT, PAGE_SIZE

_MADV_MERGEABLE = 12
_GAP_NS = 20_000
_PAUSE_NS = 100_000

Array = NDArray[np.uint64]


class Spinner(threading.Thread):
    """Looks at the clock all the time; ``gaps`` in nanoseconds, waits for a CPU taken out."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.gaps: list[int] = []
        self.spinning = True

    def run(self) -> None:
        """Spin until told to be still."""
        own = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat")
        waited = int(own.read_text().split()[1])
        last = time.monotonic_ns()
        while self.spinning:
            now = time.monotonic_ns()
            if now - last >= _GAP_NS:
                delay = int(own.read_text().split()[1])
                gap = now - last - (delay - waited)
                waited = delay
                if gap >= _PAUSE_NS:
                    self.gaps.append(gap)
                now = time.monotonic_ns()
            last = now


class Worker:
    """The arrays and what is done with them."""

    def __init__(self, file: Path, number: int, scratch_mib: int) -> None:
        self.weights = np.load(file).view(np.uint64)
        random = np.random.default_rng(number)
        self.scratch = random.integers(0, 1 << 63, scratch_mib << 17, dtype=np.uint64)
        self.spinner: Spinner | None = None

    def ranges(self) -> list[tuple[int, int]]:
        """Address and number of the whole pages of each array."""
        found = []
        for array in (self.weights, self.scratch):
            start = -(-array.ctypes.data // PAGE_SIZE) * PAGE_SIZE
            end = array.ctypes.data + array.nbytes
            found.append((start, (end - start) >> PAGE_SHIFT))
        return found

    def answer(self, words: list[str]) -> str:
        """Carry one command out."""
        match words:
            case ["mergeable"]:
                for start, npages in self.ranges():
                    libc.madvise(start, npages << PAGE_SHIFT, _MADV_MERGEABLE)
                return "ok"
            case ["read", _]:
                return "ok"
            case ["write", count, seed]:
                return self._write(int(count), int(seed))
            case ["spin"]:
                self.spinner = Spinner()
                self.spinner.start()
                return "ok"
            case ["still"] if self.spinner is not None:
                self.spinner.spinning = False
                self.spinner.join()
                return "ok pauses=" + ",".join(map(str, self.spinner.gaps))
        return "no such command"

    def _write(self, count: int, seed: int) -> str:
        words = PAGE_SIZE // 8
        places = np.random.default_rng(seed).permutation(self.weights.size // words)[:count] * words
        began = time.monotonic_ns()
        self.weights[places] = np.arange(places.size, dtype=np.uint64) + np.uint64(seed)
        spent = (time.monotonic_ns() - began) / max(1, places.size)
        return f"ok ns={spent:.1f} pages={places.size}"


def main(argv: list[str]) -> int:
    """Serve commands until the end of input."""
    worker = Worker(Path(argv[1]), int(argv[2]), int(argv[3]))
    ranges = ",".join(f"{start:#x}:{npages}" for start, npages in worker.ranges())
    print(f"ready ranges={ranges}", flush=True)
    for line in sys.stdin:
        words = line.split()
        if words == ["quit"]:
            break
        print(worker.answer(words), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
