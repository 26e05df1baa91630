"""Settings as the daemon holds them: plain values, already judged.

What each means, its default and its bounds are in :mod:`ksmd.settings.models`, whose fields these
are. The library behind the models takes more memory than all else that the daemon knows about
settings; so they are judged in a process of their own (:mod:`ksmd.settings.apart`), and only this
comes back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

LEAST_TABLE_SIZE = 1024

Regions = Literal["anon", "heap"] | tuple["Region", ...]


@dataclass(frozen=True, slots=True)
class Scan:
    """How fast memory is read."""

    pages_to_scan: int
    sleep_millisecs: int
    max_pages_to_merge: int
    cpu_percent: int
    advisor: Literal["none", "scan-time"]
    target_scan_time: int
    advisor_max_cpu: int
    advisor_min_pages_to_scan: int
    advisor_max_pages_to_scan: int


@dataclass(frozen=True, slots=True)
class TableSizes:
    """Sizes of the tables, in pages (one entry per page), with nothing left to be chosen."""

    page_hash_size: int
    rmap_hash_size: int
    sha1_hash_size: int


@dataclass(frozen=True, slots=True)
class Tables:
    """Sizes of the tables; 0: from memory."""

    page_hash_size: int
    rmap_hash_size: int
    sha1_hash_size: int

    def resolved(self, free_pages: int) -> TableSizes:
        """Replace each 0 by its share of ``free_pages`` (4 KiB pages), as the seed did at load."""

        def size(given: int, divisor: int) -> int:
            return given or max(LEAST_TABLE_SIZE, free_pages // divisor)

        return TableSizes(
            page_hash_size=size(self.page_hash_size, 10),
            rmap_hash_size=size(self.rmap_hash_size, 10),
            sha1_hash_size=size(self.sha1_hash_size, 32),
        )


@dataclass(frozen=True, slots=True)
class Window:
    """How long and how often a target is stopped."""

    deadline_ms: int
    stop_ms: int
    max_pages: int
    max_runs: int
    interval_secs: int


@dataclass(frozen=True, slots=True)
class Store:
    """What shared pages are made of."""

    large_folios: bool


@dataclass(frozen=True, slots=True)
class Limits:
    """What merging may cost a target, and what one user may register."""

    vma_percent: int
    regions_per_user: int


@dataclass(frozen=True, slots=True)
class Match:
    """Which processes a target means; None: whatever it is."""

    exe: str | None
    comm: str | None
    cmdline: str | None
    user: str | None
    cgroup: str | None
    unit: str | None
    pid: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class Region:
    """A registered address range."""

    start: int
    npages: int


@dataclass(frozen=True, slots=True)
class Target:
    """One entry of ``targets``."""

    name: str
    match: Match
    regions: Regions
    domain: str | None
    accept_seccomp_risk: bool
    min_age_secs: int


@dataclass(frozen=True, slots=True)
class Settings:
    """All of them."""

    version: int
    run: Literal["stop", "merge", "unmerge"]
    on_stop: Literal["unmerge", "keep"]
    socket: Path
    socket_mode: str
    socket_group: str
    scan: Scan
    tables: Tables
    window: Window
    store: Store
    limits: Limits
    targets: tuple[Target, ...]

    def resolved_tables(self, free_pages: int) -> TableSizes:
        """Sizes of the tables on a host with ``free_pages`` free 4 KiB pages."""
        return self.tables.resolved(free_pages)


def settings_of(content: Mapping[str, Any]) -> Settings:
    """Take settings as JSON has them, every key of every model given."""
    sections = {
        "socket": Path(content["socket"]),
        "scan": Scan(**content["scan"]),
        "tables": Tables(**content["tables"]),
        "window": Window(**content["window"]),
        "store": Store(**content["store"]),
        "limits": Limits(**content["limits"]),
        "targets": tuple(map(_target, content["targets"])),
    }
    return Settings(**{**content, **sections})


def _target(content: Mapping[str, Any]) -> Target:
    match, regions = content["match"], content["regions"]
    pids = match["pid"] and tuple(match["pid"])
    if not isinstance(regions, str):
        regions = tuple(Region(**region) for region in regions)
    return Target(**{**content, "match": Match(**{**match, "pid": pids}), "regions": regions})
