"""What the targets of one file say against each other.

Works on plain mappings and lists, not on models, and passes over what it cannot read: a file that
is wrong in one place still gets its contradictions elsewhere reported in the same answer. Both the
models and the loader call it.

Overlaps are found by bisection, and targets that share many pids are compared once: a large file
must not hold up the daemon's reload.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple, TypeGuard

from ksmd.model.units import PAGE_SIZE

Path = tuple[str | int, ...]
Conflict = tuple[Path, str]

_WHOLE = (0, 1 << 64)


class _Span(NamedTuple):
    """[start, end) in bytes, claimed at ``path``; spans of one ``owner`` may overlap."""

    start: int
    end: int
    path: Path
    owner: Path


def conflicts(targets: object, default_regions: str = "anon") -> list[Conflict]:
    """Names given twice and regions that overlap, in ``targets`` as a settings file has them.

    Each answer is (path of the later of the two, what is wrong). Two targets that name the same
    pid may not claim the same memory. A heap and a list of ranges are taken to be apart: where a
    heap lies is not known from the file.
    """
    entries = {
        index: entry
        for index, entry in enumerate(targets if isinstance(targets, list | tuple) else ())
        if isinstance(entry, Mapping)
    }
    found = list(_names(entries))
    ranges = {index: _ranges(index, entry.get("regions")) for index, entry in entries.items()}
    for spans in ranges.values():
        for earlier, later in _overlaps(spans):
            where = f"{shown(earlier.path)}, {_hex(earlier)}"
            found.append((later.path, f"{_hex(later)} overlaps {where}"))
    keywords = {index: entry.get("regions", default_regions) for index, entry in entries.items()}
    told = set()
    for pid, group in _groups(entries):
        for earlier, later in _claims(group, keywords, ranges):
            if (later.path, earlier.owner) in told:
                continue
            told.add((later.path, earlier.owner))
            name = entries[int(earlier.path[1])].get("name")
            of = f" (target {name!r})" if isinstance(name, str) else ""
            what = f"claims the same memory as {shown(earlier.path)}{of}"
            found.append((later.path, f"{what}, and both match pid {pid}"))
    return found


def shown(path: Iterable[str | int]) -> str:
    """Write a path as ``targets[0].match.pid[1]``; odd keys are quoted."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
            continue
        plain = part.replace("_", "a").replace("-", "a").isalnum() and part.isascii()
        text += ("." if text else "") + (part if plain else ascii(part[:60]))
    return text


def _names(entries: Mapping[int, Mapping[object, object]]) -> Iterator[Conflict]:
    seen: dict[str, int] = {}
    for index, entry in entries.items():
        name = entry.get("name")
        if not isinstance(name, str):
            continue
        if name in seen:
            yield ("targets", index, "name"), f"{name!r} is the name of targets[{seen[name]}] too"
        else:
            seen[name] = index


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _ranges(index: int, regions: object) -> list[_Span]:
    spans = []
    for position, region in enumerate(regions if isinstance(regions, list | tuple) else ()):
        if not isinstance(region, Mapping):
            continue
        start, npages = region.get("start"), region.get("npages")
        if _is_int(start) and _is_int(npages) and npages > 0:
            path = ("targets", index, "regions", position)
            spans.append(_Span(start, start + npages * PAGE_SIZE, path, path))
    return spans


def _groups(
    entries: Mapping[int, Mapping[object, object]],
) -> list[tuple[int, tuple[int, ...]]]:
    """Group targets that name a common pid; each group comes once, with the first such pid."""
    users: dict[int, list[int]] = defaultdict(list)
    for index, entry in entries.items():
        match = entry.get("match")
        given = match.get("pid") if isinstance(match, Mapping) else None
        pids = given if isinstance(given, list | tuple) else (given,)
        for pid in dict.fromkeys(pid for pid in pids if _is_int(pid)):
            users[pid].append(index)
    groups: dict[tuple[int, ...], int] = {}
    for pid, indices in users.items():
        if len(indices) > 1:
            groups.setdefault(tuple(indices), pid)
    return [(pid, group) for group, pid in groups.items()]


def _claims(
    group: Sequence[int], keywords: Mapping[int, object], ranges: Mapping[int, list[_Span]]
) -> Iterator[tuple[_Span, _Span]]:
    """Pairs of claims of different targets on the same memory of one process."""
    heaps, elsewhere = [], []
    for index in group:
        owner: Path = ("targets", index)
        whole = _Span(*_WHOLE, (*owner, "regions"), owner)
        keyword = keywords[index]
        if keyword in ("anon", "heap"):
            heaps.append(whole)
        if keyword == "anon":
            elsewhere.append(whole)
        elsewhere += [span._replace(owner=owner) for span in ranges[index]]
    yield from _overlaps(heaps)
    yield from _overlaps(elsewhere)


class _Segment(NamedTuple):
    """A part of the address space, and the last span so far that was laid on it."""

    start: int
    end: int
    span: _Span


def _overlaps(spans: Iterable[_Span]) -> Iterator[tuple[_Span, _Span]]:
    """Find for each span one earlier span of another owner that it overlaps: (earlier, later).

    Spans come in the order of the file, those of one owner together. Laying each on top of what
    it covers keeps the segments apart from each other, so that both searches are bisections.
    """
    laid: list[_Segment] = []
    for _, group in groupby(spans, key=lambda span: span.owner):
        own = list(group)
        for span in own:
            first, last = _covered(laid, span)
            if first < last:
                yield laid[first].span, span
        for span in own:
            _lay(laid, span)


def _covered(laid: list[_Segment], span: _Span) -> tuple[int, int]:
    """Bounds of the slice of *laid* that *span* overlaps."""
    first = bisect_right(laid, span.start, key=lambda segment: segment.end)
    return first, bisect_left(laid, span.end, lo=first, key=lambda segment: segment.start)


def _lay(laid: list[_Segment], span: _Span) -> None:
    first, last = _covered(laid, span)
    pieces = [_Segment(span.start, span.end, span)]
    if first < last and laid[first].start < span.start:
        pieces.insert(0, laid[first]._replace(end=span.start))
    if first < last and laid[last - 1].end > span.end:
        pieces.append(laid[last - 1]._replace(start=span.end))
    laid[first:last] = pieces


def _hex(span: _Span) -> str:
    return f"[{span.start:#x}, {span.end:#x})"
