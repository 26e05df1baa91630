"""What a page costs as memory and targets grow: the same merge and the same scan, larger each time.

Nothing ksmd does may cost more for a page because there are more pages, or more processes. W1 shows
it for all that merging takes, W3 for a scan that finds nothing; both of ksmd alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.table import Table

from ksmd.bench import table
from ksmd.bench.compete import check_memory
from ksmd.bench.measure import Watch
from ksmd.bench.options import Options
from ksmd.bench.ours import Ksmd
from ksmd.bench.victims import Yard
from ksmd.bench.workloads import WORKLOADS, Workload
from ksmd.model.errors import UsageError

#: (MiB of a victim, victims): memory grows, then the number of processes does.
MEMORY = tuple((mib, 8) for mib in (32, 128, 512, 1024, 2048))
TARGETS = tuple((16, victims) for victims in (2, 8, 32, 128, 200))
#: Of the memory that is available, what the victims may take: the store is an eighth of them.
_MEMORY_SHARE = 0.75


@dataclass(frozen=True, slots=True)
class Grown:
    """One size: CPU microseconds for a page of merging (W1) and of a first scan (W3)."""

    mib: int
    victims: int
    pages: int
    merge_us: float
    scan_us: float
    table_bytes: float


def measure(options: Options, progress: Callable[[str], None]) -> dict[str, list[Grown]]:
    """Measure every size that fits into memory; the others are told and left out."""
    found: dict[str, list[Grown]] = {}
    for name, sizes in (("memory", MEMORY), ("targets", TARGETS)):
        found[name] = []
        for mib, victims in sizes:
            sized = replace(options, mib=mib, victims=victims)
            try:
                check_memory(sized, _MEMORY_SHARE)
            except UsageError as error:
                progress(str(error))
                continue
            progress(f"{victims} victims of {mib} MiB")
            found[name].append(_grown(sized))
    return found


def _grown(options: Options) -> Grown:
    merge, _ = _run(WORKLOADS["W1"], options)
    scan, tables = _run(WORKLOADS["W3"], options)
    pages = options.pages * options.victims
    figures = (1e6 * merge / pages, 1e6 * scan / pages, tables / pages)
    return Grown(options.mib, options.victims, pages, *figures)


def _run(workload: Workload, options: Options) -> tuple[float, int]:
    """Merge one workload: CPU seconds until nothing more was found, and bytes of tables."""
    with TemporaryDirectory(prefix="ksmd-bench-") as directory:
        yard = Yard(Path(directory), replace(options, workloads=(workload,)))
        with yard.victims(workload) as victims, Ksmd(victims) as ksmd:
            watch = Watch(ksmd, victims)
            watch.begin()
            ksmd.start(watch.stamp)
            end = watch.until_settled()
            return end.cpu, ksmd.table_bytes()


def as_dict(found: dict[str, list[Grown]]) -> dict[str, Any]:
    """Give it ready for JSON."""
    return {name: [asdict(one) for one in sizes] for name, sizes in found.items()}


def tables(found: dict[str, list[Grown]]) -> list[tuple[str, Table]]:
    """Make the tables with their titles; x compares with the first line."""
    made = []
    for name, sizes in found.items():
        rows = table.of_columns(
            "victims", "MiB each", "GiB", "merge us/page", "x", "scan us/page", "x", "table B/page"
        )
        for one in sizes:
            first = sizes[0]
            rows.add_row(
                str(one.victims),
                str(one.mib),
                f"{one.pages / (1 << 18):.2f}",
                f"{one.merge_us:.2f}",
                f"{one.merge_us / first.merge_us:.2f}",
                f"{one.scan_us:.2f}",
                f"{one.scan_us / first.scan_us:.2f}",
                f"{one.table_bytes:.1f}",
            )
        made.append((f"CPU for a page as {name} grows: W1 merged, W3 scanned", rows))
    return made
