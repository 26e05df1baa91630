"""A laboratory for stop windows: a real tracer, a real pager, real store memory, real victims.

``Lab`` does what the daemon does around a window and nothing more: it announces the ranges to the
pager, lets the engine carry the window out, and settles the ranges. ``snapshot`` is what a program
or an operator could see of a process, in a form in which fragments of a VMA count as one.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ksmd.core.windows import columns
from ksmd.daemon.windows import announce
from ksmd.guard.client import Pager
from ksmd.kernel import libc, memfd, procfs
from ksmd.kernel.iouring import PinRing
from ksmd.kernel.memory import Memory
from ksmd.kernel.pagemap import PageMap
from ksmd.model.process import TargetId
from ksmd.model.refusal import Reason
from ksmd.model.units import PAGE_SHIFT, PAGE_SIZE
from ksmd.model.window import Op, Outcome, Record, WindowRequest, WindowResult
from ksmd.remap.engine import Engine, Order, RefusedTargetError, TargetContexts
from ksmd.remap.places import SCRATCH, SCRATCH_STEP, SCRATCH_TRIES

VICTIMS = Path(__file__).resolve().parent.parent / "victims"

#: Generous: it only matters to tests of the deadline itself, which give their own.
DEADLINE_MS = 2000.0

#: Some programs are stoppable for moments only.
_SETUP_SECONDS = 30.0

#: Of a moment only: a thread waited in the kernel, or every thread was where none may be borrowed
#: (at the delivery of a signal, in a restartable sequence).
PASSING = (Reason.UNSTOPPABLE, Reason.NO_THREAD)

#: Flags of a VMA that moving or renewing an anonymous mapping may change without effect: whether
#: its memory counts as committed (ac, nr), and soft-dirty (sd).
_UNSEEN_FLAGS = frozenset({"ac", "nr", "sd"})


@dataclass(slots=True)
class Subject:
    """A process that windows are opened on."""

    id: TargetId
    slot: int
    contexts: TargetContexts

    @property
    def pid(self) -> int:
        return self.id.pid


class Lab:
    """Engine, pager and store. One per test, or one per module where tests end their victims."""

    def __init__(self) -> None:
        self.engine = Engine()
        self.pager = Pager()
        self.ring = PinRing()
        self.subjects: list[Subject] = []
        self._extents: list[memfd.ExtentMap] = []
        self.pager.start()

    def close(self) -> None:
        """End both processes, give the store back."""
        self.engine.close()
        self.pager.close(force=True)
        for subject in self.subjects:
            os.close(subject.contexts.guard)
            os.close(subject.contexts.track)
        self.ring.close()
        for extent in self._extents:
            memfd.release(extent)

    def extent(self, content: bytes) -> memfd.ExtentMap:
        """Make an extent: filled, then locked, then pinned."""
        extent = memfd.create_extent("ksmd-lab", len(content) // PAGE_SIZE)
        self._extents.append(extent)
        libc.view(extent.address, extent.length)[:] = content
        memfd.lock(extent)
        self.ring.pin(extent.address, extent.length)
        return extent

    def extent_like(self, pid: int, address: int, npages: int) -> memfd.ExtentMap:
        """Make an extent of what a process holds now."""
        return self.extent(content(pid, address, npages))

    def adopt(self, pid: int) -> Subject:
        """Make the two contexts of a process, and have the pager guard it."""
        target = procfs.target_id(pid)
        contexts = self._setup(target)
        subject = Subject(target, len(self.subjects) + 1, contexts)
        self.subjects.append(subject)
        self.pager.guard(subject.slot, contexts.guard)
        return subject

    def _setup(self, target: TargetId) -> TargetContexts:
        """Try again where the moment was a bad one, as the daemon does."""
        deadline = time.monotonic() + _SETUP_SECONDS
        while True:
            try:
                return self.engine.setup(target, DEADLINE_MS)
            except RefusedTargetError as error:
                if error.reason not in PASSING or time.monotonic() > deadline:
                    raise
                time.sleep(0.003)

    def window(
        self,
        subject: Subject,
        records: Sequence[Record],
        extent: memfd.ExtentMap | None = None,
        *,
        fail: tuple[int, int, int] = (0, 0, 0),
        deadline_ms: float = DEADLINE_MS,
    ) -> WindowResult:
        """Open one window, as the daemon does."""
        inode = extent.inode if extent else 0
        request = WindowRequest(subject.id, columns(records), inode, deadline_ms)
        self.announce(subject, records)
        try:
            store = extent.fd_ro if extent else -1
            return self.engine.window(Order(request, subject.contexts, store, fail))
        finally:
            self.pager.settle_all(subject.slot)

    def announce(self, subject: Subject, records: Sequence[Record]) -> None:
        """Tell the pager of a window, as the daemon does."""
        announce(self.pager, {subject.slot: columns(records)})


@pytest.fixture
def lab() -> Iterator[Lab]:
    """A laboratory that the test has for itself."""
    lab = Lab()
    yield lab
    lab.close()


def run(op: Op, address: int, first: int, npages: int, offset: int | None = None) -> Record:
    """A record over pages of an arena at *address* whose page n is the extent's page n."""
    place = first if offset is None else offset
    return Record(op, address + (first << PAGE_SHIFT), npages << PAGE_SHIFT, place << PAGE_SHIFT)


