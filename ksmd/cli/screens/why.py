"""What of a process is merged, and why the rest is not, as ``ksmctl why`` shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ksmd.cli import render, words

#: More ranges than this are not listed for people.
_LISTED = 60

_STATES = {
    "merged": "merged: it shares a page of the store until somebody writes to it",
    "zero": "given back as a zero page",
    "candidate": "a candidate: it is scanned, and no other page has had the same content yet",
    "volatile": "volatile: it changed since the last full scan, so merging it would not last",
    "unread": "not read yet, or not in memory",
    "refused": "left alone, for the reason of its range",
}


def show(out: Console, reply: Mapping[str, Any], address: int | None) -> None:
    """Show the answer: the process first, then the page, then range by range."""
    who = f"{reply['pid']} {words.safe(reply['name'], 40)}".rstrip()
    if reply["target"]:
        head = f"Process {who} is a target in domain {words.safe(reply['domain'], 40)}"
    else:
        head = f"Process {who} is no target"
    out.print(Text(head, style="bold"))
    if reply["reason"]:
        out.print(Text(f"Left alone as a whole: {reply['sentence']}"))
        if reply["detail"]:
            out.print(Text(words.safe(reply["detail"])))
    elif not reply["target"]:
        out.print("No rule under `targets:` in the settings matches it.")
    state = reply.get("state")
    if state and address is not None:
        out.print(Text(f"The page at {address:#x} is {_STATES.get(state, words.safe(state))}."))
    open_ = [area for area in reply["areas"] if not area["reason"] or address is not None]
    refused = [area for area in reply["areas"] if area["reason"]]
    for part in (_ranges(open_), _refused(refused)):
        if part is not None:
            out.print()
            out.print(part)


def _ranges(areas: Sequence[Mapping[str, Any]]) -> Table | None:
    """List ranges one by one: what is merged, given back or scanned, or what was asked about."""
    made = render.table("=range", ">size", ">merged", ">zero", "mapping", "")
    for area in areas[:_LISTED]:
        made.add_row(
            f"{area['start']:x}-{area['end']:x}",
            words.size(area["end"] - area["start"]),
            words.pages_size(area["merging"]) if area["merging"] else "",
            words.pages_size(area["zero"]) if area["zero"] else "",
            Text(words.safe(f"{area['perms']} {area['path']}", 60)),
            Text(words.safe(": ".join(filter(None, (area["reason"], area["detail"]))))),
        )
    if len(areas) > _LISTED:
        made.caption = Text(f"and {len(areas) - _LISTED:,} more ranges (all are in --json)")
        made.caption_justify = "left"
    return made if areas else None


def _refused(areas: Sequence[Mapping[str, Any]]) -> Table | None:
    """Sum up the ranges that are left alone, by reason, the largest first."""
    sums: dict[str, list[int]] = {}
    sentences = {area["reason"]: area["sentence"] for area in areas}
    for area in areas:
        one = sums.setdefault(area["reason"], [0, 0])
        one[0] += 1
        one[1] += area["end"] - area["start"]
    made = render.table(">ranges", ">size", "=reason", "what it means", title="Left alone")
    for reason, (number, nbytes) in sorted(sums.items(), key=lambda item: -item[1][1]):
        made.add_row(
            words.count(number),
            words.size(nbytes),
            Text(words.safe(reason, 40)),
            Text(words.safe(sentences[reason])),
        )
    return made if sums else None
