"""A program that has its memory shared: a table that every instance of it holds alike.

    python share.py [SOCKET] [MiB]

Start it twice: the second one says how much of its table it shares with the first. A line on stdin
lets it share again, the end of stdin lets it end.
"""

import hashlib
import sys

import numpy as np
from numpy.typing import NDArray

from ksmd.client import SharedMemoryArea


def table(mib: int) -> NDArray[np.uint64]:
    """Make the same words in every instance."""
    words = np.arange(mib << 17, dtype=np.uint64)
    return (words + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)


def main() -> int:
    """Share the table until stdin ends."""
    words = table(int(sys.argv[2]) if len(sys.argv) > 2 else 16)
    before = hashlib.sha256(words.data).digest()
    with SharedMemoryArea(sys.argv[1]) if len(sys.argv) > 1 else SharedMemoryArea() as area:
        pages = area.register(words)
        line = "\n"
        while line:
            done = area.share()
            intact = int(hashlib.sha256(words.data).digest() == before)
            address = words.ctypes.data
            print(f"address={address} pages={pages} scanned={done['scanned']}", end=" ")
            print(f"merged={done['merged']} intact={intact}", flush=True)
            line = sys.stdin.readline()
        area.remove()
    return 0 if hashlib.sha256(words.data).digest() == before else 1


if __name__ == "__main__":
    sys.exit(main())
