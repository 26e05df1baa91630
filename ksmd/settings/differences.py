"""What differs between two settings, by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Dotted paths of what differs between two effective settings, e.g. after a reload.

    Targets are told apart by name: ``targets.NAME`` alone means that it came or went, and
    ``targets`` alone that those in both stand in another order.
    """
    before, after = dict(_leaves(old)), dict(_leaves(new))
    paths = [path for path in {**before, **after} if before.get(path) != after.get(path)]
    names = set(_names(old)) ^ set(_names(new))
    stay = [[name for name in _names(content) if name not in names] for content in (old, new)]
    found = [
        ".".join(path[:2] if path[0] == "targets" and path[1] in names else path) for path in paths
    ]
    return list(dict.fromkeys(found + (["targets"] if stay[0] != stay[1] else [])))


def _names(content: Mapping[str, Any]) -> list[str]:
    return [target["name"] for target in content["targets"]]


def _leaves(content: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield from _flat({key: value for key, value in content.items() if key != "targets"}, ())
    for target in content["targets"]:
        yield from _flat(target, ("targets", target["name"]))


def _flat(
    content: Mapping[str, Any], path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flat(value, (*path, key))
        else:
            yield (*path, key), value
