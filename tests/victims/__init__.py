"""Victims: real processes that check themselves, for tests that change memory under them.

``Victim(kind, **options)`` starts ``victim.c`` (built on first use), waits until every one of its
threads is at work, and talks with it line by line. ``KINDS`` are ready-made sets of options; any
option may be given beside them::

    with Victim("nanosleep", pages=512, layout="mixed") as victim:
        first, npages = victim.region
        ...
        assert victim.check(), victim.report()

Options (all have defaults): ``pages``; ``address`` (an int) or ``offset`` (pages after a 2 MiB
boundary) or ``heap=True``: where the arena lies; ``layout``: "runs:long", "runs:short", "singles",
"zeros", "unique", "tails" (all but the last word equal), "mixed"; ``seed``: victims with one seed
hold equal pages; ``thp``: "none", "off", "madvise", "on" (collapsed); ``threads`` (0: the main
thread does the work) and ``work``: see ``WORKS``, "all" gives each thread another; ``uid``;
``spare_fds``: room left in the file descriptor table; ``namespaces``; ``seccomp``.

Commands (page numbers count from the arena's start; ``N`` defaults to 1):

=================  ============================================================================
sum                every page against what it must hold: ``sum= bad= first=``
read PAGE          one page: ``sum= bad= (words) zero=``
write PAGE [N]     change eight words of each page
restore PAGE [N]   write the pages as they were at the start
dontneed PAGE [N]  MADV_DONTNEED, then they must be zeros: ``bad=``
hammer SECONDS     two threads verify while the main one drops and refills pages:
                   ``reads= drops= bad= stale=``
fork               a child verifies, writes, drops, verifies: ``child=`` (exit code) ``bad=``
addr               ``address= pages= own= spin= spin_end=``
errors             counts so far: ``eintr= early= wrong= registers= writer= arena=``, and ``rounds=
                   idle=`` (workers that have not completed a round)
quit               exit with code 0
=================  ============================================================================
"""

from __future__ import annotations

import atexit
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

#: What a thread can do; the waits each end by a timeout of 100 ms or by the next byte of a pipe.
WAITS = ("nanosleep", "epoll", "futex", "pipe", "poll", "sigtimedwait", "semtimedop", "recv")
WORKS = (*WAITS, "compute", "write")

#: Options by kind. Kinds named after a work have one thread besides the main one.
KINDS: dict[str, dict[str, Any]] = {
    "idle": {},
    "writers": {"threads": 8, "work": "write"},
    "crowd": {"threads": 200, "work": "write"},
    "all": {"threads": 2 * len(WORKS), "work": "all"},
    "nobody": {"uid": 65534},
    "full-fds": {"spare_fds": 2},
    "namespaces": {"namespaces": True},
    "seccomp": {"seccomp": True, "threads": 1, "work": "nanosleep"},
    **{work: {"threads": 1, "work": work} for work in WORKS},
}

#: How long a reply may take before the victim counts as hung. Generous: it only ends bad tests.
REPLY_SECONDS = 60.0

_ERRORS = ("eintr", "early", "wrong", "registers", "writer", "arena")


class VictimError(Exception):
    """The victim died, hung, or could not be started."""


