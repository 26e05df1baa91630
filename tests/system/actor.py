"""Actors: processes that do to their own memory what ordinary programs do now and then.

``Actor(pages)`` starts ``actor.c`` (built on first use). Two actors with one seed hold equal pages.
Pages are counted from the arena's start; ``errno`` is 0 when the call went well:

=================  =============================================================================
sum [PAGE N]       ``sum=`` of the arena, or of a part
write PAGE [N]     change one word of each page; twice is as before
dontneed PAGE N    MADV_DONTNEED: ``errno= bad=`` (words that are not zero then)
advise PAGE N A    madvise with advice A (a number): ``errno=``
readonly, writable PAGE N   mprotect: ``errno=``
unmap PAGE N       munmap: ``errno=``; map PAGE N: fresh memory there: ``errno= bad=``
move               mremap of the whole arena to another place: ``errno= address=``; where it
                   fails, ``moved=`` pages had moved by then, and are moved back
grow N             mremap to N pages more, where it is: ``errno= bad=`` (of the new pages)
watch PAGE N       register them with a userfaultfd of its own: ``errno=``; and take that back, for
                   the whole arena: ``unregister=``
fork               a child that lives on: ``pid=``; "child COMMAND" is answered by it
exec               execve of itself: all memory is new (:meth:`Actor.exec`)
=================  =============================================================================
"""

from __future__ import annotations

import atexit
import select
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

PATIENCE = 60.0


@cache
def binary() -> Path:
    """Build actor.c, once per session."""
    directory = Path(tempfile.mkdtemp(prefix="actors-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    result = directory / "actor"
    source = Path(__file__).with_name("actor.c")
    flags = ["-std=gnu11", "-D_GNU_SOURCE", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread"]
    subprocess.run(["gcc", *flags, source, "-o", result], check=True)
    return result


class Actor:
    """One running actor; ``pid`` and ``region`` as victims have them."""

    def __init__(self, pages: int, *, seed: int = 1, leaderless: bool = False) -> None:
        self._process = subprocess.Popen(
            [binary(), str(pages), str(seed), str(int(leaderless))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        self.pid = self._process.pid
        self.region = self._ready()

    def _ready(self) -> tuple[int, int]:
        values = self._values("ready")
        return values["address"], values["pages"]

    def ask(self, text: str) -> dict[str, int]:
        """Send one command; its reply as numbers by name."""
        self._send(text)
        return self._values("ok")

    def exec(self) -> None:
        """Have it call execve: same pid, new memory with the same content."""
        self._send("exec")
        self.region = self._ready()

    def _send(self, text: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{text}\n".encode())

    def _values(self, expected: str) -> dict[str, int]:
        assert self._process.stdout is not None
        got = b""
        while not got.endswith(b"\n"):
            assert select.select([self._process.stdout], [], [], PATIENCE)[0], "it does not answer"
            piece = self._process.stdout.read(1)
            assert piece, f"it has ended with code {self._process.wait()}"
            got += piece
        word, *pairs = got.decode().split()
        assert word == expected, got
        return {key: int(value, 0) for key, value in (pair.split("=") for pair in pairs)}

    def quit(self) -> int:
        """Have it end by itself; its exit code."""
        self._send("quit")
        return self._process.wait(PATIENCE)

    def stop(self) -> None:
        """Kill it and reap it. A child of its own ends with it."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
