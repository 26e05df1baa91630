"""The store's memory: sealed for all but its owner, in large folios, pinned against collapse."""

from __future__ import annotations

import errno
import fcntl
import itertools
import mmap
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from kernel_victims import Victim, open_fds
from numpy.typing import NDArray

from ksmd.kernel import iouring, libc, memfd, procfs, proctext, thp
from ksmd.kernel.iouring import PinRing
from ksmd.kernel.memfd import ExtentMap
from ksmd.kernel.pagemap import PageMap, pfn
from ksmd.model.errors import KernelFeatureError, KsmdError, PrivilegeError
from ksmd.model.plan import ExtentPlan
from ksmd.model.tables import SPAN
from ksmd.model.units import HUGE_PAGE_PAGES, HUGE_PAGE_SIZE, PAGE_SHIFT, PAGE_SIZE
from ksmd.remap.store import Extent, Making, Store

pytestmark = pytest.mark.root

NOBODY = 65534
FALLOC_FL_KEEP_SIZE_PUNCH_HOLE = 3


@pytest.fixture
def extent() -> Iterator[ExtentMap]:
    made = memfd.create_extent("ksmd-test", HUGE_PAGE_PAGES)
    yield made
    memfd.release(made)


@pytest.fixture
def singles() -> Iterator[ExtentMap]:
    """An extent below 2 MiB: its pages count one by one."""
    made = memfd.create_extent("ksmd-test", HUGE_PAGE_PAGES - 1)
    yield made
    memfd.release(made)


#: What LargeFolios changes.
FOLIO_SETTING = thp.SYSFS / "hugepages-1024kB" / "shmem_enabled"


def large_folios(directory: Path) -> thp.LargeFolios:
    return thp.LargeFolios(directory / "note", lambda: True)


def _status_kib(name: str) -> int:
    return int(procfs.status_fields(os.getpid())[name].split()[0])


def _own_smaps(extent: ExtentMap) -> dict[str, str]:
    lines = procfs.read_process(os.getpid(), "smaps").split(b"\n")
    ours = b" %d " % extent.inode  # in the line with the name: "132 kB" is no inode
    start = next(i for i, line in enumerate(lines) if b"/memfd:" in line and ours in line)
    end = next(i for i in range(start, len(lines)) if lines[i].startswith(b"VmFlags:"))
    return proctext.parse_fields(b"\n".join(lines[start + 1 : end + 1]))


# ---------------------------------------------------------------- who may write


def _attacks(fd: int) -> dict[str, Callable[[], object]]:
    """Every way to change the file's content that a descriptor offers."""

    def shared_map() -> None:
        mmap.mmap(fd, PAGE_SIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE).close()

    def punch() -> None:
        libc.syscall("fallocate", 285, fd, FALLOC_FL_KEEP_SIZE_PUNCH_HOLE, 0, PAGE_SIZE)

    def upgrade() -> None:
        address = libc.mmap(0, PAGE_SIZE, libc.PROT_READ, libc.MAP_SHARED, fd)
        libc.syscall("mprotect", 10, address, PAGE_SIZE, libc.PROT_READ | libc.PROT_WRITE)

    def remove() -> None:
        address = libc.mmap(0, PAGE_SIZE, libc.PROT_READ, libc.MAP_SHARED, fd)
        libc.madvise(address, PAGE_SIZE, 9)

    return {
        "write": lambda: os.pwrite(fd, b"evil", 0),
        "shrink": lambda: os.ftruncate(fd, 0),
        "grow": lambda: os.ftruncate(fd, memfd.FILE_SIZE + PAGE_SIZE),
        "allocate": lambda: os.posix_fallocate(fd, memfd.FILE_SIZE, PAGE_SIZE),
        "punch": punch,
        "map writable": shared_map,
        "mprotect": upgrade,
        "MADV_REMOVE": remove,
        "unseal": lambda: fcntl.fcntl(fd, memfd.F_ADD_SEALS, 0x8),
    }


