"""What madvise has said of memory between the last look at its maps and the stop is not lost."""

# ruff: noqa: F401, F811  (fixtures are imported by their names)

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
from kernel_victims import Victim
from remap_lab import Lab, Subject, content, done, lab, merged, run, says, snapshot

from ksmd.kernel import procfs
from ksmd.kernel.memfd import ExtentMap
from ksmd.model.refusal import Reason
from ksmd.model.units import PAGE_SIZE
from ksmd.model.window import Advice, Op

pytestmark = pytest.mark.root

NPAGES = 64
SCRIPT = f"at = anon({NPAGES} * PAGE); fill(at, {NPAGES}); reply(at)\n"
ADVICE = {
    "dc": (10, Reason.DONTFORK),
    "dd": (16, Reason.DONTDUMP),
    "wf": (18, Reason.WIPEONFORK),
}


@dataclass
class Arena:
    """A victim's NPAGES pages, an extent like them, and the victim as the lab knows it."""

    victim: Victim
    address: int
    subject: Subject
    extent: ExtentMap

    @property
    def pid(self) -> int:
        return self.victim.pid

    def advise(self, first: int, npages: int, advice: int) -> None:
        at = f"{self.address} + {first} * PAGE"
        assert self.victim.ask(f"madvise({at}, {npages} * PAGE, {advice})") == 0


@pytest.fixture
def arena(lab: Lab) -> Iterator[Arena]:
    with Victim(SCRIPT) as victim:
        subject, extent = lab.adopt(victim.pid), lab.extent_like(victim.pid, victim.ready, NPAGES)
        yield Arena(victim, victim.ready, subject, extent)


