"""The acts of ``ksmd demo``: what each shows, and how it is checked.

Everything it claims is checked: memory by the frames that the kernel's page map shows (not by our
own counters), content by digests that each worker makes of its memory and that are compared with
what the seeds give. It touches no process but its own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ksmd.cli import estimate as estimate_verb
from ksmd.cli import features as features_verb
from ksmd.cli import render, words
from ksmd.cli.common import console
from ksmd.cli.demo_daemon import DemoDaemon
from ksmd.cli.demo_workers import Part, Sizes, Worker, expected_sums, shared_byte
from ksmd.cli.scan import described, scan
from ksmd.cli.screens.status import available_memory
from ksmd.client import Client
from ksmd.daemon import estimate
from ksmd.kernel import pageentries, procfs, proctext
from ksmd.kernel.pagemap import PageMap
from ksmd.model.errors import KernelFeatureError, KsmdError, PrivilegeError
from ksmd.model.units import PAGE_SIZE

#: The share of the duplicates that must be merged for the demo to succeed.
ENOUGH = 0.95


def play(workers: int, mib: int, *, keep: bool) -> None:
    """Show it all; KsmdError when anything is not as promised."""
    sizes = Sizes.of(mib)
    _require(workers, sizes)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _as_interrupt)
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="ksmd-demo-"))
        Demo(console(), stack, Path(directory), workers, sizes).play(keep=keep)


@dataclass(frozen=True, slots=True)
class Measure:
    """Memory of all workers: distinct frames (zero page excluded) and the sum of Pss, in bytes."""

    frames: int
    pss: int


class Demo:
    """One run of the demo. What it starts is ended by *stack*, in reverse order."""

    def __init__(
        self, out: Console, stack: contextlib.ExitStack, directory: Path, workers: int, sizes: Sizes
    ) -> None:
        self._out = out
        self._stack = stack
        self._directory = directory
        self._sizes = sizes
        self._count = workers
        self._workers: list[Worker] = []
        self._changed: dict[int, dict[int, int]] = {}
        self._step = 0

    def play(self, *, keep: bool) -> None:
        """Play the acts in order."""
        self._start_workers()
        self._estimate()
        before = self._measure()
        daemon = self._start_daemon()
        with Client(daemon.socket) as ksmd:
            self._merge(ksmd)
            merged = self._measure()
            self._judge(before, merged)
            if keep:
                self._look_around(daemon)
            ksmd.call("Pause")  # so that nothing is merged again behind the next acts' back
            self._write()
            self._verify("every byte of every worker, while merged")
            after = self._unmerge(ksmd, merged)
        self._verify("every byte of every worker, after unmerge")
        self._end(daemon)
        self._summary(before, merged, after)

    # -- acts ----------------------------------------------------------------------------------

    def _start_workers(self) -> None:
        sizes = self._sizes
        self._title(
            f"{self._count} workers, each with {words.size(sizes.shared)} of the same data,"
            f" {words.size(sizes.private)} of its own and {words.size(sizes.zero)} of zeros"
        )
        with self._busy("the workers fill their memory …"):
            for number in range(self._count):
                worker = Worker(number, sizes)
                self._stack.callback(worker.kill)
                self._workers.append(worker)
            for worker in self._workers:
                worker.wait_ready()
        pids = ", ".join(str(worker.pid) for worker in self._workers)
        self._say(f"pids {pids}; the same data lies at another address in each")

    def _estimate(self) -> None:
        self._title("Estimate: what would merging save? (reads only; no daemon yet)")
        with self._busy("reading …"):
            found = estimate.run([worker.pid for worker in self._workers])
        self._say(estimate_verb.headline(found))

    def _start_daemon(self) -> DemoDaemon:
        self._title("A daemon of our own, which may touch these workers and nothing else")
        with self._busy("starting …"):
            daemon = DemoDaemon(self._directory, [worker.pid for worker in self._workers])
            self._stack.callback(daemon.kill)
            daemon.wait_ready()
        self._say(f"ksmd run is ready, pid {daemon.pid}, socket {daemon.socket}")
        return daemon

    def _merge(self, ksmd: Client) -> None:
        self._title(
            "Scan and merge until nothing more is found (ksmctl scan --wait --until-settled)"
        )
        reply = scan(ksmd, wait=True, until_settled=True)
        self._say(f"{described(reply)}; {'settled' if reply['settled'] else 'not settled'}")
        if not reply["settled"]:
            raise KsmdError("the scan did not settle although nobody writes to the memory")

    def _judge(self, before: Measure, merged: Measure) -> None:
        """Compare with what could be merged: all but one copy of the data, and every zero page."""
        pages = self._sizes
        duplicates = ((self._count - 1) * pages.shared + self._count * pages.zero) // PAGE_SIZE
        saved = before.frames - merged.frames
        share = saved / duplicates
        self._say(
            f"distinct physical pages: {before.frames:,} before, {merged.frames:,} merged:"
            f" {words.pages_size(saved)} came free, {share:.1%} of the duplicates"
        )
        if share < ENOUGH:
            raise KsmdError(f"only {share:.1%} of the duplicates were merged, not {ENOUGH:.0%}")

    def _write(self) -> None:
        self._title("One worker writes one byte into a merged page")
        before = [self._frames(worker, worker.shared) for worker in self._workers]
        writer = self._workers[1]
        page = writer.shared.npages // 2
        offset = page * PAGE_SIZE + 100
        value = shared_byte(self._sizes, offset) ^ 0xFF
        writer.ask(f"write {offset} {value}")
        self._changed[writer.number] = {offset: value}
        self._verify("that its own copy changed, and nobody else's")
        for worker, frames in zip(self._workers, before, strict=True):
            moved = np.flatnonzero(self._frames(worker, worker.shared) != frames).tolist()
            if moved != ([page] if worker is writer else []):
                raise KsmdError(f"worker {worker.number}: pages {moved[:5]} … have other frames")
        self._say(f"one page got a frame of its own (copy-on-write): page {page} of {writer.pid}")

    def _unmerge(self, ksmd: Client, merged: Measure) -> Measure:
        self._title("Unmerge: every page back as memory of its own (ksmctl unmerge --wait)")
        with self._busy("giving pages back …"):
            reply = ksmd.call("Unmerge", wait=True)
        for refusal in reply.get("refused") or []:
            raise KsmdError(f"not all pages came back: {refusal['sentence']}")
        after = self._measure()
        least = self._count * (self._sizes.shared + self._sizes.private) // PAGE_SIZE
        self._say(
            f"{words.count(reply['pages'], 'page')} given back: {after.frames:,} distinct physical"
            f" pages, {words.pages_size(after.frames - merged.frames)} more than while merged"
        )
        self._say("(zeros take no memory until somebody writes to them)")
        if after.frames < least:
            raise KsmdError(f"only {after.frames:,} of {least:,} pages are their worker's own")
        return after

    def _end(self, daemon: DemoDaemon) -> None:
        self._title("The daemon stops; the workers live on, and end by themselves")
        with self._busy("stopping …"):
            daemon.stop()
        self._verify("every byte of every worker, without a daemon")
        for worker in self._workers:
            code = worker.quit()
            if code != 0:
                raise KsmdError(f"worker {worker.number} ended with code {code}")
        self._say("all ended with code 0")

    def _look_around(self, daemon: DemoDaemon) -> None:
        self._say(f"Look around: ksmctl --socket {daemon.socket} status")
        with contextlib.suppress(EOFError):
            input("   Press Enter to go on. ")

    def _summary(self, before: Measure, merged: Measure, after: Measure) -> None:
        made = render.table("", ">before", ">merged", ">unmerged")
        columns = (before, merged, after)
        made.add_row("distinct physical pages", *(f"{one.frames:,}" for one in columns))
        made.add_row("  as memory", *(words.pages_size(one.frames) for one in columns))
        made.add_row("Pss of the workers", *(words.size(one.pss) for one in columns))
        self._out.print()
        self._out.print(made)
        self._out.print()
        self._out.print(Text("Everything was as promised.", style="bold green"))

    # -- looking -------------------------------------------------------------------------------

    def _frames(self, worker: Worker, part: Part) -> NDArray[np.uint64]:
        """Give the frame of each page of *part*, 0 where there is none."""
        with PageMap(worker.pid) as pagemap:
            return pageentries.pfn(pagemap.entries(part.first_page, part.npages))

    def _measure(self) -> Measure:
        frames = np.concatenate(
            [self._frames(worker, part) for worker in self._workers for part in worker.parts]
        )
        distinct = set(np.unique(frames).tolist()) - {0, pageentries.zero_pfn()}
        pss = sum(
            int(fields["Pss"].split()[0]) << 10
            for fields in (
                proctext.parse_fields(procfs.read_process(worker.pid, "smaps_rollup"))
                for worker in self._workers
            )
        )
        return Measure(len(distinct), pss)

    def _verify(self, what: str) -> None:
        with self._busy("comparing …"):
            for worker in self._workers:
                changed = self._changed.get(worker.number)
                if worker.sums() != expected_sums(worker.number, self._sizes, changed):
                    raise KsmdError(f"worker {worker.number} (pid {worker.pid}) sees other content")
        self._say(f"verified {what}")

    # -- telling -------------------------------------------------------------------------------

    def _title(self, text: str) -> None:
        self._step += 1
        self._out.print()
        self._out.print(_indented(f"{self._step}.", Text(text, style="bold")))

    def _say(self, text: str) -> None:
        self._out.print(_indented("", Text(text)))

    @contextlib.contextmanager
    def _busy(self, text: str) -> Iterator[None]:
        """Show that something is under way, where somebody watches."""
        if not self._out.is_terminal:
            yield
            return
        with self._out.status(text):
            yield


def _indented(number: str, text: Text) -> Table:
    """Put *text* right of a narrow column, so that a second line is indented as the first."""
    made = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1, 0, 0))
    made.add_column(width=2, style="bold")
    made.add_column(overflow="fold")
    made.add_row(number, text)
    return made


def _require(workers: int, sizes: Sizes) -> None:
    if os.geteuid() != 0:
        raise PrivilegeError("the demo merges memory of processes", "run it as root")
    missing = [one for one in features_verb.probe() if one.needed and not one.present]
    if missing:
        names = ", ".join(one.name for one in missing)
        raise KernelFeatureError(
            f"ksmd cannot merge here, missing: {names}", "`ksmctl features` says what that means"
        )
    needed = 2 * workers * (sizes.shared + sizes.private + sizes.zero)
    available = available_memory()
    if available is not None and needed > available:
        raise KsmdError(
            f"the demo may need {words.size(needed)}, and {words.size(available)} are available",
            "choose fewer --workers or a smaller --mib",
        )


def _as_interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
