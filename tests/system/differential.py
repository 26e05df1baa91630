"""Twins of tests/victims/program.c: some merged and given back without end, some left alone.

A twin's answer to "run N" holds a digest of all that its operations gave and of every page it has.
All twins with one seed must answer the same. The ones left alone are two, so that a program that
does not repeat itself could not be taken for a defect of the merging, or hide one.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import select
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

from harness import CROWDED, Daemon

#: Seconds that a twin may take for one answer before it counts as hung.
PATIENCE = 120.0
SOURCES = Path(__file__).parents[1] / "victims"
MERGED, ALONE = 2, 2


@cache
def binary() -> Path:
    """Build program.c, once per session; the result goes when the session ends."""
    directory = Path(tempfile.mkdtemp(prefix="ksmd-program-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    result = directory / "ksmd-program"
    flags = ["-std=gnu11", "-D_GNU_SOURCE", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread"]
    subprocess.run(["gcc-12", *flags, SOURCES / "program.c", "-o", result], check=True)
    return result


class TwinError(AssertionError):
    """A twin died or hangs."""


class Twin:
    """One run of the program. ``token`` (if any) is how a daemon's settings select it."""

    def __init__(self, name: str, directory: Path, seed: int, offset: int, token: str = "") -> None:
        self.name = name
        self.trace = directory / f"trace.{name}"
        self._stderr = directory / f"stderr.{name}"
        self._partial = b""
        command = [
            binary(), f"--seed={seed}", f"--directory={directory}", f"--offset={offset}",
            f"--trace={self.trace}", *([f"--token={token}"] if token else []),
        ]  # fmt: skip
        with self._stderr.open("wb") as stderr:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                bufsize=0,
                start_new_session=True,
            )
        self.pid = self.process.pid

    def ask(self, command: str) -> None:
        """Send a line."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is dead: its answer says so
            self.process.stdin.write(f"{command}\n".encode())

    def answer(self) -> str:
        """Wait for a line."""
        assert self.process.stdout is not None
        out = self.process.stdout.fileno()
        while b"\n" not in self._partial:
            if not select.select([out], [], [], PATIENCE)[0]:
                raise TwinError(f"{self.name} hangs {self.epitaph()}")
            if not (got := os.read(out, 1 << 16)):
                self.process.wait(PATIENCE)
                raise TwinError(f"{self.name} died {self.epitaph()}")
            self._partial += got
        line, _, self._partial = self._partial.partition(b"\n")
        return line.decode()

    def epitaph(self) -> str:
        """Say what is known of its state."""
        last = self.trace.read_text().splitlines()[-3:] if self.trace.exists() else []
        said = self._stderr.read_text(errors="replace").strip()
        return f"(pid {self.pid}, exit code {self.process.poll()}, {said!r}, last traced {last})"

    def pages(self) -> dict[tuple[int, int], str]:
        """Give the digest of every page by (slot, page)."""
        self.ask("pages")
        found = {}
        while (line := self.answer()) != "end":
            slot, page, digest = line.split()
            found[int(slot), int(page)] = digest
        return found

    def close(self) -> None:
        """End it, and what it forked: the session is its own."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, 9)
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


class Pair:
    """Two twins merged with each other, two left alone."""

    def __init__(self, directory: Path, seed: int, start: Callable[..., Daemon]) -> None:
        self.seed = seed
        self.twins: list[Twin] = []
        token = secrets.token_hex(8)
        try:
            for number in range(MERGED + ALONE):
                merged = number < MERGED
                name = f"{'merged' if merged else 'alone'}{number}"
                twin = Twin(name, directory, seed, number * 37, token if merged else "")
                self.twins.append(twin)
            for twin in self.twins:
                assert twin.answer() == "ready"
            self.daemon = start(settings(token))
        except BaseException:
            self.close()
            raise

    @property
    def merged_pids(self) -> list[int]:
        """The twins that the daemon may touch."""
        return [twin.pid for twin in self.twins[:MERGED]]

    def run(self, operations: int) -> None:
        """Have all twins do so many operations at once; AssertionError where they differ."""
        for twin in self.twins:
            twin.ask(f"run {operations}")
        answers = [twin.answer() for twin in self.twins]
        if len(set(answers)) > 1:
            raise AssertionError(self.describe(answers))

    def describe(self, answers: Sequence[str]) -> str:
        """Say which pages differ, and from which operation on."""
        names = [twin.name for twin in self.twins]
        lines = [f"seed {self.seed}: twins differ"]
        lines += [f"  {name}: {answer}" for name, answer in zip(names, answers, strict=True)]
        if len(set(answers[MERGED:])) > 1:
            lines.append("  even those left alone: the program does not repeat itself")
        lines += _first_differences([twin.trace for twin in self.twins], 1)
        children = sorted(self.twins[0].trace.parent.glob(f"{self.twins[0].trace.name}.*"))
        for path in children:
            child = path.name.removeprefix(self.twins[0].trace.name)
            lines += _first_differences(
                [twin.trace.with_name(twin.trace.name + child) for twin in self.twins], 10
            )
        pages = [twin.pages() for twin in self.twins]
        places = sorted(set().union(*pages))
        wrong = [place for place in places if len({found.get(place) for found in pages}) > 1]
        lines.append(f"  pages that differ: {len(wrong)} of {len(places)}")
        for place in wrong[:20]:
            lines.append(f"  slot {place[0]} page {place[1]}: {[p.get(place) for p in pages]}")
        return "\n".join(lines)

    def close(self) -> None:
        """End the twins."""
        for twin in self.twins:
            twin.close()


def _first_differences(traces: Sequence[Path], most: int) -> list[str]:
    """Name the first lines in which traces of one thing differ."""
    texts = [path.read_text().splitlines() if path.exists() else [] for path in traces]
    steps = enumerate(zip_longest(*texts))
    found = [f"  {traces[0].name} line {n}: {step}" for n, step in steps if len(set(step)) > 1]
    return found[:most]


def settings(token: str) -> dict[str, Any]:
    """All of the merged twins' memory, and of the children that they fork."""
    return {
        "version": 1,
        "targets": [
            {
                "name": "twins",
                "match": {"cmdline": f"ksmd-program .*--token={token}$"},
                "domain": "twins",
                "regions": "anon",
            }
        ],
    } | CROWDED
