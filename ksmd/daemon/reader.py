"""Reads pages of targets and tells their checksums: by several threads, where somebody waits.

Most of the time goes to system calls, which do not hold Python's lock, so that threads help; the
checksums are computed under it, a seventh of the work, and bound how many do. Each thread has a
buffer of its own, and together they have no more than a few MiB, however many domains there are.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
from numpy.typing import NDArray

from ksmd.core.checksum import Checksummer, low32
from ksmd.kernel.memory import Memory
from ksmd.model.units import PAGE_SHIFT

#: Pages of one buffer: 2 MiB.
_PAGES = 512
#: Threads, at the most, ours included. More would wait for the lock.
_MOST_THREADS = 4

Pages = NDArray[np.uint64]


class Reader:
    """The buffers of one daemon. For use by one thread at a time."""

    def __init__(self) -> None:
        self._buffers: list[Checksummer] = []
        self._pool: ThreadPoolExecutor | None = None

    def rest(self) -> None:
        """Give the buffers' memory back: nothing may be read for long."""
        self._buffers.clear()

    def read(
        self, memory: Memory, pages: Pages, seed: int, *, at_once: bool = False
    ) -> tuple[Pages, NDArray[np.uint32]]:
        """Read and checksum exclusive pages (numbers, ascending) under *seed*.

        Returns those pages that were still there, and their checksums. *at_once*: on as many
        processors as there are. TargetGoneError when the process is gone.
        """
        sums = np.empty(len(pages), np.uint64)
        starts = iter(range(0, len(pages), _PAGES))  # shared by all threads: each takes the next
        threads = min(self._threads() if at_once else 1, -(-len(pages) // _PAGES))
        while len(self._buffers) < max(1, threads):
            self._buffers.append(Checksummer(_PAGES))
        if threads > 1 and self._pool is None:
            self._pool = ThreadPoolExecutor(_MOST_THREADS - 1, "ksmd-reader")
        others = [
            self._pool.submit(_read, buffer, memory, pages, seed, starts, sums)
            for buffer in self._buffers[1:threads]
            if self._pool is not None
        ]
        try:
            vanished = _read(self._buffers[0], memory, pages, seed, starts, sums)
        finally:
            wait(others)  # whatever became of ours: theirs read into what is used again
        for other in others:
            vanished += other.result()
        kept = low32(sums)
        if not vanished:
            return pages, kept
        left = np.delete(np.arange(len(pages)), np.concatenate(vanished))
        return pages[left], kept[left]

    @staticmethod
    def _threads() -> int:
        return min(_MOST_THREADS, len(os.sched_getaffinity(0)))


def _read(
    checksummer: Checksummer,
    memory: Memory,
    pages: Pages,
    seed: int,
    starts: Iterator[int],
    sums: NDArray[np.uint64],
) -> list[NDArray[np.intp]]:
    """Read one buffer after the other into *sums*; the indexes of pages that were not there."""
    vanished = []
    for start in starts:
        chunk = pages[start : start + _PAGES]
        for low, high in memory.gather_exclusive(_pieces(chunk), checksummer.buffer):
            vanished.append(np.arange(low >> PAGE_SHIFT, high >> PAGE_SHIFT) + start)
        sums[start : start + len(chunk)] = checksummer.sums64(len(chunk), seed)
    return vanished


def _pieces(pages: Pages) -> memoryview:
    """Give ascending pages as what is to be read: address and length of neighbours, in turns."""
    edges = np.empty(0, np.intp)
    if int(pages[-1]) - int(pages[0]) >= pages.size:
        edges = np.flatnonzero(pages[1:] - pages[:-1] != 1) + 1
    pieces = np.empty((edges.size + 1, 2), np.uint64)
    pieces[0, 0], pieces[1:, 0] = pages[0], pages[edges]
    pieces[:, 1] = np.diff(edges, prepend=0, append=pages.size)
    pieces <<= np.uint64(PAGE_SHIFT)
    return pieces.reshape(-1).data
