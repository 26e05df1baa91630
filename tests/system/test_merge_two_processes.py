"""Two processes that know nothing of each other, nor of ksmd: merged, written to, given back."""

from __future__ import annotations

import numpy as np
import pytest
from harness import (
    Daemon,
    Oracle,
    contents,
    descriptors,
    frames,
    layout,
    mappings,
    memory,
    private,
    pss,
    settings_for,
    store_mappings,
    target,
)

pytestmark = pytest.mark.root

ENOUGH = 0.95


@pytest.fixture
def two(victims):
    """Two victims with the same data at different addresses."""
    return [victims(pages=2048, offset=offset, layout="runs:long") for offset in (3, 77)]


@pytest.fixture
def merged(two, daemons) -> Daemon:
    daemon = daemons(settings_for(*two))
    daemon.scan()
    return daemon


def check_all(victims) -> None:
    for victim in victims:
        assert victim.check(), victim.report()


def test_equal_pages_of_two_processes_come_to_lie_in_the_same_frames(two, daemons):
    oracle = Oracle(*two)
    before = [frames(victim) for victim in two]
    assert not set(before[0].tolist()) & set(before[1].tolist())
    daemon = daemons(settings_for(*two))
    answer = daemon.scan()
    assert answer["settled"]
    assert oracle.duplicates == 2046
    assert oracle.share() >= ENOUGH
    same = np.count_nonzero(frames(two[0]) == frames(two[1]))
    print(f"{same} of {oracle.duplicates} pages in the same frame; {answer}")
    assert same >= ENOUGH * oracle.duplicates
    check_all(two)


def test_with_regions_anon_the_arena_is_found_without_being_told(two, daemons):
    oracle = Oracle(*two)
    daemon = daemons({"version": 1, "targets": [target(v, regions="anon") for v in two]})
    daemon.scan()
    assert oracle.share() >= ENOUGH
    check_all(two)
    daemon.give_back()
    assert [store_mappings(victim.pid) for victim in two] == [[], []]
    check_all(two)


def test_the_heap_merges_when_it_alone_is_registered(victims, daemons):
    both = [victims(pages=512, heap=True) for _ in range(2)]
    oracle = Oracle(*both)
    daemon = daemons({"version": 1, "targets": [target(v, regions="heap") for v in both]})
    daemon.scan()
    assert oracle.share() >= ENOUGH
    check_all(both)


def test_a_write_in_one_is_not_seen_by_the_other(two, merged):
    before = [frames(victim) for victim in two]
    untouched = contents(two[1])
    two[0].command("write 100 3")
    two[0].command("write 1500")
    check_all(two)
    assert contents(two[1]) == untouched
    assert np.array_equal(frames(two[1]), before[1])
    assert np.flatnonzero(frames(two[0]) != before[0]).tolist() == [100, 101, 102, 1500]


def test_memory_is_saved_by_the_merge_and_returns_on_unmerge(two, daemons):
    oracle = Oracle(*two)
    daemon = daemons(settings_for(*two))
    own, proportional = private(two), pss(two)
    daemon.scan()
    own_merged, proportional_merged = private(two), pss(two)
    print(
        f"pages: private {own} -> {own_merged}, Pss {proportional} -> {proportional_merged};"
        f" {oracle.duplicates} duplicates"
    )
    # nobody owns a merged page: both copies are gone from private memory, one is in the store
    assert own - own_merged >= ENOUGH * 2 * oracle.duplicates
    assert proportional - proportional_merged >= ENOUGH * oracle.duplicates
    answer = daemon.give_back()
    assert answer["pages"] >= ENOUGH * 2 * oracle.duplicates
    assert oracle.saved() == 0
    assert abs(private(two) - own) < 0.02 * own
    assert abs(pss(two) - proportional) < 0.02 * proportional
    check_all(two)


def test_after_unmerge_the_store_holds_nothing_any_more(two, merged):
    def of_the_store() -> int:
        return sum(
            end - start for start, end, _, path in mappings(merged.pid) if "/memfd:ksmd-" in path
        )

    assert of_the_store() >= 2046 * 4096
    merged.give_back()
    assert of_the_store() == 0
    assert memory(merged.pid)["Locked"] == 0


def test_nothing_of_ours_is_left_in_a_target_after_unmerge(two, daemons):
    before = [layout(victim.pid) for victim in two]
    daemon = daemons(settings_for(*two))
    daemon.scan()
    assert all(store_mappings(victim.pid) for victim in two)
    daemon.give_back()
    assert [store_mappings(victim.pid) for victim in two] == [[], []]
    assert [layout(victim.pid) for victim in two] == before
    daemon.allow_again()
    daemon.scan()
    assert all(store_mappings(victim.pid) for victim in two)
    assert daemon.stop() == 0
    assert [store_mappings(victim.pid) for victim in two] == [[], []]
    assert [layout(victim.pid) for victim in two] == before
    check_all(two)


def test_the_descriptor_table_is_the_same_before_a_merge_after_it_and_after_unmerge(two, daemons):
    before = [descriptors(victim.pid) for victim in two]
    daemon = daemons(settings_for(*two))
    for _ in range(3):
        daemon.scan()
        assert all(store_mappings(victim.pid) for victim in two)
        assert [descriptors(victim.pid) for victim in two] == before
        two[0].command("write 5 40")  # a CoW break to merge again, by yet another window
        two[0].command("restore 5 40")
        daemon.scan()
        assert [descriptors(victim.pid) for victim in two] == before
        daemon.give_back()
        assert [descriptors(victim.pid) for victim in two] == before
        daemon.allow_again()
    assert daemon.stop() == 0
    assert [descriptors(victim.pid) for victim in two] == before


def test_unmerge_of_one_target_leaves_the_others_merged(victims, daemons):
    three = [victims(pages=256) for _ in range(3)]
    oracle, rest = Oracle(*three), Oracle(*three[1:])
    daemon = daemons(settings_for(*three))
    daemon.scan()
    assert oracle.share() == 1
    assert daemon.give_back("--pid", three[0].pid) == {"pages": 256}
    assert store_mappings(three[0].pid) == []
    assert rest.share() == 1
    check_all(three)


def test_domains_with_equal_content_share_no_frame(victims, daemons):
    four = [victims(pages=512, layout="mixed") for _ in range(4)]
    domains = ["a", "a", "b", "b"]
    pairs = Oracle(*four[:2]), Oracle(*four[2:])
    daemon = daemons(
        {
            "version": 1,
            "targets": [target(v, domain=d) for v, d in zip(four, domains, strict=True)],
        }
    )
    daemon.scan()
    assert [pair.share() >= ENOUGH for pair in pairs] == [True, True]
    shared = [
        set(frames(one).tolist()) | set(frames(other).tolist())
        for one, other in (four[:2], four[2:])
    ]
    assert shared[0] & shared[1] <= {0}
    assert not set(store_mappings(four[0].pid)) & set(store_mappings(four[2].pid))
    check_all(four)


def test_targets_of_different_users_share_nothing_when_no_domain_is_named(victims, daemons):
    ours, theirs = victims(pages=256), victims(pages=256, uid=65534)
    across, within = Oracle(ours, theirs), Oracle(ours)
    daemon = daemons({"version": 1, "targets": [target(v, domain=None) for v in (ours, theirs)]})
    daemon.scan()
    assert {line["domain"] for line in daemon.status()["targets"]} == {"uid:0", "uid:65534"}
    assert across.saved() == within.saved() == 0
    check_all([ours, theirs])
