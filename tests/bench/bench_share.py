"""How long a short-lived worker waits for "share this now", in ms. Nothing is asserted.

python tests/bench/bench_share.py [MIB ...]

One process that holds the data stays; another comes, registers the same data and shares it: the
time from its first call until the answer says that every page is merged. As root; a daemon of its
own serves no one else.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "system")]

from harness import Daemon  # noqa: E402
from programs import Puppet, everybody, open_directory  # noqa: E402

ROUNDS = 5


def bench(daemon: Daemon, mib: int) -> None:
    pages = mib << 8
    stays = Puppet(daemon.socket, pages=pages)
    stays.register()
    stays.share()
    times = []
    for _ in range(ROUNDS):
        comes = Puppet(daemon.socket, pages=pages)
        begin = time.perf_counter()
        comes.register()
        merged = comes.share()["merged"]
        times.append((time.perf_counter() - begin) * 1e3)
        if merged != pages:
            print(f"  only {merged:,} of {pages:,} pages were merged")
        comes.close()
        time.sleep(times[-1] / 200)  # a user's allowance fills in four times what was used
    stays.close()
    first, *others = times
    print(f"{mib:5} MiB: first {first:9.1f} ms, then {min(others):9.1f} to {max(others):9.1f} ms")


if __name__ == "__main__":
    daemon = Daemon(open_directory(), everybody())
    try:
        for size in [int(word) for word in sys.argv[1:]] or [1, 64, 1024]:
            bench(daemon, size)
    finally:
        daemon.close()
