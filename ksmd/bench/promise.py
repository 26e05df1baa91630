"""Whether scan.cpu_percent holds: what all our processes use, over any ten seconds.

W1, so that there is all of it: scanning, planning, stop windows, recounts. The daemon goes by
itself, as under an operator; what the victims use in their stops is not ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.table import Table

from ksmd.bench import table
from ksmd.bench.options import Options
from ksmd.bench.ours import Ksmd
from ksmd.bench.victims import Yard
from ksmd.bench.workloads import WORKLOADS

#: Seconds over which the promise holds, and how long we look.
_OVER = 10.0
_LOOK = 25.0
_SAMPLE = 0.1


@dataclass(frozen=True, slots=True)
class Kept:
    """One promise: percent of one core; most of any ten seconds; all of it; MiB saved meanwhile."""

    percent: int
    most: float
    mean: float
    saved_mib: float


def measure(options: Options, progress: Callable[[str], None]) -> list[Kept]:
    """Try every percentage."""
    return [_kept(options, percent, progress) for percent in options.promises]


def _kept(options: Options, percent: int, progress: Callable[[str], None]) -> Kept:
    progress(f"scan.cpu_percent: {percent}, {_LOOK:g} s")
    workload = WORKLOADS["W1"]
    with TemporaryDirectory(prefix="ksmd-bench-") as directory:
        yard = Yard(Path(directory), replace(options, workloads=(workload,)))
        scan = {"cpu_percent": percent, "sleep_millisecs": 0}
        with yard.victims(workload) as victims, Ksmd(victims, scan=scan) as ksmd:
            ksmd.go()
            samples = [(time.monotonic(), ksmd.cpu())]
            while samples[-1][0] - samples[0][0] < _LOOK:
                time.sleep(_SAMPLE)
                samples.append((time.monotonic(), ksmd.cpu()))
            most, mean = most_over(samples, _OVER), most_over(samples, _LOOK)
            return Kept(percent, most, mean, ksmd.saved() / 256)


def most_over(samples: Sequence[tuple[float, float]], seconds: float) -> float:
    """Give the largest share, in percent, of any such stretch between two of *samples* (s, CPU s).

    A stretch is as long as asked for, or as little longer as the samples allow.
    """
    most, first = 0.0, 0
    for now, used in samples:
        while first + 1 < len(samples) and now - samples[first + 1][0] >= seconds:
            first += 1
        began, before = samples[first]
        if now - began >= seconds:
            most = max(most, 100 * (used - before) / (now - began))
    return most


def as_dict(found: Sequence[Kept]) -> list[dict[str, Any]]:
    """Give it ready for JSON."""
    return [asdict(one) for one in found]


def show(found: Sequence[Kept]) -> tuple[str, Table]:
    """Make the table with its title."""
    rows = table.of_columns("promised %", "most in 10 s", "x", "mean", "MiB saved meanwhile")
    for one in found:
        rows.add_row(
            str(one.percent),
            f"{one.most:.2f}",
            f"{one.most / one.percent:.2f}",
            f"{one.mean:.2f}",
            f"{one.saved_mib:.0f}",
        )
    return f"scan.cpu_percent: percent of one core, all our processes, over {_LOOK:g} s", rows
