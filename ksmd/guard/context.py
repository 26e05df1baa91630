"""What the pager knows of one userfaultfd context, and how it answers a fault there.

A merged page is in the page table from the moment it is guarded, and nothing but the program itself
can take it out (the store is locked and pinned). So a fault means "dropped" or "never had", and the
answer is zeros: state ZERO.

fork copies the page table of a VMA as a whole or not at all (vma_needs_copy, mm/memory.c): it does
when the VMA has an anon_vma, which the UFFDIO_CONTINUE at the end of a merge makes. Ranges for
which that is confirmed are *settled*, and need no record at all. Ranges that are only announced are
*owed*: a child gets them by UFFDIO_CONTINUE before the rule above holds for it, and until then it
is in state FILL. Owed ranges are forgotten page by page as the program drops them, so that a drop
is not undone in a child.

Filling believes the kernel before the ledger. EEXIST on an owed page says that fork copied the
page's VMA, so the whole piece is done, and what is absent in it was dropped in some way that
raises no event. To fill such a piece page by page would bring dropped pages back to life and, since
UFFDIO_CONTINUE overwrites the markers of MADV_GUARD_INSTALL (6.18), tear down a program's guard
pages. A piece is at most one page table (2 MiB).

No I/O of its own: requests go to an object with the functions of ``kernel.userfaultfd``.
"""

from __future__ import annotations

import errno
from enum import Enum
from typing import Any, Protocol

from ksmd.guard.intervals import Intervals
from ksmd.model.units import HUGE_PAGE_SIZE, PAGE_SIZE

#: Dropped ranges that are remembered for answering their next pages in bulk.
DROPS = 16
#: Pages that one fault may map; the faulting thread waits for all of them.
BULK_PAGES = 256
_UNLIMITED = 1 << 30


class Requests(Protocol):
    """The three answers, as in ``kernel.userfaultfd``; they raise OSError."""

    def zeropage(self, fd: int, start: int, length: int, mode: int = 0) -> int:
        """UFFDIO_ZEROPAGE: bytes done."""
        ...

    def continue_(self, fd: int, start: int, length: int, mode: int = 0) -> int:
        """UFFDIO_CONTINUE: bytes done."""
        ...

    def wake(self, fd: int, start: int, length: int) -> None:
        """UFFDIO_WAKE."""
        ...


class Answer(Enum):
    """How a request ended."""

    DONE = "done"
    MORE = "more"  # the limit ended it, nothing hinders the rest
    AGAIN = "again"  # an event waits to be read, or memory is short: try later
    GONE = "gone"  # the address space is no more


class State(Enum):
    """What a fault means in a context."""

    FILL = "fill"
    ZERO = "zero"


class Counters:
    """Totals over all contexts: events and faults, and pages per answer."""

    __slots__ = ("faults", "filled", "forks", "reaped", "remaps", "removes", "woken", "zeroed")

    def __init__(self) -> None:
        self.faults = 0
        self.zeroed = 0
        self.woken = 0
        self.filled = 0
        self.forks = 0
        self.removes = 0
        self.remaps = 0
        self.reaped = 0


