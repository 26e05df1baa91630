"""How long the tables take, in ns per page, at 1, 4 and 16 million pages. Nothing is asserted.

python tests/bench/bench_tables.py [MILLIONS ...]

Run it twice, the second time with NPY_DISABLE_CPU_FEATURES="X86_V4 AVX512_ICL": where the sort of
the first line becomes several times faster, the daemon should run with that setting as well.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import numpy as np

from ksmd.core.tables import PageTables

BATCH = 25_000
START = 0x7F00_0000_0


def timed(what: str, npages: int, call: Callable[[], object], unit: int | None = None) -> object:
    begin = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - begin
    per_page = seconds * 1e9 / (unit or npages)
    print(f"  {what:<44} {seconds * 1e3:9.1f} ms {per_page:9.1f} ns/page")
    return result


def scan(tables: PageTables, sums: np.ndarray, seqnr: int) -> None:
    for at in range(0, sums.size, BATCH):
        part = sums[at : at + BATCH]
        first = START + at
        pages = np.arange(first, first + part.size, dtype=np.uint64)
        tables.observe(1, first, first + part.size, pages, part, seqnr)
    tables.finish(1, seqnr)


def bench(npages: int) -> None:
    print(f"{npages:,} pages, observed {BATCH:,} at a time; 1 % change per scan")
    rng = np.random.default_rng(7)
    sums = rng.integers(1, 2**32, npages, dtype=np.uint32)
    sums[: npages // 4] = sums[npages // 2 : npages // 2 + npages // 4]
    none = np.empty(0, np.uint32)
    words = rng.integers(0, 2**64, min(npages, 4 << 20), dtype=np.uint64)
    timed("numpy's sort of random words", words.size, words.sort)
    tables = PageTables(npages, npages)
    timed("first scan (new)", npages, lambda: scan(tables, sums, 1))
    timed("second scan (stable, fills the page hash)", npages, lambda: scan(tables, sums, 2))
    timed("duplicates, with what is left to merge", npages, lambda: tables.duplicates(none))
    timed("duplicates, nothing to merge", npages, lambda: tables.duplicates(none))
    print(f"  {tables.nbytes / npages:.2f} bytes per page")
    for seqnr in range(3, 6):
        at = rng.choice(npages, npages // 100, replace=False)
        sums[at] = rng.integers(1, 2**32, at.size, dtype=np.uint32)
        timed(f"scan {seqnr}", npages, lambda s=seqnr: scan(tables, sums, s))
        page_hash = tables._hash
        print(f"    {page_hash._npending:,} changes of the page hash wait")
        timed("merging them", npages, page_hash._merge)
    timed("forget", npages, lambda: tables.forget(1))


if __name__ == "__main__":
    for millions in [int(word) for word in sys.argv[1:]] or [1, 4, 16]:
        bench(millions << 20)
