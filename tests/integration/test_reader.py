"""Pages that several threads read at once: the same checksums as one by one, the same holes."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import xxhash
from kernel_victims import Victim

from ksmd.core.checksum import low32
from ksmd.daemon import reader
from ksmd.kernel.memory import Memory
from ksmd.model.errors import TargetGoneError
from ksmd.model.units import PAGE_SHIFT, PAGE_SIZE

pytestmark = pytest.mark.root

SEED = 0x1234_5678_9ABC_DEF0
NPAGES = 4000  # not a whole number of buffers
UNALIKE = f"""
at = anon({NPAGES} * PAGE)
for i in range({NPAGES}):
    ctypes.c_uint64.from_address(at + i * PAGE).value = i
reply(at)
"""


@pytest.fixture
def four(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have four threads, however many processors there are."""
    monkeypatch.setattr(reader.Reader, "_threads", staticmethod(lambda: 4))


@pytest.fixture
def victim() -> Iterator[Victim]:
    with Victim(UNALIKE) as victim:
        yield victim


def expected(number: int) -> int:
    page = number.to_bytes(8, "little") + bytes(PAGE_SIZE - 8)
    return int(low32(np.array([xxhash.xxh3_64_intdigest(page, SEED)], np.uint64))[0])


@pytest.mark.parametrize("may_pin", [False, True])
def test_four_threads_give_what_one_gives(victim: Victim, four: None, may_pin: bool) -> None:
    pages = (victim.ready >> PAGE_SHIFT) + np.arange(NPAGES, dtype=np.uint64)
    read = reader.Reader()
    with Memory(victim.pid) as memory:
        memory.may_pin = may_pin
        one = read.read(memory, pages, SEED)
        assert one[1].tolist() == [expected(number) for number in range(NPAGES)]
        for _ in range(20):
            several = read.read(memory, pages, SEED, at_once=True)
            assert np.array_equal(several[0], pages)
            assert np.array_equal(several[1], one[1])


def test_scattered_pages_and_holes(victim: Victim, four: None) -> None:
    """What has gone since it was found is left out, and its neighbours behind it at the most."""
    numbers = np.flatnonzero(np.random.default_rng(1).random(NPAGES) < 0.6)
    gone = [5, 700, 701, 2048, NPAGES - 1]
    for number in gone:
        victim.ask(f"libc.munmap(ctypes.c_void_p({victim.ready} + {number} * PAGE), PAGE)")
    pages = (victim.ready >> PAGE_SHIFT) + numbers.astype(np.uint64)
    with Memory(victim.pid) as memory:
        memory.may_pin = True
        one = reader.Reader().read(memory, pages, SEED)
        found, sums = reader.Reader().read(memory, pages, SEED, at_once=True)
    assert np.array_equal(found, one[0])
    read = (found - np.uint64(victim.ready >> PAGE_SHIFT)).astype(np.intp)
    assert sums.tolist() == [expected(number) for number in read.tolist()]
    assert not np.isin(gone, read).any()
    for number in np.setdiff1d(numbers, [*read, *gone]).tolist():
        hole = max(at for at in gone if at < number)
        assert np.isin(np.arange(hole, number), numbers).all(), "between them all is asked for"


def test_a_process_that_is_gone_is_said_to_be_and_no_thread_reads_on(four: None) -> None:
    read = reader.Reader()
    with Victim(UNALIKE) as victim, Memory(victim.pid) as memory:
        memory.may_pin = True
        pages = (victim.ready >> PAGE_SHIFT) + np.arange(NPAGES, dtype=np.uint64)
        read.read(memory, pages, SEED, at_once=True)
        victim.kill()
        with pytest.raises(TargetGoneError):
            read.read(memory, pages, SEED, at_once=True)
    with Victim(UNALIKE) as victim, Memory(victim.pid) as memory:  # and it serves the next one
        pages = (victim.ready >> PAGE_SHIFT) + np.arange(NPAGES, dtype=np.uint64)
        found, sums = read.read(memory, pages, SEED, at_once=True)
        assert len(found) == NPAGES
        assert sums[7] == expected(7)


def test_where_nobody_waits_no_thread_is_started(victim: Victim) -> None:
    before = threading.active_count()
    pages = (victim.ready >> PAGE_SHIFT) + np.arange(NPAGES, dtype=np.uint64)
    with Memory(victim.pid) as memory:
        reader.Reader().read(memory, pages, SEED)
    assert threading.active_count() == before
