"""What ``Status`` says, as Prometheus metrics.

All names begin with ``ksmd_user_``: node_exporter calls the counters of the kernel's KSM
``node_ksmd_*``, and the kernel's own thread is named ksmd too; sums over the two would be wrong.

Targets are labelled by the name of their entry in the settings and by domain, not by pid: pids come
and go, and a time series for each would never end. A process that leaves takes its share of its
entry's figures along, so those are gauges. What is text in a target comes from the settings; no
content and no address of memory is exported.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ksmd.model.errors import KsmdError

PREFIX = "ksmd_user_"
_MILLISECOND = 1e-3


class Told(NamedTuple):
    """One field of Status and the metric that it becomes."""

    field: str
    metric: str
    help: str


GAUGES = (
    Told("pages_shared", "pages_shared", "Store pages that somebody shares."),
    Told("pages_sharing", "pages_sharing", "Pages saved by sharing."),
    Told("pages_unshared", "pages_unshared", "Pages that are scanned and have no equal."),
    Told("pages_volatile", "pages_volatile", "Pages that changed since the scan before."),
    Told("zero_pages", "zero_pages", "Pages given back because they were zero."),
    Told("general_profit", "general_profit_bytes", "Bytes saved after our own costs."),
    Told("metadata_bytes", "metadata_bytes", "Bytes of tables and of VMAs in targets."),
    Told("headroom_bytes", "headroom_bytes", "Bytes needed if all pages were un-shared."),
    Told("paused", "paused", "1 while scanning is paused."),
    Told("settled", "settled", "1 when the last pass found nothing more to merge."),
)
COUNTERS = (
    Told("pages_scanned", "pages_scanned", "Pages scanned."),
    Told("pages_skipped", "pages_skipped", "Pages left alone by scans."),
    Told("full_scans", "full_scans", "Full scans completed."),
    Told("cow_breaks", "cow_breaks", "Shared pages that were written to and became private."),
    Told("stops", "stops", "Stop windows of all processes."),
)
#: Per entry of the settings: sums over its processes.
TARGET_SUMS = (
    Told("merging_pages", "target_merging_pages", "Pages that are merged."),
    Told("zero_pages", "target_zero_pages", "Pages given back because they were zero."),
    Told("profit", "target_profit_bytes", "Bytes saved, after the cost of VMAs."),
    Told("vmas_used", "target_vmas", "VMAs added by merging."),
    Told("stops", "target_stops", "Stop windows of the processes that run now."),
    Told("cow_breaks", "target_cow_breaks", "CoW breaks of the processes that run now."),
)
_LABELS = ("name", "domain")


class StatusCollector(Collector):
    """Asks for the status at each scrape. *ask* gives Status as the control socket does.

    When it raises KsmdError there is ``ksmd_user_up 0`` and nothing else: stale figures would look
    like good ones.
    """

    def __init__(self, ask: Callable[[], Mapping[str, Any]]) -> None:
        self._ask = ask

    def collect(self) -> Iterable[Metric]:
        """Ask, and give all metrics."""
        begun = time.monotonic()
        try:
            status: Mapping[str, Any] | None = self._ask()
        except KsmdError:
            status = None
        yield _gauge("up", "1 when ksmd answered.", float(status is not None))
        yield _gauge("scrape_seconds", "Time ksmd took to answer.", time.monotonic() - begun)
        if status is not None:
            yield from metrics(status)

    def describe(self) -> Iterable[Metric]:
        """Describe nothing: registering must not ask the daemon."""
        return ()


def metrics(status: Mapping[str, Any]) -> Iterator[Metric]:
    """Make the metrics of one status."""
    for told in GAUGES:
        yield _gauge(told.metric, told.help, float(status[told.field]))
    for told in COUNTERS:
        counter = CounterMetricFamily(PREFIX + told.metric, told.help)
        counter.add_metric((), float(status[told.field]))
        yield counter
    for which, text in (
        ("p99", "99 of 100 of the last stop windows took no longer."),
        ("max", "The longest stop window."),
    ):
        yield _gauge(f"stop_seconds_{which}", text, status[f"stop_ms_{which}"] * _MILLISECOND)
    mode = GaugeMetricFamily(PREFIX + "run", "1 for what ksmd does (run:).", labels=["run"])
    for name in ("stop", "merge", "unmerge"):
        mode.add_metric([name], float(status["run"] == name))
    yield mode
    refusals = GaugeMetricFamily(
        PREFIX + "refusals", "Pages, or processes, left alone by reason.", labels=["reason"]
    )
    for reason, count in status["refusals"].items():
        refusals.add_metric([reason], float(count))
    yield refusals
    yield from _targets(status["targets"])


def _targets(targets: Iterable[Mapping[str, Any]]) -> Iterator[Metric]:
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for target in targets:
        groups.setdefault((target["name"], target["domain"]), []).append(target)
    processes = _per_target("target_processes", "Processes that the entry selects.")
    refused = _per_target("target_refused", "Processes that are left alone as a whole.")
    slowest = _per_target("target_stop_seconds_max", "The longest stop window.")
    sums = [(told, _per_target(told.metric, told.help)) for told in TARGET_SUMS]
    for labels, members in groups.items():
        processes.add_metric(labels, len(members))
        refused.add_metric(labels, sum(bool(one["refused"]) for one in members))
        slowest.add_metric(labels, max(one["stop_ms_max"] for one in members) * _MILLISECOND)
        for told, family in sums:
            family.add_metric(labels, sum(one[told.field] for one in members))
    yield from (processes, refused, slowest)
    yield from (family for _, family in sums)


def _per_target(name: str, text: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(PREFIX + name, text, labels=_LABELS)


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(PREFIX + name, text, value=value)
