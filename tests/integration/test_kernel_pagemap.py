"""What the page map says, by the ioctl and without it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
from kernel_victims import Victim

from ksmd.kernel import libc, memfd, pagemap, procfs, thp
from ksmd.kernel.memory import Memory
from ksmd.kernel.pagemap import PageMap
from ksmd.model.errors import TargetGoneError
from ksmd.model.units import HUGE_PAGE_PAGES, HUGE_PAGE_SIZE, PAGE_SHIFT, PAGE_SIZE

pytestmark = pytest.mark.root

NPAGES = 4 * HUGE_PAGE_PAGES

#: All kinds of page in one region: 4 KiB pages, every second page, read-only zero pages, holes, a
#: huge page.
MIXED = """
at = anon(4 * HUGE)
fill(at, 300)
fill(at + 400 * PAGE, 900, step=2)
touch(at + 1300 * PAGE, 100)
madvise(at + 3 * HUGE, HUGE, 14)
fill(at + 3 * HUGE, 512)
assert madvise(at + 3 * HUGE, HUGE, 25) == 0
reply(at)
"""


@pytest.fixture(params=["scan", "entries"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to the page map; the second is forced where the kernel has the first."""
    if request.param == "entries":
        monkeypatch.setattr(pagemap, "has_scan", lambda: False)
    elif not pagemap.has_scan():
        pytest.skip("this kernel has no PAGEMAP_SCAN")
    return str(request.param)


@pytest.fixture
def mixed() -> Iterator[Victim]:
    with Victim(MIXED) as victim:
        yield victim


def _mixed_pages() -> list[int]:
    return [*range(300), *range(400, 1300, 2), *range(3 * 512, 4 * 512)]


def test_present_gives_anonymous_pages_and_no_others(way: str, mixed: Victim) -> None:
    at = mixed.ready
    with PageMap(mixed.pid) as pages:
        found = pages.present(at, at + NPAGES * PAGE_SIZE, 1 << 20)
    assert (found.pages - np.uint64(at >> PAGE_SHIFT)).tolist() == _mixed_pages()
    assert found.walk_end == at + NPAGES * PAGE_SIZE
    assert found.huge.tolist() == [page >= 3 * 512 for page in _mixed_pages()]


def test_huge_pages_are_found_by_themselves(way: str, mixed: Victim) -> None:
    at, last = mixed.ready, mixed.ready + 3 * HUGE_PAGE_SIZE
    with PageMap(mixed.pid) as pages:
        assert pages.huge(at, at + NPAGES * PAGE_SIZE) == [last]
        assert pages.huge(at, last) == []


def test_the_pages_that_were_left_out_are_the_zero_page(way: str, mixed: Victim) -> None:
    first = mixed.ready >> PAGE_SHIFT
    with PageMap(mixed.pid) as pages:
        zero = pages.entries(first + 1300, 100)
    assert pagemap.is_present(zero).all()
    assert not pagemap.exclusive(zero).any()


@pytest.mark.parametrize("max_pages", [1, 7, 300, 301, 1000])
def test_a_cursor_meets_every_page_once(way: str, mixed: Victim, max_pages: int) -> None:
    at, end = mixed.ready, mixed.ready + NPAGES * PAGE_SIZE
    met: list[int] = []
    with PageMap(mixed.pid) as pages:
        position = at
        while position < end:
            found = pages.present(position, end, max_pages)
            assert len(found.pages) <= max_pages
            assert found.walk_end > position
            met += (found.pages - np.uint64(at >> PAGE_SHIFT)).tolist()
            position = found.walk_end
    assert met == _mixed_pages()


def test_thousands_of_regions_are_given_once_each(way: str) -> None:
    script = "at = anon(20000 * PAGE); fill(at, 20000, step=2); reply(at)\n"
    with Victim(script) as victim, PageMap(victim.pid) as pages:
        found = pages.present(victim.ready, victim.ready + 20000 * PAGE_SIZE, 1 << 20)
        expected = np.arange(0, 20000, 2, dtype=np.uint64) + np.uint64(victim.ready >> PAGE_SHIFT)
        assert np.array_equal(found.pages, expected)
        part = pages.present(victim.ready, victim.ready + 20000 * PAGE_SIZE, 5000)
        assert np.array_equal(part.pages, expected[:5000])
        assert pages.exclusive_of(found.pages).all()


