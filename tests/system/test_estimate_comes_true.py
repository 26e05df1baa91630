"""What ``estimate`` promises is what merging then saves; and neither disturbs a family of forks."""

from __future__ import annotations

import json

import numpy as np
import pytest
from harness import frames, ksmctl, mappings, memory, pss, settings_for

from ksmd.cli.demo_workers import Sizes, Worker
from ksmd.kernel import pageentries
from ksmd.kernel.pagemap import PageMap

pytestmark = pytest.mark.root


@pytest.fixture
def workers():
    """The demo's workers, smaller: 3 with 8 MiB in common."""
    made = [Worker(number, Sizes.of(8)) for number in range(3)]
    try:
        for worker in made:
            worker.wait_ready()
        yield made
    finally:
        for worker in made:
            worker.kill()


def resident(pids) -> int:
    """Distinct frames of all writable private memory of some processes, the zero page left out."""
    found: set[int] = set()
    for pid in pids:
        with PageMap(pid) as pagemap:
            for start, end, perms, path in mappings(pid):
                ours = "/memfd:ksmd" in path
                if perms.startswith("rw-p") and (ours or not path.startswith("/")):
                    entries = pagemap.entries(start >> 12, (end - start) >> 12)
                    found.update(np.unique(pageentries.pfn(entries)).tolist())
    return len(found - {0, pageentries.zero_pfn()})


def estimate(*arguments: object) -> dict:
    done = ksmctl("--json", "estimate", *arguments)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_the_figure_is_within_five_percent_of_what_merging_saves(workers, daemons):
    pids = [worker.pid for worker in workers]
    sums = [worker.sums() for worker in workers]
    promised = estimate("--pid", *pids)["total"]["saved_pages"]
    targets = [{"name": "demo", "match": {"pid": pids}, "domain": "demo", "regions": "anon"}]
    before = resident(pids)
    daemon = daemons({"version": 1, "targets": targets})
    daemon.scan()
    saved = before - resident(pids)
    status = daemon.status()
    counted = status["pages_sharing"] + status["zero_pages"]
    print(f"estimated {promised} pages, saved {saved}, counted {counted}")
    assert abs(promised - saved) <= 0.05 * saved
    assert abs(counted - saved) <= 0.05 * saved
    assert [worker.sums() for worker in workers] == sums


def test_looking_at_a_family_of_forks_leaves_its_memory_as_it_was(actors, daemons):
    parent = actors(4096)
    child_pid = parent.ask("fork")["pid"]

    class Child:
        pid = child_pid
        region = parent.region

    family = [parent, Child()]
    before = [frames(one) for one in family]
    assert np.array_equal(before[0], before[1])
    own = [memory(one.pid)["Pss"] for one in family]
    total = estimate("--pid", parent.pid, child_pid)["total"]
    print(f"estimate of a family that shares 4096 pages: {total}")
    assert total["duplicates_across"] < 200
    daemon = daemons(settings_for(*family))
    daemon.scan()
    status = daemon.status()
    assert (status["pages_shared"], status["pages_sharing"]) == (0, 0)
    assert status["refusals"]["fork-shared"] == 2 * 4096
    assert all(np.array_equal(frames(one), before[0]) for one in family)
    # un-sharing 4,096 pages would add 2,048 to each
    assert all(
        abs(memory(one.pid)["Pss"] - old) < 200 for one, old in zip(family, own, strict=True)
    )
    assert parent.ask("child sum") == parent.ask("sum")


def test_a_family_of_forks_beside_a_stranger_with_the_same_data_is_not_unshared(actors, daemons):
    parent, stranger, twin = (actors(1024) for _ in range(3))
    child_pid = parent.ask("fork")["pid"]

    class Child:
        pid = child_pid
        region = parent.region

    before = frames(parent)
    total = pss([parent, Child()])
    daemon = daemons(settings_for(parent, Child(), stranger, twin))
    daemon.scan()
    assert daemon.status()["pages_sharing"] == 1024
    assert np.array_equal(frames(stranger), frames(twin))
    assert np.array_equal(frames(parent), before)
    assert np.array_equal(frames(Child()), before)
    assert abs(pss([parent, Child()]) - total) < 100
    assert parent.ask("child sum") == parent.ask("sum") == stranger.ask("sum")
