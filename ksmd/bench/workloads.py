"""The memory that is merged: seven workloads, from the easiest to the real."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Workload:
    """``layout``: what worker.c calls it, "" for real workers that load a file; ``huge``: THP."""

    name: str
    title: str
    layout: str
    huge: bool = False

    @property
    def real(self) -> bool:
        """Workers that load a file instead of laying pages out."""
        return not self.layout


WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload("W1", "every page has its equal in every victim, in the same order", "same"),
        Workload("W2", "half the pages, scattered singly and in different order", "scattered"),
        Workload("W3", "all pages unique", "unique"),
        Workload("W4", "half the pages zero, singly at random places", "zeros"),
        Workload("W5", "as W1, on huge pages", "same", huge=True),
        Workload("W6", "half the pages, in runs of 8 on average, in different order", "runs"),
        Workload("W7", "numpy workers that load the same file, and scratch memory", ""),
    )
}
