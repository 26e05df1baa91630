"""The store of one trust domain: the shared pages, in extents that live and end as a whole.

An extent is made for a plan, filled once by copying from the targets, locked, pinned, and never
written again. The order matters: large folios first (kernel/memfd.py), then the copy, then mlock
(reclaim would drop page table entries, and a dropped entry reads as zeros under the guard), then
the long-term pin (any process that maps the extent could have it collapsed otherwise, with the same
effect). Its memory comes back when nobody uses any page of it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ksmd.kernel import libc, memcg, memfd
from ksmd.kernel.iouring import PinRing
from ksmd.kernel.memfd import ExtentMap
from ksmd.kernel.thp import LargeFolios
from ksmd.model.errors import KsmdError
from ksmd.model.plan import ExtentPlan
from ksmd.model.units import HUGE_PAGE_PAGES, PAGE_SHIFT, PAGE_SIZE

#: What must stay free besides the extent itself, in bytes.
MEMORY_RESERVE = 64 << 20

#: copy(slot, pieces, view): fill *view* with pieces (first page, pages) of a target's memory, one
#: after the other; what could not be read stays as it is.
Copy = Callable[[int, list[tuple[int, int]], memoryview], None]
#: sums(view): the checksum (uint32, under the domain's seed) of every page of *view*.
Sums = Callable[[memoryview], NDArray[np.uint32]]


@dataclass(slots=True)
class Extent:
    """One extent.

    ``checksums``: uint32 per page; ``good``: whether the copy held what the plan expected.
    """

    number: int
    map: ExtentMap
    checksums: NDArray[np.uint32]
    good: NDArray[np.bool_]
    token: int

    @property
    def npages(self) -> int:
        """Pages that hold content."""
        return self.map.npages

    def offset(self, index: int) -> int:
        """File offset of page *index*, in bytes."""
        return index << PAGE_SHIFT

    def index(self, offset: int) -> int:
        """Page index at a file offset."""
        return offset >> PAGE_SHIFT

    def indexes(self, offsets: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Do as :meth:`index` for many offsets."""
        return (offsets >> np.uint64(PAGE_SHIFT)).astype(np.int64)

    def view(self, index: int, npages: int) -> memoryview:
        """Some pages in our own mapping, which is read-only once the extent is made."""
        return libc.view(self.map.address + self.offset(index), npages << PAGE_SHIFT)


class Making:
    """An extent that is made bit by bit, while somebody else is at work."""

    def __init__(self, steps: Generator[None, None, Extent]) -> None:
        self._steps = steps
        self._made: Extent | None = None
        self._failed: KsmdError | None = None

    @property
    def under_way(self) -> bool:
        """Whether there is something left to do."""
        return self._made is None and self._failed is None

    def step(self) -> None:
        """Go on a little. What goes wrong is raised by :meth:`finish`."""
        if self.under_way:
            try:
                next(self._steps)
            except StopIteration as end:
                self._made = end.value
            except KsmdError as error:
                self._failed = error

    def finish(self) -> Extent:
        """Make what is left of it. KsmdError leaves nothing behind."""
        while self._made is None:
            if self._failed is not None:
                raise self._failed
            self.step()
        return self._made

    def give_up(self) -> None:
        """Leave nothing behind of what is not finished."""
        self._steps.close()


class Keeper(Protocol):
    """Who else holds extents in place: our death must not move a page that a target maps."""

    def keep(self, extent: Extent) -> None:
        """Hold an extent, before any target maps it. KsmdError when that fails."""

    def release(self, extent: Extent) -> None:
        """Let an extent go: no target maps it any more."""


