"""A throw-away process that does to itself what a target would do to merged memory, and looks.

``python -m ksmd.guard.rehearsal FD``: started by the self-test. It makes a store of its own, merges
it into itself in the order of a stop window, asks the self-test to have it guarded, and goes
through the steps below. On the channel: {"step"} before each, at the end {"done": seconds, "notes"}
or {"failed": sentence}. A step that never ends means that nobody answers a fault.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
import time
from collections.abc import Callable

from ksmd.kernel import channel, libc, memfd, userfaultfd
from ksmd.kernel.iouring import PinRing
from ksmd.model.errors import KsmdError
from ksmd.model.units import PAGE_SIZE

PAGES = 64
MADV_GUARD_INSTALL = 102  # Linux 6.13
MADV_GUARD_REMOVE = 103

_RW = libc.PROT_READ | libc.PROT_WRITE
_ZEROS = bytes(PAGE_SIZE)


class WrongError(Exception):
    """The kernel or the pager does not do what the guard relies on."""


def _expect(what: str, right: bool) -> None:
    if not right:
        raise WrongError(what)


def _content(page: int) -> bytes:
    return (page + 1).to_bytes(8, "little") * (PAGE_SIZE // 8)


class Rehearsal:
    """The process's merged memory and the steps, in order. Each raises WrongError or OSError."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._pins = PinRing()
        self._device = userfaultfd.open_device()
        self._base = 0
        self.notes: list[str] = []

    def steps(self) -> list[tuple[str, Callable[[], None]]]:
        """Name the steps."""
        return [
            ("merge a sealed, locked and pinned extent into itself, guarded", self._merge),
            ("read merged memory", lambda: self._same(range(PAGES))),
            ("write to a merged page", self._write),
            ("MADV_DONTNEED on merged memory", lambda: self._drop(range(4, 12))),
            ("fork, before the range is settled", lambda: self._fork(range(12, 16))),
            ("settle", lambda: self._ask("settle")),
            ("fork", lambda: self._fork(range(16, 20))),
            ("MADV_GUARD_INSTALL and MADV_GUARD_REMOVE", self._guard_pages),
            ("UFFDIO_MOVE of a page that is a registered buffer", self._quarantine),
        ]

    def run(self) -> None:
        """Go through all steps and tell how it went."""
        started = time.monotonic()
        for name, step in self.steps():
            channel.send(self._end, {"step": name})
            try:
                step()
            except (WrongError, OSError, KsmdError) as error:
                channel.send(self._end, {"failed": f"{name}: {error}"})
                return
        channel.send(self._end, {"done": time.monotonic() - started, "notes": self.notes})

    # tools

    def _ask(self, verb: str, *fds: int) -> None:
        ranges = [[self._base, self._base + PAGES * PAGE_SIZE]]
        channel.send(self._end, {"ask": verb, "ranges": ranges}, fds=fds)
        channel.receive(self._end)

    def _page(self, page: int) -> memoryview:
        return libc.view(self._base + page * PAGE_SIZE, PAGE_SIZE)

    def _same(self, pages: range) -> None:
        for page in pages:
            _expect(f"page {page} is not as in the store", self._page(page) == _content(page))

    def _zero(self, pages: range) -> None:
        for page in pages:
            stale = self._page(page) == _content(page)
            wrong = "shows store content" if stale else "is not zero"
            _expect(f"page {page} {wrong} after it was dropped", self._page(page) == _ZEROS)

    def _advise(self, pages: range, advice: int) -> None:
        start = self._base + pages.start * PAGE_SIZE
        libc.madvise(start, len(pages) * PAGE_SIZE, advice)

    # steps

    def _merge(self) -> None:
        length = PAGES * PAGE_SIZE
        self._store = memfd.create_extent("ksmd-selftest", PAGES)
        content = libc.view(self._store.address, length)
        for page in range(PAGES):
            content[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = _content(page)
        memfd.lock(self._store)
        self._pins.pin(self._store.address, length)
        self._base = libc.mmap(0, length, _RW, libc.MAP_PRIVATE | libc.MAP_ANONYMOUS)
        guard = userfaultfd.create(self._device)
        userfaultfd.api(guard, userfaultfd.GUARD_FEATURES)
        self._ask("guard", guard)
        flags = libc.MAP_PRIVATE | libc.MAP_FIXED
        libc.mmap(self._base, length, _RW, flags, self._store.fd_ro)
        libc.madvise(self._base, length, libc.MADV_POPULATE_READ)
        mode = userfaultfd.MODE_MINOR | userfaultfd.MODE_MISSING
        userfaultfd.register(guard, self._base, length, mode)
        try:
            userfaultfd.continue_(guard, self._base, PAGE_SIZE, userfaultfd.DONTWAKE)
        except OSError as error:
            if error.errno != errno.EEXIST:
                raise
        os.close(guard)

    def _write(self) -> None:
        self._page(1)[:] = b"\xa5" * PAGE_SIZE
        kept = libc.view(self._store.address + PAGE_SIZE, PAGE_SIZE)
        _expect("the write reached the store", kept == _content(1))
        _expect("the write is lost", self._page(1) == b"\xa5" * PAGE_SIZE)
        self._same(range(2, PAGES))

    def _drop(self, pages: range) -> None:
        self._advise(pages, libc.MADV_DONTNEED)
        self._zero(pages)
        self._same(range(pages.stop, PAGES))

    def _fork(self, pages: range) -> None:
        def child() -> None:
            self._same(range(pages.start, PAGES))
            self._drop(pages)

        self._in_child(child)
        self._same(pages)

    def _guard_pages(self) -> None:
        pages = range(24, 28)
        try:
            self._advise(pages, MADV_GUARD_INSTALL)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self.notes.append("no MADV_GUARD_INSTALL (before Linux 6.13)")
            return
        self._advise(pages, MADV_GUARD_REMOVE)
        # no event tells of them: a child must not get them back from the store
        self._in_child(lambda: self._zero(pages))
        self._zero(pages)
        self._same(range(28, PAGES))

    def _quarantine(self) -> None:
        track = userfaultfd.create(self._device)
        userfaultfd.api(track, userfaultfd.TRACK_FEATURES)
        flags = libc.MAP_PRIVATE | libc.MAP_ANONYMOUS
        start = libc.mmap(0, 2 * PAGE_SIZE, _RW, flags)
        aside = libc.mmap(0, 2 * PAGE_SIZE, _RW, flags)
        libc.view(start, 2 * PAGE_SIZE)[:] = b"\x5a" * 2 * PAGE_SIZE
        self._pins.pin(start, PAGE_SIZE)
        userfaultfd.register(track, aside, 2 * PAGE_SIZE, userfaultfd.MODE_MISSING)
        try:
            userfaultfd.move(track, aside, start, PAGE_SIZE)
        except OSError as error:
            _expect(f"EBUSY expected, got {error}", error.errno == errno.EBUSY)
        else:
            raise WrongError("the page was moved, so pinned pages cannot be told from others")
        moved = userfaultfd.move(track, aside + PAGE_SIZE, start + PAGE_SIZE, PAGE_SIZE)
        _expect("a page that is not pinned was not moved", moved == PAGE_SIZE)
        os.close(track)

    def _in_child(self, look: Callable[[], None]) -> None:
        """Fork; what *look* finds wrong in the child is raised here."""
        reader, writer = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                look()
                os.write(writer, b"ok")
            except (WrongError, OSError) as error:
                os.write(writer, str(error).encode())
            os._exit(0)
        os.close(writer)
        said = os.read(reader, 4096).decode()
        os.close(reader)
        os.waitpid(pid, 0)
        _expect(f"in the child: {said or 'it died'}", said == "ok")


def main(arguments: list[str]) -> int:
    """Rehearse on the channel whose descriptor is the only argument."""
    signal.alarm(90)  # a last resort: the self-test kills a process that hangs
    end = socket.socket(fileno=int(arguments[0]))
    try:
        Rehearsal(end).run()
    except (OSError, KsmdError) as error:
        channel.send(end, {"failed": f"prepare: {error}"})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
