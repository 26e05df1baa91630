"""``python -m ksmd.bench``: measure, then print tables or JSON, and draw."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from ksmd.bench import growth, machine, plot, promise, share, table
from ksmd.bench.compete import compete, contenders
from ksmd.bench.options import Options, parse
from ksmd.bench.summary import of_outcome
from ksmd.cli.common import complain, console, guarded, print_json
from ksmd.model.errors import PrivilegeError

PROG = "ksmd.bench"


def run(options: Options) -> int:
    """Do what was asked for; the exit code."""
    if os.geteuid() != 0:
        raise PrivilegeError("the benchmark must run as root", "ksmd itself needs it: use sudo")
    if options.plot is not None:
        plot.pyplot()  # before minutes of measuring, not after
    # as Ctrl-C does: everything is ended and put back on the way out
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if options.share:
        return run_share(options)
    if options.growth:
        return run_growth(options)
    if options.promises:
        return run_promises(options)
    who, missing = contenders(options)
    if missing:
        complain(PROG, missing)
    found = machine.describe()
    outcomes, failed = compete(options, who, progress)
    results: dict[str, Any] = {
        "machine": found,
        "options": {
            "mib": options.mib,
            "victims": options.victims,
            "rounds": options.rounds,
            "spinning": options.spinning,
        },
        "missing": missing,
        "failed": failed,
        "workloads": [of_outcome(outcome) for outcome in outcomes],
    }
    if options.plot is not None and outcomes:
        plot.draw(outcomes, options.plot)
    show(results, options)
    return int(bool(failed))


def run_share(options: Options) -> int:
    """Measure how long sharing at once takes."""
    found = machine.describe()
    latencies = share.latencies(options.share, options.rounds, progress)
    told = {"rounds": options.rounds, "share": [latency.as_dict() for latency in latencies]}
    return tell(options, found, told, [share.show(latencies)])


def run_growth(options: Options) -> int:
    """Measure what a page costs as everything grows."""
    found = machine.describe()
    sizes = growth.measure(options, progress)
    return tell(options, found, {"growth": growth.as_dict(sizes)}, growth.tables(sizes))


def run_promises(options: Options) -> int:
    """Measure whether the CPU budget holds."""
    found = machine.describe()
    kept = promise.measure(options, progress)
    return tell(options, found, {"cpu_percent": promise.as_dict(kept)}, [promise.show(kept)])


def tell(
    options: Options,
    found: dict[str, Any],
    told: dict[str, Any],
    tables: Sequence[tuple[str, Table]],
) -> int:
    """Print what was measured on the machine *found*: *told* as JSON, or else *tables*."""
    if options.json:
        print_json({"machine": found} | told)
        return 0
    out = console()
    for title, made in tables:
        out.print(title)
        out.print(made)
        out.print()
    out.print(machine.line(found))
    return 0


def progress(text: str) -> None:
    """Say what is being done."""
    print(text, file=sys.stderr, flush=True)


def show(results: dict[str, Any], options: Options) -> None:
    """Print the results."""
    if options.json:
        print_json(results)
        return
    out = console()
    for title, made in table.tables(results) if results["workloads"] else []:
        out.print(title)
        out.print(made)
        out.print()
    for workload in results["workloads"]:
        out.print(f"{workload['name']}: {workload['title']}")
    out.print(
        f"{options.victims} victims of {options.mib} MiB, medians of {options.rounds} runs each"
    )
    out.print(machine.line(results["machine"]))


def main(argv: Sequence[str] | None = None) -> int:
    """Run as a program."""
    return guarded(PROG, lambda: run(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
