"""A target that checks itself: an arena of pages whose content follows from their numbers.

Commands on stdin, one answer each: ``check`` (right, or the first wrong page), ``write N`` (changes
page N for good), ``drop N`` (MADV_DONTNEED; what the page reads as then: it must be 0), ``fork``
(a child that lives on), ``child COMMAND`` (what the child, which has an arena like ours then, says
to that; it knows the first three).
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


class Arena:
    def __init__(self, pages: int) -> None:
        self.map = mmap.mmap(-1, pages * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.map.madvise(mmap.MADV_NOHUGEPAGE)
        self.expected = [content(page) for page in range(pages)]
        for page in range(pages):
            self.map[page * PAGE : (page + 1) * PAGE] = self.expected[page]

    def obey(self, verb: str, *rest: str) -> str:
        if verb == "check":
            for page, expected in enumerate(self.expected):
                if self.map[page * PAGE : (page + 1) * PAGE] != expected:
                    return f"page {page}"
            return "right"
        page = int(rest[0])
        if verb == "write":
            self.map[page * PAGE : page * PAGE + 8] = b"changed!"
            self.expected[page] = b"changed!" + self.expected[page][8:]
            return "done"
        assert verb == "drop"
        self.map.madvise(mmap.MADV_DONTNEED, page * PAGE, PAGE)
        self.expected[page] = bytes(PAGE)
        return str(sum(self.map[page * PAGE : (page + 1) * PAGE]))


class Child:
    """A process forked from this one, which ends with it."""

    def __init__(self, arena: Arena) -> None:
        orders, self.orders = os.pipe()
        self.answers, answers = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.orders)
            while order := os.read(orders, 100):
                os.write(answers, arena.obey(*order.decode().split()).encode())
            os._exit(0)
        os.close(orders)
        os.close(answers)

    def ask(self, order: str) -> str:
        os.write(self.orders, order.encode())
        return os.read(self.answers, 100).decode()


def main() -> None:
    arena = Arena(int(sys.argv[1]))
    print(os.getpid(), ctypes.addressof(ctypes.c_char.from_buffer(arena.map)), flush=True)
    if len(sys.argv) > 2:
        time.sleep(3600)
    child = None
    for line in sys.stdin:
        verb, *rest = line.split()
        if verb == "fork":
            child = Child(arena)
            print(child.pid, flush=True)
        elif verb == "child":
            assert child is not None
            print(child.ask(" ".join(rest)), flush=True)
        else:
            print(arena.obey(verb, *rest), flush=True)


main()
