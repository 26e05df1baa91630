"""What the benchmark is asked for: its command line, checked."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ksmd.bench.workloads import WORKLOADS, Workload
from ksmd.model.errors import UsageError

#: What --share measures unless told otherwise.
SIZES = (1, 64, 1024)
#: And --cpu-percent.
PROMISES = (5, 20, 50)

DESCRIPTION = """\
Merge the same memory with ksmd and with kernel KSM, in turns, and compare: time, CPU, memory saved
after all costs, pauses, latency. Needs root, a C compiler, and a host on which KSM is not in use.
"""


@dataclass(frozen=True, slots=True)
class Options:
    """``mib``: memory of each of the ``victims``; ``rounds``: runs of each contender.

    ``share``: MiB of which only it is measured how long it takes to share them at once. ``growth``:
    only what a page costs is measured, as memory and victims grow. ``promises``: only whether that
    many percent of one core are kept to.
    """

    workloads: tuple[Workload, ...]
    mib: int
    victims: int
    rounds: int
    ksm: bool
    pauses: bool
    json: bool
    plot: Path | None
    share: tuple[int, ...] = ()
    growth: bool = False
    promises: tuple[int, ...] = ()

    @property
    def pages(self) -> int:
        """Pages of one victim."""
        return self.mib << 8

    @property
    def spinning(self) -> int:
        """How many victims look for pauses: a CPU stays free, or they would only see each other."""
        return min(self.victims, max(1, len(os.sched_getaffinity(0)) - 1))


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(_positive(word.strip()) for word in text.split(","))


def _workloads(text: str) -> tuple[Workload, ...]:
    names = [name.strip().upper() for name in text.split(",")]
    unknown = [name for name in names if name not in WORKLOADS]
    if unknown:
        known = ", ".join(WORKLOADS)
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; there are {known}")
    return tuple(WORKLOADS[name] for name in dict.fromkeys(names))


def parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    lines = [f"  {w.name}  {w.title}" for w in WORKLOADS.values()]
    made = argparse.ArgumentParser(
        prog="python -m ksmd.bench",
        description=DESCRIPTION,
        epilog="workloads:\n" + "\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--only",
        type=_workloads,
        default=tuple(WORKLOADS.values()),
        metavar="W1,W2",
        help="these workloads instead of all",
    )
    made.add_argument("--mib", type=_positive, default=64, help="MiB of each victim (default 64)")
    made.add_argument("--victims", type=_positive, default=8, help="how many (default 8)")
    made.add_argument("--rounds", type=_positive, default=3, help="runs of each (default 3)")
    made.add_argument("--no-ksm", action="store_true", help="leave kernel KSM out")
    made.add_argument(
        "--no-pauses", action="store_true", help="leave out the extra run that measures pauses"
    )
    made.add_argument("--json", action="store_true", help="print one JSON document instead")
    made.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw progress over time (png, svg)"
    )
    made.add_argument(
        "--share",
        type=_sizes,
        nargs="?",
        const=SIZES,
        default=(),
        metavar="MIB,MIB",
        help="measure instead how long a worker waits until so much of its memory is shared, when"
        f" it asks for that itself (default {','.join(map(str, SIZES))})",
    )
    made.add_argument(
        "--growth",
        action="store_true",
        help="measure instead what a page costs as memory and the number of victims grow",
    )
    made.add_argument(
        "--cpu-percent",
        type=_sizes,
        nargs="?",
        const=PROMISES,
        default=(),
        metavar="N,N",
        help="measure instead whether scan.cpu_percent keeps all our processes to so many percent"
        f" of one core (default {','.join(map(str, PROMISES))})",
    )
    return made


def parse(argv: Sequence[str] | None) -> Options:
    """Read the command line; UsageError for what no single option can be blamed for."""
    args = parser().parse_args(argv)
    if args.victims < 2:
        raise UsageError("one victim has nobody to share with", "give --victims 2 or more")
    return Options(
        workloads=args.only,
        mib=args.mib,
        victims=args.victims,
        rounds=args.rounds,
        ksm=not args.no_ksm,
        pauses=not args.no_pauses,
        json=args.json,
        plot=args.plot,
        share=args.share,
        growth=args.growth,
        promises=args.cpu_percent,
    )
