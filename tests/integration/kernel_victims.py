"""Small programs to look into: each runs one of the scripts below until it is told to end.

A victim prints one JSON line when it is ready, then obeys one Python expression per line on its
standard input and answers each with one JSON line.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def open_fds() -> list[str]:
    """Our own descriptors, and what each is."""
    links = []
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the one that lists
            links.append(f"{fd.name} {fd.readlink()}")
    return sorted(links)


PRELUDE = """
import ctypes, json, mmap, os, sys, threading, time
PAGE, HUGE = 4096, 2 << 20
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

def map(length, prot=3, flags=0x22, fd=-1, offset=0, at=None):
    got = libc.mmap(at, length, prot, flags | (0x10 if at else 0), fd, offset)
    assert got != ctypes.c_void_p(-1).value, os.strerror(ctypes.get_errno())
    return got

def aligned(length):
    'Reserve address space on a 2 MiB boundary.'
    return (map(length + HUGE, prot=0, flags=0x4022) + HUGE - 1) & ~(HUGE - 1)

def anon(length, at=None):
    'Anonymous memory on a 2 MiB boundary, without huge pages, all pages absent.'
    at = map(length, at=at or aligned(length))
    madvise(at, length, 15)
    return at

def madvise(address, length, advice):
    'errno of madvise, 0 when it worked.'
    return ctypes.get_errno() if libc.madvise(address, length, advice) else 0

def fill(address, npages, first=1, step=1):
    for i in range(0, npages, step):
        ctypes.memset(address + i * PAGE, (first + i) % 255 + 1, PAGE)

def peek(address):
    return ctypes.c_ubyte.from_address(address).value

def poke(address, value):
    ctypes.c_ubyte.from_address(address).value = value

def touch(address, npages, step=1):
    return sum(peek(address + i * PAGE) for i in range(0, npages, step))

def family(count):
    'Fork children that only wait; they end with us.'
    pids = []
    for _ in range(count):
        told, tell = os.pipe()
        pid = os.fork()
        if pid == 0:
            libc.prctl(1, 9, 0, 0, 0)
            os.write(tell, b'x')
            while True:
                time.sleep(3600)
        os.read(told, 1)  # or it might not end with us
        os.close(told)
        os.close(tell)
        pids.append(pid)
    return pids

def reply(value):
    print(json.dumps(value), flush=True)
"""

LOOP = """
for line in sys.stdin:
    reply(eval(line))
"""


class Victim:
    """``Victim("reply(anon(8 * PAGE))")``; ``ready`` is what the script replied first."""

    def __init__(self, script: str = "reply(None)", *, fds: tuple[int, ...] = ()) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-c", PRELUDE + script + LOOP],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=fds,
            text=True,
        )
        self.ready: Any = self.answer()

    @property
    def pid(self) -> int:
        return self.process.pid

    def answer(self) -> Any:
        """Give the next thing that it replies."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the victim died"
        return json.loads(line)

    def ask(self, expression: str) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(expression + "\n")
        self.process.stdin.flush()
        return self.answer()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Victim:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