class Context:
    """One context: that of a target itself, or of a process forked from it.

    ``target``: the target's id, the same in all descendants. ``key``: the context's own number; a
    target's own context has key 0. ``waiting``: pages whose fault could not be answered yet.
    ``track`` (-1: none) and ``about`` are held for a later daemon, and mean nothing here.
    """

    __slots__ = ("_count", "about", "drops", "fd", "key", "owed", "target", "track", "waiting")

    def __init__(self, fd: int, target: int, key: int, count: Counters) -> None:
        self.fd = fd
        self.target = target
        self.key = key
        self.owed = Intervals()
        self.drops: list[tuple[int, int]] = []
        self.waiting: set[int] = set()
        self.track = -1
        self.about: dict[str, Any] = {}
        self._count = count

    @property
    def state(self) -> State:
        """FILL while a child is owed pages."""
        return State.FILL if self.key and self.owed else State.ZERO

    def extend(self, start: int, end: int) -> None:
        """[start, end) is about to be merged: a child forked from now on is owed it."""
        self.owed.add(start, end)
        self.drops = [(s, e) for s, e in self.drops if e <= start or s >= end]

    def settle(self, start: int, end: int) -> None:
        """[start, end) is merged and fork copies it, or is not merged any more."""
        self.owed.remove(start, end)

    def fork(self, fd: int, key: int) -> Context:
        """Make the context of a child, whose descriptor is *fd*."""
        child = Context(fd, self.target, key, self._count)
        child.owed = self.owed.copy()
        child.drops = self.drops.copy()
        self._count.forks += 1
        return child

    def on_remove(self, start: int, end: int) -> None:
        """REMOVE was read: the program is dropping [start, end)."""
        self._count.removes += 1
        self.owed.remove(start, end)
        self.drops.append((start, end))
        del self.drops[:-DROPS]

    def on_remap(self, start: int, end: int, to: int) -> None:
        """REMAP was read: the program moved [start, end) to *to*."""
        self._count.remaps += 1
        self.owed.move(start, end, to)
        self.drops.clear()

    def fault(self, kernel: Requests, address: int) -> Answer:
        """Answer one fault. After AGAIN the page is in ``waiting``."""
        page = address & -PAGE_SIZE
        answer = Answer.DONE
        if self.state is State.FILL and page in self.owed:
            low = page & -HUGE_PAGE_SIZE
            answer = self._fill(kernel, low, page + PAGE_SIZE, _UNLIMITED)
        if answer is Answer.DONE:
            answer = self._zero(kernel, page)
        if answer is Answer.AGAIN:
            self.waiting.add(page)
        else:
            self.waiting.discard(page)
        return answer

    def fill(self, kernel: Requests, limit: int) -> Answer:
        """Fill on with at most *limit* requests. DONE says that the state is ZERO now."""
        return self._fill(kernel, 0, 1 << 64, limit)

    def _fill(self, kernel: Requests, low: int, high: int, limit: int) -> Answer:
        """Fill the pieces that start in [low, high)."""
        longest = HUGE_PAGE_SIZE
        while limit > 0:
            found = self.owed.first(low, high)
            if found is None:
                return Answer.DONE
            start = found[0]
            border = (start & -HUGE_PAGE_SIZE) + HUGE_PAGE_SIZE
            # up to the piece's border, not to *high*: the length is what EEXIST vouches for
            owed = self.owed.first(start, border)
            end = min(owed[1] if owed else border, start + longest)
            try:
                done = kernel.continue_(self.fd, start, end - start)
            except OSError as error:
                if error.errno in (errno.EEXIST, errno.EINVAL):
                    # copied by fork; or one VMA, but not of shared memory: never merged
                    self.owed.remove(start, end)
                elif error.errno == errno.ENOENT and end - start > PAGE_SIZE:
                    # not one VMA: find its border, outside the limit, which might end it each time
                    longest = (end - start) // 2 & -PAGE_SIZE
                    continue
                elif error.errno in (errno.ENOENT, errno.EFAULT):
                    # no merged memory there, or a hole of the store
                    self.owed.remove(start, start + PAGE_SIZE)
                else:
                    return self._refused(error)
            else:
                self.owed.remove(start, start + done)
                self._count.filled += done // PAGE_SIZE
            longest = min(HUGE_PAGE_SIZE, longest * 2)
            limit -= 1
        return Answer.MORE

    def _zero(self, kernel: Requests, page: int) -> Answer:
        end = self._drop_end(page)
        while True:
            try:
                done = kernel.zeropage(self.fd, page, end - page)
            except OSError as error:
                if error.errno == errno.ENOENT and end - page > PAGE_SIZE:
                    # the drop reached past this VMA
                    end = page + PAGE_SIZE
                    continue
                if error.errno in (errno.EEXIST, errno.ENOENT):
                    # someone was first, or it is unmapped: let the program find out by itself
                    kernel.wake(self.fd, page, PAGE_SIZE)
                    self._count.woken += 1
                    return Answer.DONE
                return self._refused(error)
            self._count.zeroed += done // PAGE_SIZE
            return Answer.DONE

    def _drop_end(self, page: int) -> int:
        """Give the end of what is answered with *page*: the rest of its drop, within bounds."""
        if self.state is State.ZERO:
            for start, end in reversed(self.drops):
                if start <= page < end:
                    return min(end, page + BULK_PAGES * PAGE_SIZE)
        return page + PAGE_SIZE

    @staticmethod
    def _refused(error: OSError) -> Answer:
        # whatever else: the thread goes on waiting and is tried again, it is never let through
        return Answer.GONE if error.errno == errno.ESRCH else Answer.AGAIN