def flagged(pid: int, address: int, flag: str) -> list[int]:
    """Pages of the arena whose mapping has the flag."""
    found = []
    for vma in procfs.smaps(pid):
        if flag in vma.flags:
            found += range((vma.start - address) // PAGE_SIZE, (vma.end - address) // PAGE_SIZE)
    return [page for page in found if 0 <= page < NPAGES]


@pytest.mark.parametrize("flag", ADVICE)
@pytest.mark.parametrize(("first", "npages"), [(0, NPAGES), (0, 1), (63, 1), (5, 1), (20, 16)])
def test_a_flag_that_nobody_knew_of_keeps_the_page_from_being_merged(
    lab: Lab, arena: Arena, flag: str, first: int, npages: int
) -> None:
    advice, reason = ADVICE[flag]
    record = run(Op.MERGE, arena.address, first, npages)
    arena.advise(0, NPAGES, advice)
    before, held = snapshot(arena.pid), content(arena.pid, arena.address, NPAGES)
    result = lab.window(arena.subject, [record], arena.extent)
    assert [outcome.reason for outcome in result.outcomes] == [reason], says(result)
    assert snapshot(arena.pid) == before
    assert content(arena.pid, arena.address, NPAGES) == held
    assert flagged(arena.pid, arena.address, flag) == list(range(NPAGES))
    # and taken back by the program, it stands in nobody's way
    arena.advise(0, NPAGES, advice + 1)
    assert done(lab.window(arena.subject, [record], arena.extent))
    assert merged(arena.pid, arena.extent) == npages


def test_one_window_over_several_mappings_merges_just_those_without_a_flag(
    lab: Lab, arena: Arena
) -> None:
    said = {8: 10, 24: 16, 40: 18}  # eight pages each
    for first, advice in said.items():
        arena.advise(first, 8, advice)
    held = content(arena.pid, arena.address, NPAGES)
    records = [run(Op.MERGE, arena.address, first, 8) for first in range(0, NPAGES, 8)]
    result = lab.window(arena.subject, records, arena.extent)
    reasons = [outcome.reason for outcome in result.outcomes]
    assert reasons == [
        None, Reason.DONTFORK, None, Reason.DONTDUMP, None, Reason.WIPEONFORK, None, None,
    ]  # fmt: skip
    assert merged(arena.pid, arena.extent) == 5 * 8
    for (first, advice), flag in zip(said.items(), ADVICE, strict=True):
        assert ADVICE[flag][0] == advice
        assert flagged(arena.pid, arena.address, flag) == list(range(first, first + 8))
    assert content(arena.pid, arena.address, NPAGES) == held


@pytest.mark.parametrize("flag", ["dc", "dd"])
def test_a_flag_that_was_given_to_merged_pages_is_theirs_when_they_are_given_back(
    lab: Lab, arena: Arena, flag: str
) -> None:
    """The record does not speak of it: the daemon had read the maps before."""
    held = content(arena.pid, arena.address, NPAGES)
    merge = run(Op.MERGE, arena.address, 0, NPAGES)
    assert done(lab.window(arena.subject, [merge], arena.extent))
    arena.advise(8, 4, ADVICE[flag][0])
    undo = [run(Op.UNMERGE, arena.address, first, n) for first, n in ((0, 8), (8, 4), (12, 52))]
    assert done(lab.window(arena.subject, undo, arena.extent))
    assert merged(arena.pid, arena.extent) == 0
    assert flagged(arena.pid, arena.address, flag) == [8, 9, 10, 11]
    assert content(arena.pid, arena.address, NPAGES) == held


def test_a_record_that_still_speaks_of_a_flag_that_was_taken_back_gives_none(
    lab: Lab, arena: Arena
) -> None:
    merge = run(Op.MERGE, arena.address, 0, NPAGES)
    assert done(lab.window(arena.subject, [merge], arena.extent))
    undo = replace(run(Op.UNMERGE, arena.address, 0, NPAGES), advice=Advice.DONTFORK)
    assert done(lab.window(arena.subject, [undo], arena.extent))
    assert flagged(arena.pid, arena.address, "dc") == []


@pytest.mark.parametrize(
    ("flag", "said", "advice"), [("hg", Advice.HUGEPAGE, 14), ("nh", Advice.NOHUGEPAGE, 15)]
)
def test_what_was_said_of_huge_pages_is_kept_by_each_mapping_that_is_made_anew(
    lab: Lab, arena: Arena, flag: str, said: Advice, advice: int
) -> None:
    held = content(arena.pid, arena.address, NPAGES)
    arena.advise(0, NPAGES, advice)
    merge = [replace(run(Op.MERGE, arena.address, first, 8), advice=said) for first in (0, 24)]
    assert done(lab.window(arena.subject, merge, arena.extent))
    arena.victim.ask(f"poke({arena.address} + 3 * PAGE, peek({arena.address} + 3 * PAGE))")
    again = replace(run(Op.REMERGE, arena.address, 3, 1), advice=said)
    assert done(lab.window(arena.subject, [again], arena.extent))
    assert merged(arena.pid, arena.extent) == 16
    assert flagged(arena.pid, arena.address, flag) == list(range(NPAGES))
    parts = (0, 3), (3, 1), (4, 4), (24, 8)
    undo = [replace(run(Op.UNMERGE, arena.address, *part), advice=said) for part in parts]
    assert done(lab.window(arena.subject, undo, arena.extent))
    assert merged(arena.pid, arena.extent) == 0
    assert flagged(arena.pid, arena.address, flag) == list(range(NPAGES))
    assert content(arena.pid, arena.address, NPAGES) == held


@pytest.mark.parametrize(
    ("said", "advice"), [(Advice.NONE, 0), (Advice.HUGEPAGE, 14), (Advice.NOHUGEPAGE, 15)]
)
def test_runs_that_continue_each_other_become_one_mapping_whatever_was_said_of_huge_pages(
    lab: Lab, arena: Arena, said: Advice, advice: int
) -> None:
    """A long run is cut to fit into windows: that is to cost no mappings."""
    if said is not Advice.NONE:
        arena.advise(0, NPAGES, advice)
    for parts in ((0, 16), (16, 24)), ((40, 8),):
        merge = [replace(run(Op.MERGE, arena.address, *part), advice=said) for part in parts]
        assert done(lab.window(arena.subject, merge, arena.extent))
    mapped = [vma for vma in procfs.smaps(arena.pid) if vma.inode == arena.extent.inode]
    assert [(vma.start, vma.end) for vma in mapped] == [
        (arena.address, arena.address + 48 * PAGE_SIZE)
    ]
