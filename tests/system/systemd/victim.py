"""A target that checks itself: an arena of pages whose content follows from their numbers.

Commands on stdin, one answer each: ``check`` (right, or the first wrong page), ``write N`` (changes
page N for good), ``drop N`` (MADV_DONTNEED; what the page reads as then: it must be 0).
Without stdin it only lives. Its ready line is "pid address".
"""

import ctypes
import mmap
import os
import sys
import time

PAGE = 4096


def content(page: int) -> bytes:
    return (b"%08d" % page) * (PAGE // 8)


def main() -> None:
    pages = int(sys.argv[1])
    arena = mmap.mmap(-1, pages * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    arena.madvise(mmap.MADV_NOHUGEPAGE)
    expected = [content(page) for page in range(pages)]
    for page in range(pages):
        arena[page * PAGE : (page + 1) * PAGE] = expected[page]
    print(os.getpid(), ctypes.addressof(ctypes.c_char.from_buffer(arena)), flush=True)
    if len(sys.argv) > 2:
        time.sleep(3600)
    for line in sys.stdin:
        verb, *rest = line.split()
        if verb == "check":
            wrong = [p for p in range(pages) if arena[p * PAGE : (p + 1) * PAGE] != expected[p]]
            print(f"page {wrong[0]}" if wrong else "right", flush=True)
        elif verb == "write":
            page = int(rest[0])
            arena[page * PAGE : page * PAGE + 8] = b"changed!"
            expected[page] = b"changed!" + expected[page][8:]
            print("done", flush=True)
        elif verb == "drop":
            page = int(rest[0])
            arena.madvise(mmap.MADV_DONTNEED, page * PAGE, PAGE)
            expected[page] = bytes(PAGE)
            print(sum(arena[page * PAGE : (page + 1) * PAGE]), flush=True)


main()