def _what_succeeds(fd: int, uid: int) -> list[str]:
    """Attack in a child of user *uid*, by the descriptor itself and by every reopening of it."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        done: list[str] = []
        try:
            if uid:
                os.setgroups([])
                os.setresgid(uid, uid, uid)
                os.setresuid(uid, uid, uid)
            for flags in (None, os.O_RDONLY, os.O_RDWR, os.O_WRONLY, os.O_RDWR | os.O_TRUNC):
                try:
                    opened = fd if flags is None else os.open(f"/proc/self/fd/{fd}", flags)
                except OSError:
                    continue
                done.append(f"open {flags}")
                for name, attack in _attacks(opened).items():
                    try:
                        attack()
                    except OSError:
                        continue
                    done.append(f"{name} ({flags})")
        finally:
            os.write(write_end, "\n".join(done).encode())
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        result = pipe.read().decode()
    os.waitpid(pid, 0)
    return result.split("\n")


def test_nobody_can_do_nothing_with_the_descriptor_but_read(extent: ExtentMap) -> None:
    assert _what_succeeds(extent.fd_ro, NOBODY) == ["open None"]


def test_root_can_reopen_the_file_and_change_nothing(extent: ExtentMap) -> None:
    succeeded = _what_succeeds(extent.fd_ro, 0)
    assert f"open {os.O_RDWR}" in succeeded, "the attack was not tried"
    assert [what for what in succeeded if not what.startswith("open")] == []


def test_the_attacks_work_on_a_file_that_is_not_sealed() -> None:
    fd = os.memfd_create("ksmd-test-open", memfd.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, PAGE_SIZE)
        succeeded = set(_what_succeeds(fd, NOBODY))
    finally:
        os.close(fd)
    assert {"write (None)", "punch (None)", f"write ({os.O_RDWR})", "shrink (None)"} <= succeeded


def test_the_owners_mapping_still_writes_what_readers_see(extent: ExtentMap) -> None:
    libc.view(extent.address, extent.length)[:5] = b"owned"
    assert os.pread(extent.fd_ro, 5, 0) == b"owned"
    _what_succeeds(extent.fd_ro, 0)
    assert os.pread(extent.fd_ro, 5, 0) == b"owned"
    assert os.fstat(extent.fd_ro).st_size == memfd.FILE_SIZE
    assert os.fstat(extent.fd_ro).st_mode & 0o7777 == 0


def test_a_reader_past_the_extent_meets_zeros_not_sigbus(extent: ExtentMap) -> None:
    script = f"at = map(4 * HUGE, prot=1, flags=2, fd={extent.fd_ro}); reply(0)\n"
    with Victim(script, fds=(extent.fd_ro,)) as victim:
        assert victim.ask("peek(at + 3 * HUGE)") == 0


# ---------------------------------------------------------------- making and releasing


def test_an_extent_is_known_in_maps_by_device_and_inode(extent: ExtentMap) -> None:
    (vma,) = [v for v in procfs.maps(os.getpid()) if v.inode == extent.inode]
    assert (vma.start, vma.end) == (extent.address, extent.address + extent.length)
    assert (vma.perms, vma.device, vma.offset) == ("rw-s", extent.device, 0)
    assert extent.address % HUGE_PAGE_SIZE == 0


def test_release_gives_back_mapping_descriptor_and_address_space() -> None:
    def held() -> tuple[int, int]:
        return len(open_fds()), len(procfs.maps(os.getpid()))

    memfd.release(memfd.create_extent("ksmd-test", 3))  # first imports, arenas
    before = held()
    for npages in (1, HUGE_PAGE_PAGES + 3):
        memfd.release(memfd.create_extent("ksmd-test", npages))
    assert held() == before


@pytest.mark.parametrize("steps", [0, 1, 2, 4, 5])
def test_an_extent_that_is_given_up_half_way_leaves_nothing(steps: int) -> None:
    npages = 3 * HUGE_PAGE_PAGES
    source = np.zeros(1, SPAN)
    source["npages"] = npages
    plan = ExtentPlan(5, npages, source, np.zeros(npages, np.uint32))

    def sums(view: memoryview) -> NDArray[np.uint32]:
        return np.zeros(view.nbytes >> PAGE_SHIFT, np.uint32)

    store = Store("half", sums, PinRing(), Forgetful())
    mapped = mapped_bytes()
    making = Making(store.making(plan, lambda _slot, _pieces, _view: None))
    for _ in range(steps):
        making.step()
    making.give_up()
    assert (5 in store.extents) == (steps > 4)
    for number in list(store.extents):
        store.release(number)
    del making
    assert not [fd for fd in open_fds() if "/memfd:ksmd-half " in fd]
    assert mapped_bytes() < mapped + HUGE_PAGE_SIZE


class Forgetful:
    """Keeps nothing: nobody maps what the tests make."""

    def keep(self, extent: Extent) -> None:
        pass

    def release(self, extent: Extent) -> None:
        pass


def _folios(extent: ExtentMap, npages: int) -> list[int]:
    """Give the sizes, in pages, of the folios that back an extent of ours."""
    with PageMap(os.getpid()) as pagemap:
        frames = pfn(pagemap.entries(extent.address >> PAGE_SHIFT, npages)).tolist()
    with Path("/proc/kpageflags").open("rb", buffering=0) as file:
        flags = [struct.unpack("=Q", os.pread(file.fileno(), 8, frame * 8))[0] for frame in frames]
    heads = [page for page, flag in enumerate(flags) if not flag >> 16 & 1]  # not a tail
    return [end - start for start, end in itertools.pairwise([*heads, npages])]


def test_an_extent_is_made_of_large_folios_of_zeros_and_never_of_huge_pages() -> None:
    extent = memfd.create_extent("ksmd-test", 4 * HUGE_PAGE_PAGES + 7)
    try:
        memfd.lock(extent)
        fields = _own_smaps(extent)
        assert fields["ShmemPmdMapped"] == "0 kB"
        assert fields["Rss"] == fields["Locked"] == f"{4 * 2048 + 28} kB"
        assert not any(os.pread(extent.fd_ro, extent.length, 0))
        folios = _folios(extent, extent.npages)
        assert max(folios) < HUGE_PAGE_PAGES
        assert max(folios) >= 16, "huge pages are split into single pages: slower, and no error"
        assert folios[-7:] == [1] * 7
    finally:
        memfd.release(extent)


def test_where_the_kernel_gives_folios_of_1_mib_an_extent_is_made_of_them(tmp_path: Path) -> None:
    before = FOLIO_SETTING.read_text()
    extent = memfd.create_extent("ksmd-test", 9 * HUGE_PAGE_PAGES + 7, large_folios(tmp_path))
    try:
        assert FOLIO_SETTING.read_text() == before
        assert not list(tmp_path.iterdir())
        memfd.lock(extent)
        assert not any(os.pread(extent.fd_ro, extent.length, 0))
        folios = _folios(extent, extent.npages)
        assert folios.count(256) >= 9, "most of 18; the rest where none was free"
        assert max(folios) == 256
        assert folios[-7:] == [1] * 7
        fields = _own_smaps(extent)
        assert fields["ShmemPmdMapped"] == "0 kB"
        assert "hg" not in fields["VmFlags"].split()
    finally:
        memfd.release(extent)


def test_what_is_to_be_mapped_singly_is_made_of_single_pages(tmp_path: Path) -> None:
    npages = 2 * HUGE_PAGE_PAGES + 7
    extent = memfd.create_extent("ksmd-test", npages, large_folios(tmp_path), scattered=True)
    try:
        memfd.lock(extent)
        assert _folios(extent, npages) == [1] * npages
        assert not any(os.pread(extent.fd_ro, extent.length, 0))
    finally:
        memfd.release(extent)


def test_where_a_huge_page_cannot_be_split_the_block_is_made_of_single_pages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    punch = libc.punch_hole

    def only_whole_blocks(fd: int, offset: int, length: int) -> None:
        if length == HUGE_PAGE_SIZE:
            punch(fd, offset, length)

    with monkeypatch.context() as patch:
        patch.setattr(libc, "punch_hole", only_whole_blocks)
        extent = memfd.create_extent("ksmd-test", 2 * HUGE_PAGE_PAGES)
    try:
        memfd.lock(extent)
        assert _folios(extent, extent.npages) == [1] * extent.npages
    finally:
        memfd.release(extent)


@pytest.mark.parametrize("npages", [0, -1, (1 << 28) + 1])
def test_impossible_sizes_are_refused(npages: int) -> None:
    with pytest.raises(ValueError, match="pages"):
        memfd.create_extent("ksmd-test", npages)


def mapped_bytes() -> int:
    return sum(vma.end - vma.start for vma in procfs.maps(os.getpid()))


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.EMFILE, KsmdError),
        (errno.ENOMEM, KsmdError),
        (errno.EPERM, PrivilegeError),
        (errno.ENOSYS, KernelFeatureError),
    ],
)
@pytest.mark.parametrize("step", ["ftruncate", "fchmod", "fstat", "memfd_create"])
def test_a_failed_step_says_what_to_do_and_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, step: str, number: int, kind: type[KsmdError]
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    fds, mapped = open_fds(), mapped_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(memfd.os, step, fail)
        with pytest.raises(kind) as caught:
            memfd.create_extent("ksmd-test", HUGE_PAGE_PAGES)
    assert type(caught.value) is kind
    assert caught.value.hint
    assert open_fds() == fds
    # of what is left behind, the address range alone would be 2 MiB; Python's heap grows by less
    assert mapped_bytes() < mapped + HUGE_PAGE_SIZE


# ---------------------------------------------------------------- pins


def test_a_pin_counts_in_vmpin_until_it_is_taken_off(singles: ExtentMap) -> None:
    before = _status_kib("VmPin")
    with iouring.PinRing() as ring:
        first = ring.pin(singles.address, singles.length)
        second = ring.pin(singles.address, PAGE_SIZE)
        assert _status_kib("VmPin") == before + 2044 + 4
        ring.unpin(first)
        assert _status_kib("VmPin") == before + 4
        ring.unpin(second)
        assert _status_kib("VmPin") == before
        with pytest.raises(KeyError):
            ring.unpin(second)


def test_more_pins_than_a_ring_has_slots_take_another_ring(
    singles: ExtentMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(iouring, "SLOTS", 4)
    monkeypatch.setattr(iouring, "BUFFER_MAX", 16 * PAGE_SIZE)
    before = _status_kib("VmPin")
    fds = len(open_fds())
    with iouring.PinRing() as ring:
        token = ring.pin(singles.address, 10 * 16 * PAGE_SIZE + PAGE_SIZE)  # 11 slots: 3 rings
        assert len(open_fds()) == fds + 3
        assert _status_kib("VmPin") == before + 161 * 4
        ring.unpin(token)
        assert len(open_fds()) == fds + 1, "rings without a pin stay"
        token = ring.pin(singles.address, 12 * 16 * PAGE_SIZE)
        assert len(open_fds()) == fds + 3
        first, second = (ring.pin(singles.address, PAGE_SIZE) for _ in range(2))
        ring.unpin(first)
        ring.unpin(token)
        assert len(open_fds()) == fds + 1, "the one that has the second pin"
        assert _status_kib("VmPin") == before + 4
        ring.unpin(second)
    assert len(open_fds()) == fds


def test_a_pin_that_fails_half_way_pins_nothing(
    extent: ExtentMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(iouring, "BUFFER_MAX", HUGE_PAGE_SIZE // 2)
    before = _status_kib("VmPin")
    gap = libc.mmap(0, PAGE_SIZE, libc.PROT_NONE, libc.MAP_PRIVATE | libc.MAP_ANONYMOUS)
    libc.munmap(gap, PAGE_SIZE)
    libc.munmap(extent.address + extent.length - PAGE_SIZE, PAGE_SIZE)
    with iouring.PinRing() as ring, pytest.raises(KsmdError, match="pin"):
        ring.pin(extent.address, extent.length)
    with iouring.PinRing() as ring:
        assert _status_kib("VmPin") == before
        assert ring.pin(extent.address, extent.length // 2)


def test_a_host_without_io_uring_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, *_: object) -> int:
        raise PermissionError(errno.EPERM, f"{name}: Operation not permitted")

    monkeypatch.setattr(iouring.libc, "syscall", refuse)
    with pytest.raises(KernelFeatureError, match="io_uring") as caught:
        iouring.PinRing()
    assert "io_uring_disabled" in caught.value.hint


COLLAPSER = """
at = aligned(HUGE)
map(HUGE, prot=1, flags=1, fd={fd}, at=at)
touch(at, 512)
reply(at)
"""


@pytest.mark.parametrize("large", [False, True])
def test_a_pinned_extent_is_not_collapsed_by_another_process(
    large: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folios = large_folios(tmp_path) if large else None
    extent = memfd.create_extent("ksmd-test", HUGE_PAGE_PAGES, folios)
    request.addfinalizer(lambda: memfd.release(extent))
    libc.view(extent.address, extent.length)[:] = b"k" * extent.length
    memfd.lock(extent)
    assert _own_smaps(extent)["ShmemPmdMapped"] == "0 kB"
    with (
        Victim(COLLAPSER.format(fd=extent.fd_ro), fds=(extent.fd_ro,)) as other,
        iouring.PinRing() as ring,
    ):
        token = ring.pin(extent.address, extent.length)
        for _ in range(3):
            assert other.ask("madvise(at, HUGE, 25)") in (errno.EAGAIN, errno.EINVAL)
        assert _own_smaps(extent)["Rss"] == "2048 kB"
        ring.unpin(token)
        # the same call works as soon as the pin is off: it was the pin that refused it
        assert any(other.ask("madvise(at, HUGE, 25)") == 0 for _ in range(10))
        assert other.ask("touch(at, 512)") == 512 * ord("k")
