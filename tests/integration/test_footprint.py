"""What is given back after start-up comes back when it is needed; nothing else is given back."""

from __future__ import annotations

import hmac
import os
import re
import subprocess
import sys

import pytest
from kernel_victims import Victim

from ksmd.bench.census import descendants, resident_without_store
from ksmd.kernel import footprint, procfs

pytestmark = pytest.mark.root

SETTLES = """
import hmac, os
import numpy as np
from ksmd.kernel import footprint, procfs

def of_files():
    return procfs.status_fields(os.getpid())["RssFile"].split()[0]

before = of_files()
footprint.settle_down()
print(before, of_files())
print(np.sort(np.arange(9)[::-1])[0], hmac.digest(b"k", b"m", "sha1").hex())
"""
MIB = 1 << 20
FORKED = f"""
fill(anon({64 * MIB}), {64 * MIB} // PAGE)
reply(family(1))
"""


def test_what_start_up_needed_is_given_back_and_comes_back() -> None:
    command = [sys.executable, "-P", "-c", SETTLES]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    before, after, least, digest = done.stdout.split()
    print(f"\n  of files: {before} kB before, {after} kB afterwards")
    assert int(after) < int(before) * 0.7
    assert (least, digest) == ("0", hmac.digest(b"k", b"m", "sha1").hex())


def test_what_the_loader_wrote_to_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a part of a library is read-only and of a file, too, but its pages are our own."""
    given: list[tuple[int, int]] = []
    with monkeypatch.context() as patch:
        patch.setattr(
            footprint.libc, "madvise", lambda at, length, _: given.append((at, at + length))
        )
        footprint.settle_down()
    text = procfs.read_process(os.getpid(), "smaps").decode()
    found = re.findall(
        r"^(\w+)-(\w+) (\S+) .*\n(?:\w+: .*\n)*?Anonymous: +(\d+) kB$", text, re.MULTILINE
    )
    own = [(int(s, 16), int(e, 16), perms) for s, e, perms, kib in found if int(kib)]
    assert any(perms == "r--p" for _, _, perms in own), "libc alone has such a part"
    assert given
    for start, end, perms in own:
        assert not [one for one in given if one[0] < end and start < one[1]], (start, perms)


def test_memory_that_processes_share_is_counted_once() -> None:
    with Victim(FORKED) as victim:
        family = descendants(victim.pid)
        assert family == [victim.pid, *victim.ready]
        each = [resident_without_store([pid]) for pid in family]
        assert min(each) > 64 * MIB
        assert max(each) <= resident_without_store(family) < sum(each) - 64 * MIB