def done(result: WindowResult) -> bool:
    """Whether a window carried every record out."""
    return result.refused is None and all(outcome.reason is None for outcome in result.outcomes)


def says(result: WindowResult) -> str:
    """What a window says of itself, for an assertion's message."""
    lines = [_line(outcome) for outcome in result.outcomes]
    return f"{result.refused} {result.detail} {' '.join(lines)}"


def _line(outcome: Outcome) -> str:
    return f"[{outcome.record.op.name} {outcome.result} stage {outcome.stage} {outcome.reason}]"


# ---------------------------------------------------------------- what can be seen of a process


def content(pid: int, address: int, npages: int) -> bytes:
    """Read memory in the one way that changes nothing."""
    with Memory(pid) as memory:
        data = memory.read(address, npages << PAGE_SHIFT)
    assert len(data) == npages << PAGE_SHIFT, "a hole in the arena"
    return data


def mappings(pid: int) -> list[tuple[Any, ...]]:
    """Every mapping with permissions, backing and flags; neighbours that agree are one."""
    joined: list[list[Any]] = []
    for vma in procfs.smaps(pid):
        kind = (
            vma.perms,
            vma.device,
            vma.inode,
            vma.path,
            tuple(sorted(vma.flags - _UNSEEN_FLAGS)),
        )
        offset = vma.offset if vma.inode else 0
        last = joined[-1] if joined else None
        if (
            last
            and last[1] == vma.start
            and last[3] == kind
            and (not vma.inode or last[2] + vma.start - last[0] == offset)
        ):
            last[1] = vma.end
        else:
            joined.append([vma.start, vma.end, offset, kind])
    return [tuple(entry) for entry in joined]


def descriptors(pid: int) -> dict[str, str]:
    """Every open file descriptor, and what it is."""
    folder = Path(f"/proc/{pid}/fd")
    return {entry.name: str(entry.readlink()) for entry in sorted(folder.iterdir())}


_SIGNAL_FIELDS = ("SigPnd", "ShdPnd", "SigBlk", "SigIgn", "SigCgt", "Seccomp", "TracerPid")


def signals(pid: int) -> dict[int, dict[str, str]]:
    """Per thread: pending, blocked, ignored and caught signals, and who traces it."""
    found = {}
    for tid in procfs.tasks(pid):
        fields = procfs.status_fields(pid, tid)
        found[tid] = {name: fields[name] for name in _SIGNAL_FIELDS}
    return found


def snapshot(pid: int) -> dict[str, Any]:
    """All of the above, and the resource limits."""
    return {
        "mappings": mappings(pid),
        "descriptors": descriptors(pid),
        "signals": signals(pid),
        "limits": Path(f"/proc/{pid}/limits").read_text(),
    }


def scratch_left(pid: int) -> list[str]:
    """Mappings where stubs have their scratch memory."""
    end = SCRATCH + SCRATCH_TRIES * SCRATCH_STEP
    return [f"{v.start:#x} {v.perms}" for v in procfs.maps(pid) if SCRATCH <= v.start < end]


def merged(pid: int, extent: memfd.ExtentMap) -> int:
    """Pages of a process that lie in mappings of the extent."""
    return sum(v.end - v.start for v in procfs.maps(pid) if v.inode == extent.inode) >> PAGE_SHIFT


def shared_pages(pid: int, address: int, npages: int) -> tuple[list[int], list[int]]:
    """Pages (numbers in the arena) still shared with the store, and those broken by a write."""
    with PageMap(pid) as pagemap:
        shared, broken = pagemap.still_shared(address, address + (npages << PAGE_SHIFT))
    first = address >> PAGE_SHIFT
    return [int(p) - first for p in shared], [int(p) - first for p in broken]


# ---------------------------------------------------------------- programs


@cache
def program(name: str, *options: str) -> Path:
    """Compile tests/victims/NAME.c once per session."""
    directory = Path(_directory().name)
    binary = directory / re.sub(r"\W", "-", name + "".join(options))
    flags = "-std=gnu11 -D_GNU_SOURCE -O2 -Wall -Wextra -Werror -pthread".split()
    source = VICTIMS / f"{name}.c"
    subprocess.run(["gcc", *flags, *options, source, "-o", binary], check=True)
    return binary


@cache
def _directory() -> tempfile.TemporaryDirectory[str]:
    directory = tempfile.TemporaryDirectory(prefix="ksmd-lab-")
    Path(directory.name).chmod(0o755)
    return directory


StartProgram = Callable[..., "subprocess.Popen[str]"]
UseTracer = Callable[..., None]


@pytest.fixture
def faulty_tracer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> UseTracer:
    """Have the engine's next tracers be mortal_tracer.py, with the faults given by name."""
    fake = Path(__file__).with_name("mortal_tracer.py")
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} {fake} "$@"\n')
    script.chmod(0o755)

    def use(**faults: str | int) -> None:
        monkeypatch.setattr("ksmd.remap.engine.sys", SimpleNamespace(executable=str(script)))
        for name, value in faults.items():
            monkeypatch.setenv(f"MORTAL_{name.upper()}", str(value))

    return use


@pytest.fixture
def programs() -> Iterator[StartProgram]:
    """Start programs of tests/victims: they end with the test, each by its own pid."""
    started: list[subprocess.Popen[str]] = []

    def start(name: str, *arguments: str, options: tuple[str, ...] = (), **more: Any) -> Any:
        process = subprocess.Popen(
            [program(name, *options), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            **more,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
