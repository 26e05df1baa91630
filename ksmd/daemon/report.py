"""What the daemon says of itself: status, targets, plan, why. Reads state, changes nothing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import numpy as np

from ksmd.core.layout import VMA_BYTES
from ksmd.core.ledger import SlotSharing, headroom, profit
from ksmd.daemon.pipeline import Pipeline
from ksmd.daemon.state import Target
from ksmd.kernel import procfs
from ksmd.model.refusal import SENTENCES, Reason, Refusal
from ksmd.model.status import Status, TargetStatus
from ksmd.model.units import PAGE_SHIFT, PAGE_SIZE

#: A merged range in the middle of a VMA makes three VMAs of one.
_VMAS_PER_MAPPING = 2
#: Bytes of ranges in one reply.
_AREAS_BYTES = 1 << 19


def status(pipeline: Pipeline, paused: bool, pids: Iterable[int]) -> Status:
    """All counters. *pids* are our own processes, whose memory is a cost."""
    targets = list(pipeline.targets)
    sharing = pipeline.accounting.sharing
    zero_pages = sum(target.zero_pages for target in targets)
    tables = sum(domain.table_bytes for domain in pipeline.targets.domains.values())
    vmas = sum(len(target.mappings) for target in targets) * _VMAS_PER_MAPPING
    refused = pipeline.targets.refused_pages()
    if pipeline.last is not None:
        refused.update(pipeline.last.scan.refused)
        refused.update(pipeline.last.merge.refused)
        refused[Reason.VOLATILE] += pipeline.last.scan.volatile
    last = pipeline.last
    return Status(
        run=pipeline.targets.settings.run,
        paused=paused,
        settled=last is not None and last.settled,
        pages_shared=sharing.pages_shared,
        pages_sharing=sharing.pages_sharing,
        pages_unshared=sum(d.tables.stable for d in pipeline.targets.domains.values()),
        pages_volatile=pipeline.volatile,
        pages_scanned=pipeline.ledger.pages_scanned,
        pages_skipped=pipeline.ledger.pages_skipped,
        full_scans=pipeline.ledger.full_scans,
        zero_pages=zero_pages,
        cow_breaks=pipeline.ledger.cow_breaks,
        stops=pipeline.windows.stops.count,
        stop_ms_p99=round(pipeline.windows.stops.p99, 3),
        stop_ms_max=round(pipeline.windows.stops.worst, 3),
        general_profit=profit(
            sharing,
            zero_pages=zero_pages,
            vmas=vmas,
            table_bytes=tables,
            own_rss=own_memory(pids),
            store_pages=sum(d.store.npages for d in pipeline.targets.domains.values()),
        ),
        metadata_bytes=tables + vmas * VMA_BYTES,
        headroom_bytes=headroom(sharing, zero_pages),
        refusals=named(refused),
        targets=[target_status(pipeline, target) for target in targets],
    )


def targets(pipeline: Pipeline) -> list[dict[str, Any]]:
    """Every target's line, as JSON has it."""
    return [_columns(target_status(pipeline, target)) for target in pipeline.targets]


def own_memory(pids: Iterable[int]) -> int:
    """Resident bytes of our processes without the store, which is counted by pages."""
    return sum(map(procfs.anonymous_pages, pids)) << PAGE_SHIFT


def target_status(pipeline: Pipeline, target: Target) -> TargetStatus:
    """One target's line."""
    per_slot = pipeline.accounting.sharing.per_slot
    sharing = per_slot.get(target.slot, SlotSharing(0, 0))
    vmas = len(target.mappings) * _VMAS_PER_MAPPING
    return TargetStatus(
        pid=target.pid,
        name=target.selected.name,
        domain=target.selected.domain,
        merging_pages=sharing.merging_pages,
        zero_pages=target.zero_pages,
        profit=sharing.saved_bytes + target.zero_pages * PAGE_SIZE - vmas * VMA_BYTES,
        vmas_used=vmas,
        stops=target.stops.count,
        stop_ms_p99=round(target.stops.p99, 3),
        stop_ms_max=round(target.stops.worst, 3),
        cow_breaks=target.cow_breaks,
        refused=str(target.left_alone or ""),
    )


def named(refused: Counter[Reason]) -> dict[str, int]:
    """Counts by name, most frequent first, without zeros."""
    return {str(reason): int(count) for reason, count in refused.most_common() if count}


def refusal(reason: Reason, subject: str, detail: str = "") -> dict[str, str]:
    """One refusal with its sentence."""
    found = Refusal(reason, subject, detail)
    return {
        "reason": str(reason),
        "sentence": found.sentence,
        "subject": subject,
        "detail": detail,
    }


