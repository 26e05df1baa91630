"""Every write to a target is read back, whoever wrote it, while windows come as fast as they can.

Whoever pins a page and writes to it later (O_DIRECT, process_vm_writev) is kept out where pages are
given back or merged again: test_remap_pins.py shows why. KSMD_SOAK_SECONDS makes each hammer last
that long. The figures are printed (pytest -s, or -rP).
"""

# ruff: noqa: F401, F811  (fixtures are imported by their names)

from __future__ import annotations

import errno
import mmap
import os
import random
import struct
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from remap_lab import (
    Lab,
    StartProgram,
    Subject,
    content,
    descriptors,
    lab,
    programs,
    says,
    scratch_left,
    shared_pages,
)

from ksmd.kernel import procfs
from ksmd.kernel.memfd import ExtentMap
from ksmd.model.refusal import Reason
from ksmd.model.units import PAGE_SHIFT, PAGE_SIZE
from ksmd.model.window import Op, Record

SECONDS = float(os.environ.get("KSMD_SOAK_SECONDS", "5"))

pytestmark = [pytest.mark.root, pytest.mark.timeout(300 + 2 * SECONDS)]

PATIENCE = 60.0

ARENA = 0x510000000000
RUN = 64
PAGES = 16 * RUN
ACTORS = ("thread 0", "thread 1", "vm_writev", "mem writer", "vm_readv", "dropper", "forks",
          "O_DIRECT", "io_uring")  # fmt: skip
#: Reasons for which a run may be left alone under fire; all others are defects.
PASSING = {Reason.CHANGED, Reason.PINNED_PAGE}


class Control:
    """The control block that hammer.c shares."""

    QUIT, READY, CURSOR, WIDTH, RESET, GATE, DONE, LOST, FAILED = 0, 1, 2, 3, 4, 5, 16, 32, 64

    def __init__(self) -> None:
        self.fd = os.memfd_create("hammer-control")
        os.ftruncate(self.fd, PAGE_SIZE)
        self._map = mmap.mmap(self.fd, PAGE_SIZE)
        self[self.WIDTH] = RUN

    def __getitem__(self, index: int) -> int:
        return int(struct.unpack_from("=Q", self._map, index * 8)[0])

    def __setitem__(self, index: int, value: int) -> None:
        struct.pack_into("=Q", self._map, index * 8, value)

    def counts(self, which: int) -> dict[str, int]:
        found = {name: self[which + index] for index, name in enumerate(ACTORS)}
        return {name: count for name, count in found.items() if count}

    def wait(self, index: int, value: int) -> None:
        deadline = time.monotonic() + PATIENCE
        while self[index] != value:
            assert time.monotonic() < deadline, "the hammer hangs"
            time.sleep(0.0002)

    def close(self) -> None:
        self._map.close()
        os.close(self.fd)


@pytest.fixture
def control() -> Iterator[Control]:
    control = Control()
    yield control
    control.close()


def words(first: int, count: int) -> bytes:
    """Ascending 64-bit words, as hammer.c fills pages and expects blocks of its file."""
    return struct.pack(f"={count}Q", *range(first, first + count))


def base(page: int) -> bytes:
    return words(0xA000000000000000 + page * 512, 512)


