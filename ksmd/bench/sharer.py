"""A short-lived worker: holds the same words as every other one, and shares them when told to.

``python -m ksmd.bench.sharer SOCKET MIB``. Root gives up its privileges first, since a program that
registers memory of its own has none. It speaks the protocol of worker.c; the one command is share.
"""

from __future__ import annotations

import os
import pwd
import sys
import time

import numpy as np
from numpy.random import default_rng

from ksmd.client import SharedMemoryArea
from ksmd.model.errors import KsmdError
from ksmd.model.units import PAGE_SHIFT, PAGE_SIZE


def give_up_privileges() -> None:
    """Become nobody, where we are root."""
    if os.geteuid() == 0:
        nobody = pwd.getpwnam("nobody")
        os.setgroups([])
        os.setresgid(*[nobody.pw_gid] * 3)
        os.setresuid(*[nobody.pw_uid] * 3)


def main(argv: list[str]) -> int:
    """Serve commands until the end of input."""
    socket, mib = argv[1], int(argv[2])
    give_up_privileges()
    words = default_rng(0).integers(0, 1 << 63, mib << 17, dtype=np.uint64)
    before = int(np.bitwise_xor.reduce(words))
    start = -(-words.ctypes.data // PAGE_SIZE) * PAGE_SIZE
    npages = (words.ctypes.data + words.nbytes - start) >> PAGE_SHIFT
    print(f"ready ranges={start:#x}:{npages}", flush=True)
    areas = []
    for line in sys.stdin:
        if line.strip() != "share":
            print("no such command", flush=True)
            continue
        begun = time.perf_counter_ns()
        try:
            areas.append(area := SharedMemoryArea(socket))
            area.register(words)
            merged = area.share()["merged"]
        except KsmdError as error:
            print(f"failed {error}", flush=True)
            continue
        ns = time.perf_counter_ns() - begun
        intact = int(int(np.bitwise_xor.reduce(words)) == before)
        print(f"ok ns={ns} merged={merged} intact={intact}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
