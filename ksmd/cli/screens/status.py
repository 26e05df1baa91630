"""The counters of a daemon as ``ksmctl status`` shows them.

Savings come first, for they are the reason to run ksmd; then the state; then what could be done
about pages that were left alone; then who pays how much (stops, VMAs) for what.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from ksmd.cli import render, words
from ksmd.kernel import procfs
from ksmd.model.errors import KsmdError
from ksmd.model.units import PAGE_SIZE


def available_memory() -> int | None:
    """Give the bytes of memory that could be had without swapping, None where it is not known."""
    try:
        return procfs.mem_available()
    except (KsmdError, KeyError, ValueError, IndexError):
        return None


def show(out: Console, status: Mapping[str, Any], available: int | None) -> None:
    """Show the counters of *status*; *available* is the memory left on the host, in bytes."""
    profit = status["general_profit"]
    if profit >= 0:
        head = f"ksmd saves {words.size(profit)}"
        out.print(Text(f"{head}, after its own costs", style="bold green"))
    else:
        head = f"ksmd costs {words.size(-profit)} more than it saves"
        out.print(Text(head, style="bold red"))
    out.print()
    out.print(render.facts(_facts(status, available)))
    for part in (
        render.refusals_table(status["refusals"]),
        render.targets_table(status["targets"]) if status["targets"] else None,
        render.refused_targets_table(status["targets"]),
    ):
        if part is not None:
            out.print()
            out.print(part)
    out.print()
    for line in _advice(status, available):
        out.print(Text(line))


def state(status: Mapping[str, Any]) -> str:
    """Say in one sentence what the daemon is doing."""
    scans = words.count(status["full_scans"], "full scan")
    if status["paused"]:
        return f"paused after {scans}; what is merged stays merged (`ksmctl resume` goes on)"
    if status["run"] == "stop":
        return f"stopped by its settings (run: stop) after {scans}; merged pages stay merged"
    if status["run"] == "unmerge":
        return "giving every merged page back (run: unmerge)"
    if not status["targets"]:
        return "merging, but no process is selected: see `targets:` in the settings"
    if status["settled"]:
        return f"merging; settled: the last of {scans} found nothing more to merge"
    return f"merging; {scans} so far, not settled yet"


def _facts(status: Mapping[str, Any], available: int | None) -> list[tuple[str, str]]:
    size, count = words.pages_size, words.count
    headroom = f"{words.size(status['headroom_bytes'])} would be needed to give everything back"
    if available is not None:
        headroom += f"; the host has {words.size(available)} available"
    # as in KSM: pages_sharing are those that share beyond the first, so they are the saving
    sites = status["pages_shared"] + status["pages_sharing"]
    gross = (status["pages_sharing"] + status["zero_pages"]) * PAGE_SIZE
    return [
        ("State", state(status)),
        (
            "Merged",
            f"{count(sites, 'page')} ({size(sites)}) share {count(status['pages_shared'])} in the"
            f" store: {size(status['pages_sharing'])} saved",
        ),
        (
            "Zero pages",
            f"{count(status['zero_pages'])} dropped: {size(status['zero_pages'])} saved",
        ),
        (
            "Written since",
            f"{count(status['cow_breaks'], 'page')}; a write gives the writer its own copy",
        ),
        (
            "Candidates",
            f"{count(status['pages_unshared'])} without a twin,"
            f" {count(status['pages_volatile'])} changing too often",
        ),
        (
            "Scanned",
            f"{count(status['pages_scanned'], 'page')},"
            f" {count(status['pages_skipped'])} skipped without reading",
        ),
        ("Stops", _stops(status)),
        (
            "Own cost",
            f"{words.size(gross - status['general_profit'])} in all,"
            f" {words.size(status['metadata_bytes'])} of it tables and VMAs",
        ),
        ("Headroom", headroom),
        *_tuned(status),
    ]


def _stops(status: Mapping[str, Any]) -> str:
    if not status["stops"]:
        return "none so far"
    return (
        f"{words.count(status['stops'])}, 99 of 100 no longer than {status['stop_ms_p99']:.1f} ms,"
        f" the longest {status['stop_ms_max']:.1f} ms"
    )


def _tuned(status: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Say what is not as the settings file has it."""
    names = [name for name, origin in status.get("sources", {}).items() if ":" not in origin]
    names = [name for name in names if status["sources"][name] != "default"]
    if not names:
        return []
    return [("Tuned", f"{', '.join(names)} were set by a call, until a restart or reload")]


def _advice(status: Mapping[str, Any], available: int | None) -> list[str]:
    lines = []
    if available is not None and status["headroom_bytes"] > available:
        lines.append(
            "Take care: the host could not hold everything un-shared. Stop or move work before"
            " `ksmctl unmerge`."
        )
    if status["general_profit"] < 0 and status["pages_sharing"]:
        lines.append("It does not pay here: `ksmctl unmerge` gives every page back.")
    if status["refusals"] or any(target["refused"] for target in status["targets"]):
        lines.append("Why a process is not merged, range by range: `ksmctl why PID`.")
    lines.append("Undo: `ksmctl pause` stops scanning, `ksmctl unmerge [--pid N]` un-shares.")
    return lines
