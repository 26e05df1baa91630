"""A pipeline with a tracer and a pager of its own, and victims for it: no daemon, step by step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from kernel_victims import Victim

from ksmd.daemon.pipeline import Pipeline
from ksmd.daemon.targets import Targets
from ksmd.guard.client import Pager
from ksmd.kernel.iouring import PinRing
from ksmd.remap.engine import Engine
from ksmd.settings import Settings


@contextlib.contextmanager
def running_pipeline() -> Iterator[Pipeline]:
    settings = Settings.model_validate({"version": 1})
    pager, engine = Pager(), Engine()
    pager.start()
    engine.start()
    targets = Targets(settings, settings.resolved_tables(1 << 20), PinRing(), pager)
    yield Pipeline(targets, engine, pager)
    for target in targets:
        targets.drop(target)
    engine.close()
    pager.close(force=True)


def select(pipeline: Pipeline, npages: Mapping[Victim, int]) -> None:
    """Have victims for targets, in one domain: so many pages of each, from where it is ready."""
    chosen = [
        {"name": f"v{v.pid}", "match": {"pid": v.pid}, "domain": "d",
         "regions": [{"start": v.ready, "npages": count}]}
        for v, count in npages.items()
    ]  # fmt: skip
    pipeline.targets.settings = Settings.model_validate({"version": 1, "targets": chosen})
    pipeline.targets.refresh()
