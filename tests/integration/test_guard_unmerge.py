"""While merged pages are given back, children that fork makes are given nothing back to life."""

# ruff: noqa: F401, F811  (fixtures are imported by their names)

from __future__ import annotations

import pytest
from kernel_victims import Victim
from remap_lab import Lab, done, lab, run

from ksmd.kernel.memory import Memory
from ksmd.model.units import PAGE_SIZE
from ksmd.model.window import Op

pytestmark = pytest.mark.root

NPAGES = 64
DROPPED = (0, 5, 6, 7, 10, 63)
MADV_DONTNEED = 4


def test_a_child_forked_before_a_window_begins_has_zeros_where_its_parent_dropped_pages(
    lab: Lab,
) -> None:
    """A window is announced before its target is stopped, and may be put off by any thread."""
    with Victim(f"at = anon({NPAGES} * PAGE); fill(at, {NPAGES}); reply(at)\n") as victim:
        address = victim.ready
        subject = lab.adopt(victim.pid)
        extent = lab.extent_like(victim.pid, address, NPAGES)
        assert done(lab.window(subject, [run(Op.MERGE, address, 0, NPAGES)], extent))
        for page in DROPPED:  # and not touched: a page that was is there again
            dropped = f"madvise({address + page * PAGE_SIZE}, PAGE, {MADV_DONTNEED})"
            assert victim.ask(dropped) == 0
        lab.announce(subject, [run(Op.UNMERGE, address, 0, NPAGES)])
        (child,) = victim.ask("family(1)")
        buffer = bytearray(NPAGES * PAGE_SIZE)
        with Memory(child) as memory:
            memory.may_pin = True  # its faults go to the pager, as the child's own do
            assert not memory.gather_exclusive([(address, len(buffer))], memoryview(buffer))
        lab.pager.settle_all(subject.slot)
        for page in range(NPAGES):
            content = set(buffer[page * PAGE_SIZE : (page + 1) * PAGE_SIZE])
            assert content == ({0} if page in DROPPED else {page + 2}), page
