"""What the running kernel gives."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Feature:
    """One probed feature. ``without``: what its absence costs; ``needed``: no merge without it."""

    name: str
    present: bool
    needed: bool
    detail: str
    without: str
