"""Counters as tables for people. Nothing here asks anybody for anything.

A call with --json does without this module, and so without rich.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from ksmd.cli.words import count, pages_size, safe, sentence, short, size


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