def plan(pipeline: Pipeline) -> dict[str, Any]:
    """What the next asked pass would merge, from what the tables know now."""
    totals = {"saved_pages": 0, "cost_bytes": 0, "extents": 0, "runs": 0, "zero_runs": 0}
    refused: Counter[Reason] = Counter()
    planned: dict[int, dict[str, Any]] = {}
    for domain in pipeline.targets.domains.values():
        found = pipeline.merger.plan(domain, asked=True)
        totals["saved_pages"] += found.saved_pages
        totals["cost_bytes"] += found.cost_bytes
        totals["extents"] += len(found.extents)
        totals["runs"] += len(found.merges)
        totals["zero_runs"] += len(found.zeros)
        refused.update(found.refused)
        for target in pipeline.targets:
            runs = found.merges[found.merges["target"] == target.slot]
            zeros = found.zeros[found.zeros["target"] == target.slot]
            if len(runs) or len(zeros):
                planned[target.pid] = {
                    "pid": target.pid,
                    "name": target.selected.name,
                    "runs": len(runs),
                    "pages": int(runs["npages"].sum()),
                    "zero_pages": int(zeros["npages"].sum()),
                }
    return totals | {"refusals": named(refused), "targets": list(planned.values())}


def why(pipeline: Pipeline, pid: int, address: int | None, start: int = 0) -> dict[str, Any] | None:
    """Why memory of *pid* is merged or not, from *start* on; None when it is no target."""
    target = pipeline.targets.by_pid(pid)
    if target is None:
        return None
    reason = target.left_alone
    areas = _areas(target, start)
    fit = _that_fit(areas)
    answer: dict[str, Any] = {
        "pid": pid,
        "name": target.selected.name,
        "domain": target.selected.domain,
        "target": True,
        "reason": str(reason or ""),
        "sentence": SENTENCES[reason] if reason else "",
        "detail": target.detail,
        "areas": areas[:fit],
    }
    if address is None:
        if fit < len(areas):
            answer["next"] = areas[fit]["start"]
    else:
        answer["areas"] = [area for area in areas if area["start"] <= address < area["end"]]
        answer["state"] = _state(target, address, answer["areas"])
    return answer


def _that_fit(areas: list[dict[str, Any]]) -> int:
    """Count the first ranges that one reply can hold: one at least."""
    size = 0
    for number, area in enumerate(areas):
        size += len(json.dumps(area))
        if size > _AREAS_BYTES and number:
            return number
    return len(areas)


def _area(start: int, end: int, perms: str, path: str) -> dict[str, Any]:
    return {
        "start": start,
        "end": end,
        "perms": perms,
        "path": path,
        "merging": 0,
        "zero": 0,
        "reason": "",
        "sentence": "",
        "detail": "",
    }


def _areas(target: Target, start: int) -> list[dict[str, Any]]:
    """Tell the ranges that begin at *start* or after it, ascending; no two begin at one address."""
    found = []
    for vma, _ in target.mappings:
        if vma.start < start:
            continue
        _, npages, shared = target.pagemap.sharing(vma.start, vma.end)
        merging = {"merging": int(npages[shared].sum())}
        found.append(_area(vma.start, vma.end, vma.perms, "") | merging)
    for area in target.areas:
        if area.start < start:
            continue
        edges = np.array([area.start >> PAGE_SHIFT, area.end >> PAGE_SHIFT], np.uint64)
        low, high = np.searchsorted(target.zeros, edges).tolist()
        found.append(
            _area(area.start, area.end, area.vma.perms, area.vma.path) | {"zero": high - low}
        )
    for refused in target.refused_ranges:
        if refused.start < start:
            continue
        behind = refused.vma
        found.append(
            _area(
                refused.start,
                refused.start + (refused.npages << PAGE_SHIFT),
                behind.perms if behind else "",
                behind.path if behind else "",
            )
            | {"reason": str(refused.reason), "sentence": SENTENCES[refused.reason]}
        )
    return sorted(found, key=lambda area: area["start"])


def _state(target: Target, address: int, areas: list[dict[str, Any]]) -> str:
    if not areas or areas[0]["reason"]:
        return "refused"
    page = address >> PAGE_SHIFT
    merged = target.mappings.vmas
    if np.any((merged.starts <= address) & (address < merged.ends)):
        shared, _ = target.pagemap.still_shared(page << PAGE_SHIFT, (page + 1) << PAGE_SHIFT)
        return "merged" if len(shared) else "volatile"
    if page in target.zeros:
        return "zero"
    present = target.pagemap.present(page << PAGE_SHIFT, (page + 1) << PAGE_SHIFT, 1)
    return "candidate" if len(present.pages) else "unread"


def summary(pipeline: Pipeline, paused: bool) -> str:
    """One line for the log and for systemd's STATUS=."""
    zero_pages = [target.zero_pages for target in pipeline.targets]
    shared, zeros = pipeline.accounting.sharing.pages_sharing, sum(zero_pages)
    return (
        f"saving {(shared + zeros) * PAGE_SIZE >> 20} MiB in {len(zero_pages)} targets"
        f" ({shared} pages shared, {zeros} zero pages),"
        f" {pipeline.ledger.full_scans} full scans" + (", paused" if paused else "")
    )


def as_dict(found: Status) -> dict[str, Any]:
    """Status as JSON has it."""
    return _columns(found) | {"targets": [_columns(target) for target in found.targets]}


def _columns(found: Status | TargetStatus) -> dict[str, Any]:
    """Give the fields by name: what dataclasses.asdict copies, all the way down, takes longer."""
    return {field.name: getattr(found, field.name) for field in fields(found)}