class Hammer:
    """A hammer under way, and the windows on it."""

    def __init__(
        self, lab: Lab, control: Control, start: StartProgram, actors: str, file: Path
    ) -> None:
        self.lab = lab
        self.control = control
        self.random = random.Random(actors)
        self.tally: Counter[str] = Counter()
        self.borders: set[int] = set()
        file.write_bytes(words(0xD000000000000000, 64 * 512))
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
        process = start(
            "hammer", str(control.fd), str(PAGES), actors, str(file), pass_fds=(control.fd,)
        )
        self.pid: int = process.pid
        control.wait(Control.READY, 1)
        self.extent: ExtentMap = lab.extent(b"".join(base(page) for page in range(PAGES)))
        self.subject: Subject = lab.adopt(self.pid)
        self.descriptors = descriptors(self.pid)

    def records(self, op: Op, pages: list[int]) -> list[Record]:
        """Cut ascending page numbers into runs of random length, each within one VMA."""
        found = []
        while pages:
            limit = self.random.choice((1, 1, 2, 4, 8, 32))
            count = 1
            while (
                count < min(limit, len(pages))
                and pages[count] == pages[0] + count
                and pages[count] not in self.borders
            ):
                count += 1
            first, pages = pages[0], pages[count:]
            at = first << PAGE_SHIFT
            found.append(Record(op, ARENA + at, count << PAGE_SHIFT, at))
        return found

    def window(self, op: Op, pages: list[int], fail_step: int = 0) -> None:
        """One window over *pages*; with *fail_step* its longest record fails there."""
        if not pages:
            return
        records = self.records(op, pages)
        chosen = max(range(len(records)), key=lambda i: records[i].length)
        fail = (fail_step, errno.ENOTTY if fail_step else 0, chosen)
        result = self.lab.window(self.subject, records, self.extent, fail=fail)
        self.tally[f"windows {result.refused or ''}".strip()] += 1
        assert result.refused in (None, Reason.UNSTOPPABLE), says(result)  # a wait for mmap_lock
        for outcome in result.outcomes:
            count = outcome.record.length >> PAGE_SHIFT
            if fail_step and outcome.result == -errno.ENOTTY:
                self.tally[f"{op.name.lower()} failed at {fail_step}"] += count
                continue
            self.tally[f"{op.name.lower()} {outcome.reason or 'pages'}"] += count
            assert outcome.reason is None or outcome.reason in PASSING, says(result)

    def split(self, first: int) -> tuple[list[int], list[int]]:
        """Pages of the run at *first* that are anonymous, and those in mappings of the store."""
        merged: set[int] = set()
        vmas = procfs.maps(self.pid)
        self.borders = {(vma.start - ARENA) >> PAGE_SHIFT for vma in vmas}
        for vma in vmas:
            if vma.inode == self.extent.inode:
                ends = ((at - ARENA) >> PAGE_SHIFT for at in (vma.start, vma.end))
                merged.update(range(*ends))
        pages = range(first, first + RUN)
        return [p for p in pages if p not in merged], [p for p in pages if p in merged]

    def point(self) -> int:
        """Send everybody to another run: its first page."""
        first = self.random.randrange(PAGES // RUN) * RUN
        self.control[Control.CURSOR] = first
        time.sleep(0.0005)
        return first

    def finish(self) -> None:
        """Stop everybody; nothing may be lost, nothing be left behind."""
        self.control[Control.QUIT] = 1
        time.sleep(0.3)
        done, lost = self.control.counts(Control.DONE), self.control.counts(Control.LOST)
        failed = self.control.counts(Control.FAILED)
        print(f"\n{dict(self.tally)}\n  done: {done}\n  lost: {lost or 0}  EIO: {failed or 0}")
        assert not lost
        arena = content(self.pid, ARENA, PAGES)
        wrong = [p for p in range(PAGES) if arena[p * PAGE_SIZE : (p + 1) * PAGE_SIZE] != base(p)]
        assert not wrong
        assert not scratch_left(self.pid)
        left = {n: what for n, what in descriptors(self.pid).items() if n not in self.descriptors}
        assert not {what for what in left.values() if "memfd" in what or "userfaultfd" in what}


def test_no_write_is_lost_while_runs_are_merged_unmerged_and_merged_again(
    lab: Lab, control: Control, programs: StartProgram, tmp_path: Path
) -> None:
    hammer = Hammer(lab, control, programs, "wdmrf", tmp_path / "file")
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        first = hammer.point()
        anonymous, merged = hammer.split(first)
        if len(anonymous) > RUN // 2:
            hammer.window(Op.MERGE, anonymous)
            continue
        _, broken = shared_pages(hammer.pid, ARENA + (first << PAGE_SHIFT), RUN)
        broken = sorted({first + p for p in broken} & set(merged))
        if broken and hammer.random.random() < 0.6:
            hammer.window(Op.REMERGE, broken)
        else:
            hammer.window(Op.UNMERGE, merged)
    hammer.finish()
    for what in ("merge pages", "unmerge pages", "remerge pages"):
        assert hammer.tally[what] > RUN, "the hammer proved nothing"
    done = control.counts(Control.DONE)
    assert set(done) == set(ACTORS) - {"O_DIRECT", "io_uring", "vm_writev"}


def test_no_read_by_device_is_lost_while_its_pages_are_merged(
    lab: Lab, control: Control, programs: StartProgram, tmp_path: Path
) -> None:
    hammer = Hammer(lab, control, programs, "wauvf", tmp_path / "file")
    end = time.monotonic() + SECONDS
    refused = 0
    while time.monotonic() < end:
        first = hammer.point()
        anonymous, merged = hammer.split(first)
        hammer.window(Op.MERGE, anonymous)
        if merged:  # what was written since cannot be tested for pins: the whole is refused
            result = lab.window(hammer.subject, hammer.records(Op.UNMERGE, merged), hammer.extent)
            assert result.refused in (Reason.PINNED_PROCESS, Reason.UNSTOPPABLE), says(result)
            refused += result.refused is Reason.PINNED_PROCESS
        control[Control.RESET] = 1
        control.wait(Control.RESET, 0)
    hammer.finish()
    assert refused
    assert hammer.tally["merge pages"] > RUN, "the hammer proved nothing"
    assert hammer.tally["merge pinned-page"], "no window met a page under I/O"
    done = control.counts(Control.DONE)
    assert set(done) == {"thread 0", "thread 1", "vm_writev", "forks", "O_DIRECT", "io_uring"}


def test_no_write_of_another_process_is_lost_when_a_step_fails(
    lab: Lab, control: Control, programs: StartProgram, tmp_path: Path
) -> None:
    hammer = Hammer(lab, control, programs, "m", tmp_path / "file")
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        first = hammer.point()
        anonymous, merged = hammer.split(first)
        step = hammer.random.choice((0, 2, 3, 4, 5, 6, 7))
        if len(anonymous) > RUN // 2:
            hammer.window(Op.MERGE, anonymous, step)
            continue
        _, broken = shared_pages(hammer.pid, ARENA + (first << PAGE_SHIFT), RUN)
        broken = sorted({first + p for p in broken} & set(merged))
        if broken and hammer.random.random() < 0.6:
            hammer.window(Op.REMERGE, broken, step)
        else:
            hammer.window(Op.UNMERGE, merged, min(step, 4))
    hammer.finish()
    for op, last in ((Op.MERGE, 7), (Op.UNMERGE, 4), (Op.REMERGE, 7)):
        for step in range(2, last + 1):
            assert hammer.tally[f"{op.name.lower()} failed at {step}"], "the hammer proved nothing"
