"""What system calls answer about merged memory: as for any other, but for what the manual tells.

Two programs make the same calls, one on memory that is merged and one on memory that is not.
"""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Oracle, mappings, settings_for, store_mappings

pytestmark = pytest.mark.root

#: What differs, by call: on merged memory and on any other. README.md, Limits, and ksmd.safety(7).
DIFFERENCES = {
    "madvise-8": (errno.EINVAL, 0),  # FREE
    "madvise-9": (errno.EACCES, errno.EINVAL),  # REMOVE
    "madvise-18": (errno.EINVAL, 0),  # WIPEONFORK
    "resident-half-dropped": (8, 4),  # mincore
    "dontneed-sealed-readonly": (0, errno.EPERM),
}


class Caller:
    """One running ``calls.c``."""

    def __init__(self, program: Path) -> None:
        self._process = subprocess.Popen(
            [program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self._process.pid
        assert self._process.stdout is not None
        values = dict(word.split("=") for word in self._process.stdout.readline().split()[1:])
        self.region = int(values["address"], 0), int(values["pages"])

    def answers(self) -> dict[str, int]:
        """Have it make its calls, and end."""
        told, _ = self._process.communicate("go\n", timeout=60)
        assert self._process.returncode == 0
        pairs = [line.split("=") for line in told.splitlines()]
        assert len({name for name, _ in pairs}) == len(pairs) > 50
        return {name: int(value) for name, value in pairs}

    def stop(self) -> None:
        """Kill it and reap it."""
        self._process.kill()
        self._process.wait()


@pytest.fixture
def callers(tmp_path: Path) -> Iterator[list[Caller]]:
    """Three of them, with equal memory."""
    program, source = tmp_path / "calls", Path(__file__).with_name("calls.c")
    flags = ["-std=gnu11", "-D_GNU_SOURCE", "-O1", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(["gcc", *flags, source, "-o", program], check=True)
    started = [Caller(program) for _ in range(3)]
    yield started
    for caller in started:
        caller.stop()


def test_calls_on_merged_memory_answer_as_on_any_other_but_for_what_is_told(callers, daemons):
    merged, twin, plain = callers
    oracle = Oracle(merged, twin)
    daemons(settings_for(merged, twin)).scan()
    assert oracle.share() == 1
    print(store_mappings(merged.pid), len(mappings(merged.pid)))
    found, expected = merged.answers(), plain.answers()
    print(expected)
    assert found.keys() == expected.keys()
    different = {
        name: (found[name], expected[name]) for name in found if found[name] != expected[name]
    }
    assert different == DIFFERENCES


def test_calls_on_memory_that_was_given_back_answer_as_on_any_other(callers, daemons):
    merged, twin, plain = callers
    daemon = daemons(settings_for(merged, twin))
    daemon.scan()
    assert store_mappings(merged.pid)
    daemon.give_back()
    assert merged.answers() == plain.answers()
