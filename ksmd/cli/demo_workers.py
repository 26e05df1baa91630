"""Workers for ``ksmd demo``: ordinary processes that hold the same data at different addresses.

A worker knows nothing of ksmd. It maps anonymous memory, fills it, then obeys lines on its stdin:
``sum`` answers with a digest of each part, ``write OFFSET BYTE`` changes one byte of the shared
part, ``quit`` ends it, and so does the end of its stdin, so that none outlives the demo.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from ksmd.model.errors import KsmdError
from ksmd.model.units import PAGE_SHIFT, PAGE_SIZE

_PIECE = 1 << 20
_SHARED_SEED = 2008


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of the parts of a worker's memory, in bytes."""

    shared: int
    private: int
    zero: int

    @classmethod
    def of(cls, mib: int) -> Sizes:
        """Give each worker *mib* MiB of the same data, an eighth of that of its own, and zeros."""
        return cls(mib << 20, (mib << 20) // 8, (mib << 20) // 16)


@dataclass(frozen=True, slots=True)
class Part:
    """A range of a worker's memory, in pages."""

    first_page: int
    npages: int


class Worker:
    """One running worker. ``parts`` are its shared, private and zero ranges."""

    def __init__(self, number: int, sizes: Sizes) -> None:
        self.number = number
        self.sizes = sizes
        command = [sys.executable, "-P", "-m", __name__, str(number)]
        command += [str(sizes.shared), str(sizes.private), str(sizes.zero)]
        # A session of its own: ^C at the terminal is for the demo, which then ends its workers.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            start_new_session=True,
        )
        self.pid = self._process.pid
        self.parts: tuple[Part, ...] = ()

    def wait_ready(self) -> None:
        """Wait until the memory is filled; learn where it lies."""
        start = int(self._line(), 16)
        parts = []
        for length in (self.sizes.shared, self.sizes.private, self.sizes.zero):
            parts.append(Part(start >> PAGE_SHIFT, length >> PAGE_SHIFT))
            start += length
        self.parts = tuple(parts)

    @property
    def shared(self) -> Part:
        """The range whose content all workers have."""
        return self.parts[0]

    def sums(self) -> list[str]:
        """Give a digest of each part, made by the worker from its own memory."""
        return self.ask("sum").split()

    def ask(self, command: str) -> str:
        """Send one command and give the answer."""
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(command + "\n")
        except BrokenPipeError as error:
            raise self._died() from error
        return self._line()

    def quit(self) -> int:
        """End the worker; its exit code."""
        self.ask("quit")
        return self._process.wait()

    def kill(self) -> None:
        """End the worker in any case."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._died()
        return line.strip()

    def _died(self) -> KsmdError:
        code = self._process.wait()
        return KsmdError(f"worker {self.number} (pid {self.pid}) ended by itself, code {code}")


def expected_sums(number: int, sizes: Sizes, changed: dict[int, int] | None = None) -> list[str]:
    """Compute what ``Worker.sums`` must give; *changed* maps offsets of the shared part to bytes.

    It is made from the seeds, not from any memory: a fault in merging cannot be in both.
    """
    digests: list[str] = []
    for part in _contents(number, sizes):
        digest = hashlib.sha256()
        offset = 0
        for piece in part:
            data = bytearray(piece)
            for place, byte in (changed or {}).items():
                if not digests and offset <= place < offset + len(data):
                    data[place - offset] = byte
            digest.update(data)
            offset += len(data)
        digests.append(digest.hexdigest())
    return digests


def shared_byte(sizes: Sizes, offset: int) -> int:
    """Give the byte that every worker has at *offset* of its shared part."""
    pieces = _random(_SHARED_SEED, sizes.shared)
    return next(piece for index, piece in enumerate(pieces) if index == offset // _PIECE)[
        offset % _PIECE
    ]


def _contents(number: int, sizes: Sizes) -> list[Iterator[bytes]]:
    return [
        _random(_SHARED_SEED, sizes.shared),
        _random(_SHARED_SEED + 1 + number, sizes.private),
        (bytes(length) for length in _pieces(sizes.zero)),
    ]


def _pieces(length: int) -> Iterator[int]:
    while length:
        piece = min(length, _PIECE)
        yield piece
        length -= piece


def _random(seed: int, length: int) -> Iterator[bytes]:
    source = random.Random(seed)  # repeatable: it must be the same in every worker
    return (source.randbytes(piece) for piece in _pieces(length))


def main(argv: list[str]) -> int:
    """Be a worker."""
    number, *lengths = (int(word) for word in argv)
    sizes = Sizes(*lengths)
    # a different offset in a different mapping for each worker: nothing lines up by chance
    pad = (1 + 7 * number) * PAGE_SIZE
    total = sizes.shared + sizes.private + sizes.zero
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    other = mmap.mmap(-1, (1 + number) << 21, flags=flags)
    memory = mmap.mmap(-1, pad + total, flags=flags)
    memory.seek(pad)
    for part in _contents(number, sizes):
        for piece in part:
            memory.write(piece)
    first = ctypes.c_char.from_buffer(memory)
    print(f"{ctypes.addressof(first) + pad:x}", flush=True)
    for line in sys.stdin:
        command, *words = line.split()
        if command == "quit":
            print("bye", flush=True)
            break
        print(_obey(command, words, memory, pad, sizes), flush=True)
    other.close()
    return 0


def _obey(command: str, words: list[str], memory: mmap.mmap, pad: int, sizes: Sizes) -> str:
    if command == "write":
        offset, byte = (int(word) for word in words)
        memory[pad + offset] = byte
        return "written"
    sums, at = [], pad
    with memoryview(memory) as view:
        for length in (sizes.shared, sizes.private, sizes.zero):
            sums.append(hashlib.sha256(view[at : at + length]).hexdigest())
            at += length
    return " ".join(sums)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
