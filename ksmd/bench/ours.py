"""ksmd as a contender: a private daemon that knows the victims' ranges and nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ksmd.bench import census
from ksmd.bench.clocks import cpu_of_family
from ksmd.bench.contender import OURS, Stamp, pids_of
from ksmd.bench.model import PAGE_SIZE, Costs, Point, Report
from ksmd.bench.victims import Victim
from ksmd.client import Client, DaemonUnavailableError
from ksmd.core.layout import VMA_BYTES
from ksmd.kernel import procfs
from ksmd.kernel.tied import tied
from ksmd.model.errors import KsmdError
from ksmd.settings.values import LEAST_TABLE_SIZE

_START_SECONDS = 60.0
_STOP_SECONDS = 60.0
_PASS_SECONDS = 120.0
_POLL_SECONDS = 0.05
_BATCH = 1_000_000
#: Status calls whose cost is measured.
_ASKED = 20

#: How the daemon is started; a profiler may stand in front.
COMMAND = (sys.executable, "-P", "-m", "ksmd.cli.ksmd")


#: Scan settings of a daemon that works flat out.
FLAT_OUT = {"pages_to_scan": _BATCH, "sleep_millisecs": 0, "max_pages_to_merge": _BATCH}


def settings(victims: Sequence[Victim], scan: Mapping[str, int]) -> dict[str, Any]:
    """Give the settings of a daemon that works on the victims' ranges.

    Its tables hold all of it, however much memory is free at its start; without victims they are
    of its own choice.
    """
    pages = sum(max(LEAST_TABLE_SIZE, victim.npages) for victim in victims)
    return {
        "version": 1,
        "scan": dict(scan),
        "tables": {"page_hash_size": pages, "rmap_hash_size": pages},
        "targets": [
            {
                "name": f"victim-{victim.pid}",
                "match": {"pid": victim.pid},
                "domain": "bench",
                "regions": [{"start": r.start, "npages": r.npages} for r in victim.ranges],
            }
            for victim in victims
        ],
    }


class Ksmd:
    """A private daemon. Its background scan is paused: only what is asked for happens."""

    name = OURS

    def __init__(
        self,
        victims: Sequence[Victim],
        command: Sequence[str] = COMMAND,
        scan: Mapping[str, int] = FLAT_OUT,
    ) -> None:
        self._victims = victims
        self._scan = scan
        self._pids = pids_of(victims)
        self._command = list(command)
        self._directory = tempfile.TemporaryDirectory(prefix="ksmd-bench-")
        self._socket = Path(self._directory.name) / "ksmd.sock"
        self._config = Path(self._directory.name) / "ksmd.yaml"
        self._log = Path(self._directory.name) / "ksmd.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._before = 0
        self._passes: list[Point] = []
        self._failed: KsmdError | None = None
        self._thread: threading.Thread | None = None

    # -- its life

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def _start(self) -> None:
        # without targets first: with them, the background scan would begin before it is paused
        self._configure(settings(self._victims, self._scan) | {"targets": []})
        arguments = ["run", "--config", str(self._config), "--socket", str(self._socket)]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                tied([*self._command, *arguments]),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._await_ready()
        self._call("Pause")
        self._configure(settings(self._victims, self._scan))
        self._call("Reload")
        self._before = census.anonymous_pages(self._pids)

    def _configure(self, values: dict[str, Any]) -> None:
        self._config.write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML

    def _await_ready(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                self._call("GetApiVersion")
                return
            except DaemonUnavailableError as error:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise KsmdError(f"ksmd does not answer: {self._last_words()}") from error
            time.sleep(0.02)

    def _stop(self) -> None:
        """End the daemon, which gives everything back first, and whatever it leaves behind."""
        process, self._process = self._process, None
        if process is None:
            return
        helpers = [os.pidfd_open(pid) for pid in procfs.children(process.pid)]
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise KsmdError(f"ksmd did not stop: {self._last_words()}") from None
        finally:
            for helper in helpers:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(helper, signal.SIGKILL)
                os.close(helper)
            if self._thread is not None:
                self._thread.join(_STOP_SECONDS)
            self._directory.cleanup()

    def _last_words(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-15:]) or "(it logged nothing)"

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        with Client(self._socket, None) as ksmd:
            return ksmd.call(method, **parameters)

    @property
    def pid(self) -> int:
        """The daemon's."""
        assert self._process is not None
        return self._process.pid

    # -- its work

    def start(self, stamp: Stamp) -> None:
        """Ask for a scan until settled; a thread waits for the answers."""

        def wait() -> None:
            try:
                with Client(self._socket, None) as ksmd:
                    for reply in ksmd.stream("Scan", wait=True, until_settled=True):
                        if len(self._passes) < reply["passes"]:
                            self._passes.append(stamp())
            except KsmdError as error:
                self._failed = error

        self._thread = threading.Thread(target=wait, daemon=True)
        self._thread.start()

    def go(self) -> None:
        """Let it scan by itself."""
        self._call("Resume")

    def settled(self) -> bool:
        """Whether the scan has been answered."""
        assert self._thread is not None
        if self._thread.is_alive():
            return False
        if self._failed is not None:
            raise KsmdError(f"{self._failed}; its log: {self._last_words()}") from self._failed
        return True

    def passes(self) -> Sequence[Point]:
        """When each pass, scan and merge, ended."""
        return self._passes

    def saved(self) -> int:
        """What the victims have lost less what the store has gained."""
        gone = self._before - census.anonymous_pages(self._pids)
        return max(0, gone - census.shared_memory_pages(self.pid))

    def cpu(self) -> float:
        """Daemon, tracers (replaced ones too) and pager."""
        return cpu_of_family(self.pid)

    def rescan(self, before: Callable[[], None], cpu: Callable[[], float]) -> float:
        """Have the daemon do passes of its own: what has not changed before rests in the second.

        What it takes to ask it whether a pass has ended is not counted.
        """
        self._own_pass()
        before()
        began = cpu()
        asked = self._own_pass()
        spent = cpu() - began
        began = cpu()
        for _ in range(_ASKED):
            self._call("Status")
        return max(0.0, spent - asked * (cpu() - began) / _ASKED)

    def _own_pass(self) -> int:
        """Let it do one pass; how often it was asked for its status."""
        scans, asked = self._call("Status")["full_scans"], 2
        deadline = time.monotonic() + _PASS_SECONDS
        self.go()
        try:
            while self._call("Status")["full_scans"] == scans:
                if time.monotonic() > deadline:
                    raise KsmdError(f"ksmd does not end a pass; its log: {self._last_words()}")
                time.sleep(_POLL_SECONDS)
                asked += 1
        finally:
            self._call("Pause")
        return asked

    def table_bytes(self) -> int:
        """Bytes of its tables."""
        return _table_bytes(self._call("Status"))

    def report(self, entries: NDArray[np.uint64], /) -> Report:
        """Ask for the status, and /proc for the rest."""
        status = self._call("Status")
        spare = census.shared_memory_pages(self.pid) - census.file_frames(entries)
        costs = Costs(
            tables=_table_bytes(status),
            store=max(0, spare) * PAGE_SIZE,
            processes=census.resident_without_store(census.descendants(self.pid)),
        )
        details = {
            "refusals": status["refusals"],
            "stops": status["stops"],
            "stop_ms_p99": status["stop_ms_p99"],
            "stop_ms_max": status["stop_ms_max"],
            "passes": len(self._passes),
        }
        return Report(costs, details)


def _table_bytes(status: dict[str, Any]) -> int:
    vmas = sum(int(target["vmas_used"]) for target in status["targets"])
    return int(status["metadata_bytes"]) - vmas * VMA_BYTES
