"""Kernel KSM as a contender, flat out, and the care that takes on a host that others use too."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ksmd.bench.clocks import cpu_of, kernel_thread
from ksmd.bench.contender import THEIRS, Stamp, pids_of
from ksmd.bench.model import Costs, Point, Report
from ksmd.bench.victims import Victim
from ksmd.kernel import ksm
from ksmd.kernel.sysfs import chosen, write
from ksmd.model.errors import KsmdError

#: sizeof(struct ksm_rmap_item) and of struct ksm_stable_node (mm/ksm.c) with their slab's padding.
_RMAP_ITEM = 64
_STABLE_NODE = 64
_POLL_SECONDS = 0.002
_RESCAN_SECONDS = 600.0

_SETTINGS: dict[str, int | str] = {
    "advisor_mode": "none",  # first: it would set pages_to_scan itself
    "pages_to_scan": 1_000_000,
    "sleep_millisecs": 0,
    "smart_scan": 1,
    "use_zero_pages": 0,
    "run": 1,
}


def unusable(folder: Path = ksm.SYSFS) -> str:
    """Why kernel KSM cannot be measured here; empty when it can."""
    values = ksm.read(folder)
    if values is None:
        return "this kernel has no KSM"
    if values.get("run") == 1 or int(values.get("pages_shared", 0)):
        return (
            "kernel KSM is in use on this host"
            f" (run={values.get('run')}, pages_shared={values.get('pages_shared')};"
            f" what ended processes left there goes by writing 2 to {folder / 'run'})"
        )
    if kernel_thread("ksmd") is None:
        return "the kernel thread of KSM cannot be found"
    return ""


def flat_out(folder: Path = ksm.SYSFS) -> dict[str, int | str]:
    """Give the settings under which KSM works without a pause, as far as this kernel has them."""
    return {name: value for name, value in _SETTINGS.items() if (folder / name).exists()}


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Keep Ctrl-C and SIGTERM waiting, so that what is set is remembered, and put back in full.

    By handlers and not by a mask: a library's thread would take the signal in our place.
    """
    caught: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: caught.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if caught:
            signal.raise_signal(caught[0])


@contextmanager
def kept(folder: Path = ksm.SYSFS) -> Iterator[None]:
    """Put KSM's settings back as they are now, whatever happens in the block.

    Every run restores its own; this is the second net, for an interrupt at the worst instant.
    """
    now = {name: chosen((folder / name).read_text()) for name in flat_out(folder)}
    with ksm.KernelKsm(folder, **now):
        yield


class KernelKsmd:
    """KSM on the victims' ranges. ``settled``: a whole scan, after the second, saved no more."""

    name = THEIRS

    def __init__(self, victims: Sequence[Victim]) -> None:
        self._victims = victims
        self._pids = pids_of(victims)
        thread = kernel_thread("ksmd")
        if thread is None:
            raise KsmdError("the kernel thread of KSM cannot be found")
        self._thread = thread
        self._stack = ExitStack()
        self._ksm = ksm.KernelKsm(ksm.SYSFS, **flat_out())
        self._first = 0
        self._seen = (0, 0)
        self._passes: list[Point] = []
        self._stamp: Stamp | None = None

    def __enter__(self) -> Self:
        for victim in self._victims:
            victim.ask("mergeable")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with uninterrupted():
            self._stack.close()

    @staticmethod
    def _forget() -> None:
        """Unmerge and drop every rmap item: with run=0 those of ended processes would stay."""
        write(ksm.SYSFS / "run", "2")

    def start(self, stamp: Stamp) -> None:
        """Set run to 1."""
        self._stamp = stamp
        self._first = self._value("full_scans")
        with uninterrupted():
            self._stack.enter_context(self._ksm)
            self._stack.callback(self._forget)

    def _value(self, name: str) -> int:
        try:
            return int((ksm.SYSFS / name).read_text())
        except FileNotFoundError:  # ksm_zero_pages: Linux 6.6
            return 0

    def settled(self) -> bool:
        """Whether the last whole scan found nothing more."""
        scans, saved = self._value("full_scans") - self._first, self.saved()
        if scans <= self._seen[0]:
            return False
        assert self._stamp is not None
        while len(self._passes) < scans:
            self._passes.append(self._stamp())
        before, self._seen = self._seen[1], (scans, saved)
        return scans >= 2 and (not saved or (scans > 2 and saved == before))

    def passes(self) -> Sequence[Point]:
        """When each full scan ended, as seen by polling."""
        return self._passes

    def saved(self) -> int:
        """What KSM counts: on a host where nobody else uses it these are the victims'."""
        return self._value("pages_sharing") + self._value("ksm_zero_pages")

    def cpu(self) -> float:
        """The kernel thread's."""
        return cpu_of(self._thread)

    def rescan(self, before: Callable[[], None], cpu: Callable[[], float]) -> float:
        """Wait for the end of a scan, and from there on for the end of the next."""
        self._next_scan()
        before()
        scans, began = self._value("full_scans"), cpu()
        self._next_scan()
        return (cpu() - began) / (self._value("full_scans") - scans)

    def _next_scan(self) -> None:
        scans, deadline = self._value("full_scans"), time.monotonic() + _RESCAN_SECONDS
        while self._value("full_scans") == scans:
            if time.monotonic() > deadline:
                raise KsmdError("kernel KSM does not end a full scan")
            time.sleep(_POLL_SECONDS)

    def report(self, _entries: NDArray[np.uint64], /) -> Report:
        """Count its rmap items and stable nodes."""
        items = sum(self._rmap_items(victim) for victim in self._victims)
        nodes = self._value("pages_shared")
        costs = Costs(kernel=items * _RMAP_ITEM + nodes * _STABLE_NODE)
        details = {"rmap_items": items, "stable_nodes": nodes, "passes": len(self._passes)}
        return Report(costs, details)

    def _rmap_items(self, victim: Victim) -> int:
        """One for each page that was scanned; the kernel tells since Linux 6.1."""
        try:
            text = Path(f"/proc/{victim.pid}/ksm_stat").read_text()
        except OSError:
            return victim.npages
        fields = dict(line.split()[:2] for line in text.splitlines() if len(line.split()) >= 2)
        return int(fields.get("ksm_rmap_items", victim.npages))
