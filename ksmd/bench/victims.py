"""The victims of one run: started together, spoken to line by line, all ended with their block."""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np

from ksmd.bench.options import Options
from ksmd.bench.workloads import Workload
from ksmd.model.errors import KsmdError

_REPLY_SECONDS = 300.0
#: Of a real worker's memory, one part in so many is scratch memory of its own.
_SCRATCH_PART = 4


@dataclass(frozen=True, slots=True)
class Range:
    """Registered memory of a victim."""

    start: int
    npages: int


class Victim:
    """One process. KsmdError when it ends, hangs, or refuses a command."""

    def __init__(self, command: list[str]) -> None:
        self._partial = b""
        # a session of its own: Ctrl-C is for us, who end it in good order
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )
        self.pid = self._process.pid
        self.ranges: list[Range] = []

    def await_ready(self) -> None:
        """Wait until its memory is laid out."""
        text = self._line()
        if not text.startswith("ready ranges="):
            raise KsmdError(f"a victim said {text!r} instead of ready")
        self.ranges = parse_ranges(text.removeprefix("ready ranges="))

    @property
    def npages(self) -> int:
        """Pages in its ranges."""
        return sum(part.npages for part in self.ranges)

    def ask(self, command: str) -> dict[str, str]:
        """Give the fields of the answer to a command."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{command}\n".encode())
        except BrokenPipeError as error:
            raise KsmdError(f"victim {self.pid} has ended") from error
        word, _, rest = self._line().partition(" ")
        if word != "ok":
            raise KsmdError(f"victim {self.pid} refused {command!r}: {rest}")
        return dict(field.split("=", 1) for field in rest.split())

    def stop(self) -> None:
        """End it and wait until it has ended."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()

    def _line(self) -> str:
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        while b"\n" not in self._partial:
            if not select.select([fd], [], [], _REPLY_SECONDS)[0]:
                raise KsmdError(f"victim {self.pid} does not answer")
            if not (got := os.read(fd, 1 << 20)):
                raise KsmdError(f"victim {self.pid} has ended")
            self._partial += got
        line, _, self._partial = self._partial.partition(b"\n")
        return line.decode()


def parse_ranges(text: str) -> list[Range]:
    """Read "0x1000:16,0x9000:2"."""
    pairs = (part.split(":") for part in text.split(","))
    return [Range(int(start, 16), int(npages)) for start, npages in pairs]


class Yard:
    """Makes victims: compiles the worker and writes the file that real workers load, once."""

    def __init__(self, directory: Path, options: Options) -> None:
        self._options = options
        self._worker = directory / "ksmd-bench-worker"
        self._weights = directory / "weights.npy"
        if any(not workload.real for workload in options.workloads):
            compile_worker(self._worker)
        if any(workload.real for workload in options.workloads):
            self._write_weights()

    @property
    def _scratch_mib(self) -> int:
        return max(1, self._options.mib // _SCRATCH_PART)

    def _write_weights(self) -> None:
        mib = max(1, self._options.mib - self._scratch_mib)
        random = np.random.default_rng(0)
        np.save(self._weights, random.standard_normal(mib << 18, dtype=np.float32))

    def _command(self, workload: Workload, number: int) -> list[str]:
        if workload.real:
            loader = [sys.executable, "-P", "-m", "ksmd.bench.loader"]
            return [*loader, str(self._weights), str(number), str(self._scratch_mib)]
        pages, huge = str(self._options.pages), str(int(workload.huge))
        return [str(self._worker), workload.layout, str(number), pages, huge]

    @contextmanager
    def victims(self, workload: Workload) -> Iterator[list[Victim]]:
        """Start the victims of a workload and end them with the block."""
        with ExitStack() as stack:
            started = []
            for number in range(self._options.victims):
                victim = Victim(self._command(workload, number))
                stack.callback(victim.stop)
                started.append(victim)
            for victim in started:
                victim.await_ready()
            yield started


def compile_worker(target: Path) -> None:
    """Compile worker.c."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise KsmdError("the benchmark needs a C compiler", "install gcc, or set CC")
    with as_file(files("ksmd.bench") / "worker.c") as source:
        command = [compiler, "-std=gnu11", "-O2", "-pthread", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise KsmdError(f"{compiler} failed: {done.stderr.strip()[-500:]}")
