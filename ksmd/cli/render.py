"""Counters as people read them: sizes, counts, tables. Nothing here asks anybody for anything.

Names of processes and mappings come from other programs, so they go through :func:`safe` before
they reach a terminal.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from ksmd.model.refusal import SENTENCES, Reason
from ksmd.model.units import PAGE_SIZE

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def size(nbytes: int) -> str:
    """Write a number of bytes with three figures or so: "1.21 GiB", "-64 KiB", "0 B"."""
    value, unit = float(abs(nbytes)), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value /= 1024
        unit += 1
    figures = 0 if unit == 0 or value >= 100 else 1 if value >= 10 else 2
    return f"{'-' if nbytes < 0 else ''}{value:.{figures}f} {_UNITS[unit]}"


def pages_size(npages: int) -> str:
    """Write a number of pages as a size."""
    return size(npages * PAGE_SIZE)


def count(number: int, noun: str = "") -> str:
    """Write a count, grouped, with its noun: "1,204 pages", "1 page"."""
    text = f"{number:,}"
    return text if not noun else f"{text} {noun if number == 1 else noun + 's'}"


def short(number: int) -> str:
    """Write a count for a narrow column: exact up to five digits, then "1.23M", "45.6G"."""
    if abs(number) < 100_000:
        return f"{number:,}"
    value, unit = float(number), 0
    while abs(value) >= 1000 and unit < 4:
        value, unit = value / 1000, unit + 1
    figures = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{figures}f}{' kMGT'[unit]}"


def safe(text: str, limit: int = 200) -> str:
    """Make text of other programs harmless for a terminal: no control characters, no end of it."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in text)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def sentence(reason: str) -> str:
    """Give the sentence of a refusal, its name where this version does not know it."""
    try:
        return SENTENCES[Reason(reason)]
    except ValueError:
        return f"({safe(reason)})"


def table(*columns: str, title: str = "") -> Table:
    """Make a plain table. Columns named ">..." are right-aligned, these and "=..." do not wrap."""
    made = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        title=Text(title, style="bold") if title else None,
        title_justify="left",
        show_edge=False,
    )
    for column in columns:
        right = column.startswith(">")
        made.add_column(
            Text(column.lstrip(">="), style="bold"),
            justify="right" if right else "left",
            no_wrap=column.startswith((">", "=")),
            overflow="fold",
        )
    return made


def facts(rows: Iterable[tuple[str, str]]) -> Table:
    """Make two columns, a word and what is to be said of it."""
    made = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    made.add_column(no_wrap=True, style="bold")
    made.add_column(overflow="fold")
    for name, value in rows:
        made.add_row(Text(name), Text(value))
    return made


def targets_table(targets: Iterable[Mapping[str, Any]]) -> Table:
    """List targets by trust domain, each domain with its sums; the most profitable first."""
    made = table(
        ">PID", "name", ">merged", ">zero", ">profit", ">VMAs", ">stops", ">p99 ms", ">max ms",
        ">CoW", title="Targets, by trust domain",
    )  # fmt: skip
    domains: dict[str, list[Mapping[str, Any]]] = {}
    for target in sorted(targets, key=lambda one: (-one["profit"], one["pid"])):
        domains.setdefault(target["domain"], []).append(target)
    profits = {name: sum(one["profit"] for one in members) for name, members in domains.items()}
    for name, members in sorted(domains.items(), key=lambda item: (-profits[item[0]], item[0])):
        made.add_row(*_target_cells("", name, _summed(members)), style="bold")
        for one in members:
            made.add_row(*_target_cells(str(one["pid"]), "  " + one["name"], one))
        made.add_section()
    return made


def _summed(members: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sum the counters of a domain. Of percentiles there is no sum, of the longest there is one."""
    counters = ("merging_pages", "zero_pages", "profit", "vmas_used", "stops", "cow_breaks")
    sums: dict[str, Any] = {name: sum(one[name] for one in members) for name in counters}
    sums["stop_ms_p99"] = None
    sums["stop_ms_max"] = max(one["stop_ms_max"] for one in members)
    return sums


def _target_cells(pid: str, name: str, one: Mapping[str, Any]) -> list[Text]:
    p99 = one["stop_ms_p99"]
    return [
        Text(pid),
        Text(safe(name, 60)),
        Text(pages_size(one["merging_pages"])),
        Text(pages_size(one["zero_pages"])),
        Text(size(one["profit"]), style="red" if one["profit"] < 0 else ""),
        Text(short(one["vmas_used"])),
        Text(short(one["stops"])),
        Text("" if p99 is None else f"{p99:.1f}"),
        Text(f"{one['stop_ms_max']:.1f}"),
        Text(short(one["cow_breaks"])),
    ]


def refused_targets_table(targets: Iterable[Mapping[str, Any]]) -> Table | None:
    """List the targets that are left alone as a whole, with the reason; None when there is none."""
    made = table(">PID", "name", "why it is left alone", title="Targets left alone")
    for target in targets:
        if target["refused"]:
            made.add_row(
                str(target["pid"]), Text(safe(target["name"], 40)), sentence(target["refused"])
            )
    return made if made.row_count else None


def refusals_table(refusals: Mapping[str, int], title: str = "Not merged") -> Table | None:
    """List why pages were not merged, the most frequent reason first; None when there is none."""
    made = table(">pages", "=reason", "what it means", title=title)
    for reason, number in sorted(refusals.items(), key=lambda item: (-item[1], item[0])):
        if number:
            made.add_row(count(number), Text(safe(reason, 40)), sentence(reason))
    return made if made.row_count else None