@cache
def binary() -> Path:
    """Build victim.c, once per session; the result goes when the session ends."""
    directory = Path(tempfile.mkdtemp(prefix="ksmd-victims-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    directory.chmod(0o755)
    result = directory / "ksmd-victim"
    source = Path(__file__).with_name("victim.c")
    warnings = ["-Wall", "-Wextra", "-Werror"]
    subprocess.run(
        ["gcc", "-std=gnu11", "-D_GNU_SOURCE", "-O2", *warnings, "-pthread", source, "-o", result],
        check=True,
    )
    return result


class Victim:
    """One running victim.

    ``pid``: of the victim itself, as this process sees it (with ``namespaces`` it is a grandchild).
    ``region``: (address, npages) of the arena. ``equal``, ``unique``, ``zero``: how many of its
    pages are of that sort; ``distinct``: how many contents the equal ones have. Of n victims with
    the same seed, layout and size n * equal - distinct equal pages can be saved.
    """

    def __init__(self, kind: str = "idle", **options: Any) -> None:
        self.kind = kind
        self.options = KINDS[kind] | options
        self._partial = b""
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  (closed in stop)
        self._process = subprocess.Popen(
            [binary(), *_arguments(self.options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            bufsize=0,
        )
        self.pid = self._process.pid
        try:
            self._await_ready()
        except BaseException:
            self.stop()
            raise

    def _await_ready(self) -> None:
        line = self._line()
        if line.startswith("pid "):
            self.pid = int(line.split()[1])
            line = self._line()
        word, _, rest = line.partition(" ")
        if word != "ready":
            raise VictimError(f"expected ready, got {line!r}")
        values = fields(rest)
        self.region = (values["address"], values["pages"])
        self.equal, self.distinct = values["equal"], values["distinct"]
        self.unique, self.zero = values["unique"], values["zero"]

    @property
    def address(self) -> int:
        """The arena's first byte."""
        return self.region[0]

    @property
    def pages(self) -> int:
        """The arena's length in pages."""
        return self.region[1]

    def command(self, text: str) -> str:
        """Send one command, wait for its reply and give it without its "ok "."""
        self.begin(text)
        return self.finish()

    def begin(self, text: str) -> None:
        """Send one command without waiting for the reply."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{text}\n".encode())
        except BrokenPipeError as error:
            raise VictimError(f"the victim is gone {self._epitaph()}") from error

    def finish(self) -> str:
        """Wait for the reply to what ``begin`` sent."""
        word, _, rest = self._line().partition(" ")
        if word != "ok":
            raise VictimError(f"{self.kind}: {rest}")
        return rest

    def ask(self, text: str) -> dict[str, int]:
        """Give the reply to a command as numbers by name."""
        return fields(self.command(text))

    def errors(self) -> dict[str, int]:
        """Give what went wrong in the victim so far, by kind; empty when nothing did."""
        counts = self.ask("errors")
        return {name: counts[name] for name in _ERRORS if counts[name]}

    def check(self) -> bool:
        """Say whether the arena holds what it must and nothing went wrong in any thread."""
        return self.ask("sum")["bad"] == 0 and not self.errors()

    def report(self) -> str:
        """Give all that the victim knows about itself, for an assertion's message."""
        return f"{self.kind} {self.options}: {self.command('sum')}; {self.command('errors')}"

    def await_rounds(self, rounds: int) -> None:
        """Wait until its threads have completed *rounds* more rounds of work, each at least one."""
        goal = self.ask("errors")["rounds"] + rounds
        deadline = time.monotonic() + REPLY_SECONDS
        while (state := self.ask("errors"))["rounds"] < goal or state["idle"]:
            if time.monotonic() > deadline:
                raise VictimError(f"{self.kind}: its threads stand still: {state}")
            time.sleep(0.01)

    def alive(self) -> bool:
        """Say whether the victim runs."""
        return self._process.poll() is None

    def stop(self) -> int:
        """Kill the victim, if it still runs, and reap it; its exit code (-9: it did run)."""
        if self.alive():
            try:
                os.kill(self.pid, signal.SIGKILL)
            except ProcessLookupError:  # its parent, in the middle of starting or ending
                self._process.kill()
        code = self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            if stream is not None:
                stream.close()
        return code

    def __enter__(self) -> Victim:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _line(self) -> str:
        """Read one line of the victim's."""
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        while b"\n" not in self._partial:
            if not poll.poll(REPLY_SECONDS * 1000):
                raise VictimError(f"{self.kind} does not answer {self._epitaph()}")
            if not (got := os.read(fd, 4096)):
                self._process.wait()
                raise VictimError(f"the victim is gone {self._epitaph()}")
            self._partial += got
        line, _, self._partial = self._partial.partition(b"\n")
        return line.decode()

    def _epitaph(self) -> str:
        self._stderr.seek(0)
        said = self._stderr.read().decode(errors="replace").strip()
        return f"({self.kind}, exit code {self._process.poll()}): {said}"


def fields(text: str) -> dict[str, int]:
    """Read "a=1 b=0x2 sum=ffee" as numbers; ``sum`` is always hexadecimal."""
    pairs = (item.split("=") for item in text.split())
    return {key: int(value, 16 if key == "sum" else 0) for key, value in pairs}


def _arguments(options: dict[str, Any]) -> list[str]:
    known = {k: v for k, v in options.items() if v is not None}
    return [f"--{key.replace('_', '-')}={_text(value)}" for key, value in known.items()]


def _text(value: Any) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)