@dataclass(slots=True)
class Store:
    """All extents of a domain."""

    domain: str
    sums: Sums
    ring: PinRing
    keeper: Keeper
    folios: LargeFolios | None = None
    extents: dict[int, Extent] = field(default_factory=dict)
    _pages: tuple[Any, NDArray[np.uint32], NDArray[np.uint64]] | None = field(
        default=None, init=False
    )

    @property
    def npages(self) -> int:
        """Pages of all extents."""
        return sum(extent.npages for extent in self.extents.values())

    @property
    def nbytes(self) -> int:
        """Bytes of what is known of the pages, besides the pages themselves."""
        known = sum(e.checksums.nbytes + e.good.nbytes for e in self.extents.values())
        return known + sum(column.nbytes for column in (self._pages or ())[1:])

    def by_inode(self) -> dict[int, Extent]:
        """Extents by the inode that maps shows."""
        return {extent.map.inode: extent for extent in self.extents.values()}

    def making(self, plan: ExtentPlan, copy: Copy) -> Generator[None, None, Extent]:
        """Make, fill, lock and pin the extent of *plan*, in steps of some 2 MiB.

        A KsmdError, or closing it before its end, leaves nothing behind.
        """
        available = memcg.available()
        if plan.npages * PAGE_SIZE + MEMORY_RESERVE > available:
            raise KsmdError(
                f"the store cannot grow by {plan.npages} pages: {available >> 20} MiB are available"
            )
        name = f"ksmd-{self.domain}"[:200]
        scattered = plan.scattered
        made = yield from memfd.creating(name, plan.npages, self.folios, scattered=scattered)
        try:
            good = yield from self._filling(made, plan, copy)
            memfd.lock(made)
            token = self.ring.pin(made.address, made.length)
            libc.mprotect(made.address, made.length, libc.PROT_READ)  # a stray store faults here
        except BaseException:
            memfd.release(made)
            raise
        extent = Extent(plan.extent, made, plan.checksums.copy(), good, token)
        try:
            self.keeper.keep(extent)
        except BaseException:
            self._free(extent)
            raise
        self.extents[plan.extent] = extent
        return extent

    def adopt(self, number: int, made: ExtentMap, token: int) -> Extent:
        """Take in an extent of an earlier daemon; *token* is its pin.

        Nothing of it is shared further until its ``checksums`` and ``good`` have been set.
        """
        none = np.zeros(made.npages, np.uint32), np.zeros(made.npages, np.bool_)
        extent = self.extents[number] = Extent(number, made, *none, token)
        return extent

    def _filling(
        self, made: ExtentMap, plan: ExtentPlan, copy: Copy
    ) -> Generator[None, None, NDArray[np.bool_]]:
        """Copy and checksum what *plan* names: which pages hold what it expected."""
        good = np.zeros(made.npages, np.bool_)
        at = 0
        for slot, pieces in _parts(plan.sources):
            end = at + sum(npages for _, npages in pieces)
            view = self._view(made, at, end)
            copy(slot, pieces, view)
            good[at:end] = self.sums(view) == plan.checksums[at:end]
            at = end
            yield
        return good

    @staticmethod
    def _view(made: ExtentMap, start: int, end: int) -> memoryview:
        return libc.view(made.address + (start << PAGE_SHIFT), (end - start) << PAGE_SHIFT)

    def release(self, number: int) -> None:
        """Give an extent back: no target maps it any more."""
        extent = self.extents.pop(number)
        self.keeper.release(extent)
        self._free(extent)

    def _free(self, extent: Extent) -> None:
        self.ring.unpin(extent.token)
        memfd.release(extent.map)

    def pages(self) -> tuple[NDArray[np.uint32], NDArray[np.uint64]]:
        """Give checksums, ascending, and store pages of everything that may be shared further.

        Made anew where extents have come, gone, or been judged since.
        """
        known = self.known()
        if self._pages is None or self._pages[0] != known:
            self._pages = known, *self._sorted_pages()
        return self._pages[1:]

    def known(self) -> tuple[tuple[int, int], ...]:
        """Give the extents and how many pages of each may be shared further: less than all."""
        return tuple((n, int(np.count_nonzero(e.good))) for n, e in self.extents.items())

    def _sorted_pages(self) -> tuple[NDArray[np.uint32], NDArray[np.uint64]]:
        sums = [extent.checksums[extent.good] for extent in self.extents.values()]
        numbers = [
            (np.uint64(extent.number) << np.uint64(32))
            | np.flatnonzero(extent.good).astype(np.uint64)
            for extent in self.extents.values()
        ]
        if not sums:
            return np.empty(0, np.uint32), np.empty(0, np.uint64)
        checksums, pages = np.concatenate(sums), np.concatenate(numbers)
        order = np.argsort(checksums, kind="stable")
        return checksums[order], pages[order]


def _parts(sources: NDArray[np.void]) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """Cut sources (dtype SOURCE) into parts of one target and some 2 MiB: slot, pieces."""
    slot, pieces, room = -1, list[tuple[int, int]](), 0
    for target, page, npages in sources[["target", "page", "npages"]].tolist():
        while npages:
            if target != slot or not room:
                if pieces:
                    yield slot, pieces
                slot, pieces, room = target, [], HUGE_PAGE_PAGES
            count = min(npages, room)
            pieces.append((page, count))
            page, npages, room = page + count, npages - count, room - count  # noqa: PLW2901
    if pieces:
        yield slot, pieces
