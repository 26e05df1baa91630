"""The results as tables of at most 100 columns: time, memory, and what the victims feel."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from rich.table import Table

from ksmd.bench.contender import OURS, THEIRS

_MIB = 1 << 20
_NONE = "-"

Results = dict[str, Any]


def tables(results: Results) -> list[tuple[str, Table]]:
    """Make the tables with their titles. Cells are medians; "x" is ksmd's divided by KSM's."""
    workloads = results["workloads"]
    found = [_time(workloads), _passes(workloads), _memory(workloads), _feel(workloads)]
    if any("pauses" in workload[OURS] for workload in workloads):
        found.append(_pauses(workloads))
    return found


def of_columns(*names: str) -> Table:
    """Make a table: the first column to the left, figures to the right."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for number, name in enumerate(names):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    return table


def seconds(value: float | None) -> str:
    """Write seconds with three figures."""
    return _NONE if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def mib(value: float | None) -> str:
    """Write bytes in MiB."""
    return _NONE if value is None else f"{value / _MIB:.1f}"


def plain(value: float | None) -> str:
    """Write a number of any size."""
    return _NONE if value is None else f"{value:.1f}" if abs(value) < 100 else f"{value:.0f}"


def share(value: float | None) -> str:
    """Write a share in percent."""
    return _NONE if value is None else f"{100 * value:.1f}%"


def times(value: float | None) -> str:
    """Write a ratio."""
    return _NONE if value is None else f"{value:.2f}"


def _figure(workload: Results, side: str, name: str) -> float | None:
    found: float | None = workload[side]["median"][name] if workload[side] else None
    return found


def _three(workload: Results, name: str, write: Callable[[float | None], str]) -> Iterable[str]:
    """Give ksmd's figure, KSM's, and the ratio."""
    yield write(_figure(workload, OURS, name))
    yield write(_figure(workload, THEIRS, name))
    yield times(workload["ratios"][name])


def _time(workloads: list[Results]) -> tuple[str, Table]:
    parts = [f"{what}{when}" for when in (95, 99) for what in ("wall", "CPU")]
    table = of_columns("", *(cell for part in parts for cell in (part, "KSM", "x")))
    for workload in workloads:
        row = [workload["name"]]
        for when in ("95", "99"):
            for what in ("wall", "cpu"):
                row += _three(workload, f"{what}_{when}", seconds)
        table.add_row(*row)
    return "Seconds to 95 % and 99 % of the possible merge (x: ksmd / KSM)", table


def _passes(workloads: list[Results]) -> tuple[str, Table]:
    parts = ("wall settled", "CPU settled", "1st scan CPU")
    table = of_columns("", *(cell for part in parts for cell in (part, "KSM", "x")))
    for workload in workloads:
        row = [workload["name"]]
        for name in ("wall_end", "cpu_end", "cpu_first_pass"):
            row += _three(workload, name, seconds)
        table.add_row(*row)
    return "Seconds until a scan found nothing more, and CPU seconds of the first scan", table


def _memory(workloads: list[Results]) -> tuple[str, Table]:
    columns = ("possible", "saved", "KSM", "net", "KSM", "x", "ours", "B/page", "KSM")
    table = of_columns("", *columns)
    for workload in workloads:
        table.add_row(
            workload["name"],
            mib(workload["possible_bytes"]),
            share(_figure(workload, OURS, "saved_share")),
            share(_figure(workload, THEIRS, "saved_share")),
            *_three(workload, "net_bytes", mib),
            mib(_figure(workload, OURS, "processes_bytes")),
            plain(_figure(workload, OURS, "metadata_per_page")),
            plain(_figure(workload, THEIRS, "metadata_per_page")),
        )
    title = "MiB possible, saved by distinct frames, net of all costs; our processes; B of tables"
    return title, table


def _feel(workloads: list[Results]) -> tuple[str, Table]:
    columns = ("idle", "KSM", "1%", "KSM", "read", "ksmd", "KSM", "write", "KSM")
    table = of_columns("", *columns)
    for workload in workloads:
        row = [workload["name"]]
        for name in ("rescan_idle_ms_per_gib", "rescan_written_ms_per_gib"):
            row += [plain(_figure(workload, side, name)) for side in (OURS, THEIRS)]
        row.append(plain(_figure(workload, OURS, "read_before_ns")))
        for name in ("read_after_ns", "write_ns"):
            row += [plain(_figure(workload, side, name)) for side in (OURS, THEIRS)]
        table.add_row(*row)
    title = "Rescan, ms CPU per GiB: nothing, 1 % written; ns per random read, per CoW write"
    return title, table


def _pauses(workloads: list[Results]) -> tuple[str, Table]:
    gaps = ("n", "p50", "p99", "max")
    table = of_columns("", "quiet", *gaps, *(f"KSM {gap}" for gap in gaps), "stop p99", "max")
    for workload in workloads:
        row = [workload["name"], times(workload[OURS]["pauses"]["before"]["max_ms"])]
        for side in (OURS, THEIRS):
            found = workload[side]["pauses"]["during"] if workload[side] else None
            row.append(str(found["count"]) if found else _NONE)
            row += [
                times(found[name] if found else None) for name in ("p50_ms", "p99_ms", "max_ms")
            ]
        row += [times(_figure(workload, OURS, f"stop_ms_{which}")) for which in ("p99", "max")]
        table.add_row(*row)
    return (
        "Pauses of 0.1 ms and more while merging, waits for a CPU taken out; stop windows, ms",
        table,
    )
