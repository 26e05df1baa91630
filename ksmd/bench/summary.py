"""From runs to results: medians for each contender, and ksmd's ratio to KSM. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from ksmd.bench.compete import Outcome
from ksmd.bench.contender import OURS, THEIRS
from ksmd.bench.model import PAGE_SIZE, Point, Run

Number = float | None

#: Ratios that are told: of these medians, ksmd's divided by KSM's.
RATIOS = (
    *(f"{what}_{when}" for what in ("wall", "cpu") for when in ("95", "99", "end", "first_pass")),
    "net_bytes",
    "metadata_per_page",
    "rescan_idle_ms_per_gib",
    "rescan_written_ms_per_gib",
    "read_after_ns",
    "write_ns",
)

_NS_PER_MS = 1e6


def middle(values: Iterable[Number]) -> Number:
    """Give the median; None when most runs gave none."""
    every = list(values)
    known = [value for value in every if value is not None]
    return median(known) if len(known) * 2 > len(every) else None


def percentile(values: Sequence[float], share: float) -> float:
    """Give the smallest value that *share* of all do not exceed; 0 without values."""
    ordered = sorted(values)
    if not ordered:
        return 0.0
    rank = -(-share * len(ordered) // 1)  # rounded up
    return ordered[min(len(ordered), max(1, int(rank))) - 1]


def ratio(ours: Number, theirs: Number) -> Number:
    """Divide; None where there is nothing to divide."""
    if ours is None or not theirs:
        return None
    return ours / theirs


def _points(run: Run) -> dict[str, Point | None]:
    first = run.passes[0] if run.passes else None
    return {"95": run.mark(0.95), "99": run.mark(0.99), "end": run.end, "first_pass": first}


def numbers(run: Run) -> dict[str, Number]:
    """Give all figures of one run by name; seconds, bytes, shares, nanoseconds."""
    gib = run.pages * PAGE_SIZE / (1 << 30)
    found: dict[str, Number] = {}
    for when, point in _points(run).items():
        found[f"wall_{when}"] = point.seconds if point else None
        found[f"cpu_{when}"] = point.cpu if point else None
    return found | {
        "possible_bytes": run.possible * PAGE_SIZE,
        "saved_bytes": run.saved * PAGE_SIZE,
        "saved_share": run.saved / run.possible if run.possible else None,
        "net_bytes": run.net_bytes,
        "metadata_per_page": run.costs.metadata / run.pages,
        "processes_bytes": run.costs.processes,
        "vma_bytes": run.costs.vmas,
        "page_table_bytes": run.costs.page_tables,
        "store_spare_bytes": run.costs.store,
        "rescan_idle_ms_per_gib": run.rescan_idle * 1e3 / gib,
        "rescan_written_ms_per_gib": run.rescan_written * 1e3 / gib,
        "read_before_ns": run.read_before,
        "read_after_ns": run.read_after,
        "write_ns": run.write_ns,
        "huge_before": run.huge_before,
        "huge_after": run.huge_after,
        "stop_ms_p99": run.details.get("stop_ms_p99"),
        "stop_ms_max": run.details.get("stop_ms_max"),
        "victims_cpu": run.details.get("victims_cpu"),
    }


def medians(runs: Sequence[Run]) -> dict[str, Number]:
    """Give the median of every figure."""
    every = [numbers(run) for run in runs]
    return {name: middle(one[name] for one in every) for name in every[0]}


def pause_numbers(gaps: Sequence[int]) -> dict[str, float]:
    """Tell pauses of 0.1 ms and more: how many, and their p50, p99 and longest in ms."""
    return {
        "count": len(gaps),
        "p50_ms": percentile(gaps, 0.50) / _NS_PER_MS,
        "p99_ms": percentile(gaps, 0.99) / _NS_PER_MS,
        "max_ms": max(gaps, default=0) / _NS_PER_MS,
    }


def of_outcome(outcome: Outcome) -> dict[str, Any]:
    """Give everything about one workload, ready for JSON."""
    sides: dict[str, Any] = {}
    for name, runs in outcome.runs.items():
        side: dict[str, Any] = {"median": medians(runs), "runs": [_as_dict(run) for run in runs]}
        if name in outcome.pauses:
            quiet, during = outcome.pauses[name]
            side["pauses"] = {"before": pause_numbers(quiet), "during": pause_numbers(during)}
        sides[name] = side
    ours = sides[OURS]["median"]
    theirs = sides[THEIRS]["median"] if THEIRS in sides else None
    return {
        "name": outcome.workload.name,
        "title": outcome.workload.title,
        "possible_bytes": ours["possible_bytes"],
        OURS: sides[OURS],
        THEIRS: sides.get(THEIRS),
        "ratios": {name: ratio(ours[name], theirs[name] if theirs else None) for name in RATIOS},
    }


def _as_dict(run: Run) -> dict[str, Any]:
    """Give one run without its timeline, which is for the plot."""
    found = asdict(run)
    found.pop("timeline")
    return found | {"figures": numbers(run)}
