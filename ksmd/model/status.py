"""The counters, with the meanings that /sys/kernel/mm/ksm gives them (admin-guide/mm/ksm.rst)."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class TargetStatus:
    """One target. Sizes in pages, profit in bytes, stops in milliseconds."""

    pid: int
    name: str
    domain: str
    merging_pages: int = 0
    zero_pages: int = 0
    profit: int = 0
    vmas_used: int = 0
    stops: int = 0
    stop_ms_p99: float = 0.0
    stop_ms_max: float = 0.0
    cow_breaks: int = 0
    refused: str = ""


@dataclass(slots=True)
class Status:
    """All of the daemon. Every field is documented in ksmctl(1)."""

    run: str = "merge"
    paused: bool = False
    settled: bool = False
    pages_shared: int = 0
    pages_sharing: int = 0
    pages_unshared: int = 0
    pages_volatile: int = 0
    pages_scanned: int = 0
    pages_skipped: int = 0
    full_scans: int = 0
    zero_pages: int = 0
    cow_breaks: int = 0
    stops: int = 0
    stop_ms_p99: float = 0.0
    stop_ms_max: float = 0.0
    general_profit: int = 0
    metadata_bytes: int = 0
    headroom_bytes: int = 0
    refusals: dict[str, int] = field(default_factory=dict)
    targets: list[TargetStatus] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict)
