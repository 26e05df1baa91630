"""Who is tied to us ends when we are killed, and not before."""

from __future__ import annotations

import os
import select
import subprocess
import sys

STARTER = """
import subprocess
from ksmd.kernel.tied import tied
with subprocess.Popen(tied(["sleep", "600"])) as tied_to_us:
    print(tied_to_us.pid, flush=True)
"""


def test_it_ends_when_its_starter_is_killed_and_not_before() -> None:
    with subprocess.Popen(
        [sys.executable, "-P", "-c", STARTER], stdout=subprocess.PIPE, text=True
    ) as starter:
        assert starter.stdout is not None
        tied_to_it = os.pidfd_open(int(starter.stdout.readline()))
        try:
            assert not select.select([tied_to_it], [], [], 0.5)[0]
            starter.kill()
            assert select.select([tied_to_it], [], [], 20)[0], "it goes on"
        finally:
            os.close(tied_to_it)
