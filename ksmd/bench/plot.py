"""Progress over time, drawn with matplotlib where that is installed (it is an optional extra)."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ksmd.bench.compete import Outcome
from ksmd.bench.contender import OURS, THEIRS
from ksmd.bench.model import Run
from ksmd.model.errors import KsmdError

_COLOURS = {OURS: "tab:blue", THEIRS: "tab:orange"}


def pyplot() -> Any:
    """Load matplotlib; KsmdError that says what to do where it is missing."""
    try:
        importlib.import_module("matplotlib").use("Agg")
        return importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        raise KsmdError(
            "no plot without matplotlib", "pip install matplotlib, or leave --plot out"
        ) from error


def curve(run: Run, by_cpu: bool) -> tuple[list[float], list[float]]:
    """Give (seconds, MiB saved) of one run, over CPU seconds or over wall."""
    across = [point.cpu if by_cpu else point.seconds for point in run.timeline]
    return across, [point.pages / 256 for point in run.timeline]


def draw(outcomes: Sequence[Outcome], file: Path) -> None:
    """Draw one row for each workload: MiB saved over wall and over CPU. KsmdError on failure."""
    plt = pyplot()
    rows = len(outcomes)
    figure, axes = plt.subplots(rows, 2, figsize=(10, 2.6 * rows), squeeze=False)
    for outcome, (wall, cpu) in zip(outcomes, axes, strict=True):
        for axis, by_cpu, label in ((wall, False, "wall"), (cpu, True, "CPU")):
            for name, runs in outcome.runs.items():
                for number, run in enumerate(runs):
                    across, saved = curve(run, by_cpu)
                    title = name if number == 0 else None
                    axis.plot(across, saved, color=_COLOURS[name], linewidth=1, label=title)
            axis.set_xlabel(f"{label} seconds")
            axis.set_ylabel("MiB saved")
            axis.set_title(f"{outcome.workload.name}: {outcome.workload.title}", fontsize=8)
            axis.legend(fontsize=7)
    figure.tight_layout()
    try:
        figure.savefig(file)
    except (OSError, ValueError) as error:
        raise KsmdError(f"cannot write {file}: {error}") from error
    finally:
        plt.close(figure)
