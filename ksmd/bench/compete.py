"""The runs: both contenders in turns, each on fresh victims, for every workload that was chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from ksmd.bench import theirs
from ksmd.bench.contender import OURS, THEIRS, Contender
from ksmd.bench.measure import pauses, timed_run
from ksmd.bench.model import Run
from ksmd.bench.options import Options
from ksmd.bench.ours import Ksmd
from ksmd.bench.theirs import KernelKsmd
from ksmd.bench.victims import Victim, Yard
from ksmd.bench.workloads import Workload
from ksmd.model.errors import KsmdError, UsageError

Make = Callable[[Sequence[Victim]], Contender]
Tell = Callable[[str], None]

#: Of the memory that is available, what the victims may take; unmerging needs some too.
_MEMORY_SHARE = 0.6


@dataclass(slots=True)
class Outcome:
    """All runs of one workload, by contender; pauses are (before, during) in nanoseconds."""

    workload: Workload
    runs: dict[str, list[Run]] = field(default_factory=dict)
    pauses: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)


def contenders(options: Options) -> tuple[dict[str, Make], str]:
    """Give who takes part, and why not both; empty when both do."""
    found: dict[str, Make] = {OURS: Ksmd}
    if not options.ksm:
        return found, "kernel KSM was left out (--no-ksm)"
    if why := theirs.unusable():
        return found, f"{why}: only ksmd is measured"
    return found | {THEIRS: KernelKsmd}, ""


def check_memory(options: Options, share: float = _MEMORY_SHARE) -> None:
    """Refuse what would not fit into a *share* of memory: a host that swaps measures nothing."""
    wanted = (options.mib << 20) * options.victims
    available = psutil.virtual_memory().available
    if wanted > available * share:
        raise UsageError(
            f"{options.victims} victims of {options.mib} MiB are too much:"
            f" {available >> 20} MiB are available",
            "give fewer --victims or less --mib",
        )


def compete(
    options: Options, who: dict[str, Make], tell: Tell
) -> tuple[list[Outcome], dict[str, str]]:
    """Do all runs: the outcomes, and by workload what failed; one failure does not cost the rest.

    Everything that was started is ended, and every setting put back, also on Ctrl-C.
    """
    check_memory(options)
    outcomes: list[Outcome] = []
    failed: dict[str, str] = {}
    with ExitStack() as stack:
        directory = Path(stack.enter_context(TemporaryDirectory(prefix="ksmd-bench-")))
        if THEIRS in who:
            stack.enter_context(theirs.kept())
        yard = Yard(directory, options)
        for workload in options.workloads:
            try:
                outcomes.append(_workload(workload, yard, options, who, tell))
            except KsmdError as error:
                failed[workload.name] = str(error)
                tell(f"{workload.name} failed: {error}")
    return outcomes, failed


def _workload(
    workload: Workload, yard: Yard, options: Options, who: dict[str, Make], tell: Tell
) -> Outcome:
    outcome = Outcome(workload, {name: [] for name in who})
    for number in range(options.rounds):
        for name, make in who.items():
            tell(f"{workload.name}, round {number + 1} of {options.rounds}: {name}")
            with yard.victims(workload) as victims:
                run = timed_run(make, victims)
            if not run.intact:
                raise KsmdError(f"{workload.name}: contents changed under {name}")
            outcome.runs[name].append(run)
    if options.pauses:
        for name, make in who.items():
            tell(f"{workload.name}, pauses: {name}")
            with yard.victims(workload) as victims:
                outcome.pauses[name] = pauses(make, victims, options.spinning)
    return outcome
