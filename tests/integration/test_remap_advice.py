"""What madvise has said of memory between the last look at its maps and the stop is not lost."""

# ruff: noqa: F401, F811  (fixtures are imported by their names)

from __future__ import annotations

import pytest
from kernel_victims import Victim
from remap_lab import Lab, content, done, lab, merged, run, says, snapshot

from ksmd.kernel import procfs
from ksmd.model.refusal import Reason
from ksmd.model.units import PAGE_SIZE
from ksmd.model.window import Op

pytestmark = pytest.mark.root

NPAGES = 64
SCRIPT = f"at = anon({NPAGES} * PAGE); fill(at, {NPAGES}); reply(at)\n"
ADVICE = {
    "dc": (10, Reason.DONTFORK),
    "dd": (16, Reason.DONTDUMP),
    "wf": (18, Reason.WIPEONFORK),
}


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
    lab: Lab, flag: str, first: int, npages: int
) -> None:
    advice, reason = ADVICE[flag]
    with Victim(SCRIPT) as victim:
        address = victim.ready
        subject = lab.adopt(victim.pid)
        extent = lab.extent_like(victim.pid, address, NPAGES)
        assert victim.ask(f"madvise({address}, {NPAGES} * PAGE, {advice})") == 0
        before, held = snapshot(victim.pid), content(victim.pid, address, NPAGES)
        result = lab.window(subject, [run(Op.MERGE, address, first, npages)], extent)
        assert [outcome.reason for outcome in result.outcomes] == [reason], says(result)
        assert snapshot(victim.pid) == before
        assert content(victim.pid, address, NPAGES) == held
        assert flagged(victim.pid, address, flag) == list(range(NPAGES))
        # and taken back by the program, it stands in nobody's way
        assert victim.ask(f"madvise({address}, {NPAGES} * PAGE, {advice + 1})") == 0
        assert done(lab.window(subject, [run(Op.MERGE, address, first, npages)], extent))
        assert merged(victim.pid, extent) == npages


def test_one_window_over_several_mappings_merges_just_those_without_a_flag(lab: Lab) -> None:
    with Victim(SCRIPT) as victim:
        address = victim.ready
        subject = lab.adopt(victim.pid)
        extent = lab.extent_like(victim.pid, address, NPAGES)
        said = {8: 10, 24: 16, 40: 18}  # eight pages each
        for first, advice in said.items():
            assert victim.ask(f"madvise({address} + {first} * PAGE, 8 * PAGE, {advice})") == 0
        held = content(victim.pid, address, NPAGES)
        records = [run(Op.MERGE, address, first, 8) for first in range(0, NPAGES, 8)]
        result = lab.window(subject, records, extent)
        reasons = [outcome.reason for outcome in result.outcomes]
        assert reasons == [
            None, Reason.DONTFORK, None, Reason.DONTDUMP, None, Reason.WIPEONFORK, None, None,
        ]  # fmt: skip
        assert merged(victim.pid, extent) == 5 * 8
        for (first, advice), flag in zip(said.items(), ADVICE, strict=True):
            assert ADVICE[flag][0] == advice
            assert flagged(victim.pid, address, flag) == list(range(first, first + 8))
        assert content(victim.pid, address, NPAGES) == held


@pytest.mark.parametrize("flag", ["dc", "dd"])
def test_a_flag_that_was_given_to_merged_pages_is_theirs_when_they_are_given_back(
    lab: Lab, flag: str
) -> None:
    """The record does not speak of it: the daemon had read the maps before."""
    advice, _ = ADVICE[flag]
    with Victim(SCRIPT) as victim:
        address = victim.ready
        subject = lab.adopt(victim.pid)
        extent = lab.extent_like(victim.pid, address, NPAGES)
        held = content(victim.pid, address, NPAGES)
        assert done(lab.window(subject, [run(Op.MERGE, address, 0, NPAGES)], extent))
        assert victim.ask(f"madvise({address} + 8 * PAGE, 4 * PAGE, {advice})") == 0
        undo = [run(Op.UNMERGE, address, first, n) for first, n in ((0, 8), (8, 4), (12, 52))]
        assert done(lab.window(subject, undo, extent))
        assert merged(victim.pid, extent) == 0
        assert flagged(victim.pid, address, flag) == [8, 9, 10, 11]
        assert content(victim.pid, address, NPAGES) == held


def test_a_record_that_still_speaks_of_a_flag_that_was_taken_back_gives_none(lab: Lab) -> None:
    with Victim(SCRIPT) as victim:
        address = victim.ready
        subject = lab.adopt(victim.pid)
        extent = lab.extent_like(victim.pid, address, NPAGES)
        assert done(lab.window(subject, [run(Op.MERGE, address, 0, NPAGES)], extent))
        record = run(Op.UNMERGE, address, 0, NPAGES)
        record = type(record)(record.op, record.start, record.length, record.offset, advice=2)
        assert done(lab.window(subject, [record], extent))
        assert flagged(victim.pid, address, "dc") == []