def test_reading_entries_equals_scanning_everywhere(
    mixed: Victim, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not pagemap.has_scan():
        pytest.skip("this kernel has no PAGEMAP_SCAN")
    seen = 0
    with PageMap(mixed.pid) as pages:
        for vma in procfs.maps(mixed.pid):
            # not the reserved gaps between, nor what lies above user space
            if "rw" not in vma.perms or vma.path.startswith("[v"):
                continue
            scanned = pages.present(vma.start, vma.end, 1 << 30)
            with monkeypatch.context() as patch:
                patch.setattr(pagemap, "has_scan", lambda: False)
                read = pages.present(vma.start, vma.end, 1 << 30)
            assert np.array_equal(scanned.pages, read.pages), vma
            assert np.array_equal(scanned.huge, read.huge), vma
            assert scanned.walk_end == read.walk_end == vma.end
            seen += len(read.pages)
    assert seen > len(_mixed_pages())


def test_the_huge_zero_page_is_not_offered(way: str) -> None:
    script = "at = aligned(HUGE); map(HUGE, at=at); madvise(at, HUGE, 14); touch(at, 1)\n"
    with Victim(script + "reply(at)\n") as victim, PageMap(victim.pid) as pages:
        found = pages.present(victim.ready, victim.ready + HUGE_PAGE_SIZE, 1 << 20)
        assert found.pages.tolist() == []
        assert pages.huge(victim.ready, victim.ready + HUGE_PAGE_SIZE) == []


def test_merged_pages_are_shared_until_they_are_written(way: str) -> None:
    extent = memfd.create_extent("ksmd-test", 1024)
    try:
        libc.view(extent.address, extent.length)[:] = b"s" * extent.length
        script = f"at = map(1024 * PAGE, flags=2, fd={extent.fd_ro}); touch(at, 1000)\n"
        script += "[poke(at + i * PAGE, 1) for i in range(3, 600, 5)]; reply(at)\n"
        with Victim(script, fds=(extent.fd_ro,)) as victim, PageMap(victim.pid) as pages:
            at = victim.ready
            victim.ask(f"madvise({at} + 1010 * PAGE, 14 * PAGE, 22)")
            shared, broken = pages.still_shared(at, at + extent.length)
            written = set(range(3, 600, 5))
            first = np.uint64(at >> PAGE_SHIFT)
            assert (broken - first).tolist() == sorted(written)
            # fault-around may have filled in more than was touched
            assert (
                set((shared - first).tolist())
                >= (set(range(1000)) | set(range(1010, 1024))) - written
            )
            assert not set(shared.tolist()) & set(broken.tolist())
            ours = [v for v in procfs.maps(victim.pid) if v.inode == extent.inode]
            assert [(v.start, v.device) for v in ours] == [(at, extent.device)]
    finally:
        memfd.release(extent)


def test_one_cold_page_splits_a_huge_page_and_changes_no_byte() -> None:
    script = "at = aligned(4 * HUGE); map(4 * HUGE, at=at); madvise(at, 4 * HUGE, 14)\n"
    script += "fill(at, 2048); [madvise(at + i * HUGE, HUGE, 25) for i in range(4)]; reply(at)\n"
    with Victim(script) as victim, PageMap(victim.pid) as pages, Memory(victim.pid) as memory:
        at, length = victim.ready, 4 * HUGE_PAGE_SIZE
        before = pages.present(at, at + length, 1 << 20)
        assert before.huge.all()
        content = memory.read(at, length)
        pidfd = os.pidfd_open(victim.pid)
        try:
            split = thp.split(pidfd, [at + 5 * PAGE_SIZE, at + 9, at + 2 * HUGE_PAGE_SIZE])
        finally:
            os.close(pidfd)
        assert split == 2
        after = pages.present(at, at + length, 1 << 20)
        assert np.array_equal(after.pages, before.pages)
        assert after.huge.reshape(4, -1).all(axis=1).tolist() == [False, True, False, True]
        assert not after.huge[:512].any()
        assert memory.read(at, length) == content


def test_advice_passes_over_what_is_not_mapped_and_goes_on() -> None:
    with Victim("at = anon(4000 * PAGE); fill(at, 4000); reply(at)\n") as victim:
        at = victim.ready
        holes = [at + i * PAGE_SIZE for i in (0, 7, 1500, 3000, 3999)]
        for hole in holes:
            victim.ask(f"libc.munmap(ctypes.c_void_p({hole}), PAGE)")
        pidfd = os.pidfd_open(victim.pid)
        try:
            ranges = [(at + i * PAGE_SIZE, PAGE_SIZE) for i in range(4000)]
            assert thp.cold(pidfd, ranges) == (4000 - len(holes)) * PAGE_SIZE
            assert thp.cold(pidfd, []) == 0
            victim.kill()
            with pytest.raises(TargetGoneError):
                thp.cold(pidfd, ranges)
        finally:
            os.close(pidfd)
