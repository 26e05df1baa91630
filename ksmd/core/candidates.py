"""Which store page a page maps to when the store holds its checksum already, perhaps many times.

A page alone could take any of them. A page whose neighbour is merged should take the one that
follows the neighbour's, because then both are one run: one record in the stop window, one VMA.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ksmd.core.layout import U32, U64, Bools, Index, advances, page_keys, starts_where

# Each round settles, in every stretch of undecided pages, at least what one store run covers. A
# stretch still open after so many keeps first candidates: right all the same, only in more runs.
_ROUNDS = 4

# So many candidates of a page are tried for one that its next page would continue.
_CANDIDATES = 4


@dataclass(frozen=True, slots=True)
class StoreIndex:
    """Store pages by checksum (``checksums`` ascending, ``pages`` beside them)."""

    checksums: U32
    pages: U64

    def __post_init__(self) -> None:
        if self.checksums.size != self.pages.size:
            raise ValueError(f"{self.checksums.size} checksums of {self.pages.size} store pages")
        if np.any(self.checksums[1:] < self.checksums[:-1]):
            raise ValueError("the checksums of the store are not in order")


class _ByPage:
    """The same by store page: tells whether a store page exists and has a given checksum."""

    def __init__(self, store: StoreIndex) -> None:
        order = np.argsort(store.pages)
        self._pages = store.pages[order]
        self._checksums = store.checksums[order]

    def holds(self, places: U64, checksums: U32) -> Bools:
        at = np.minimum(np.searchsorted(self._pages, places), self._pages.size - 1)
        found: Bools = (self._pages[at] == places) & (self._checksums[at] == checksums)
        return found


def choose_places(
    slots: U32, pages: U64, checksums: U32, store: StoreIndex, merged: NDArray[np.void] | None
) -> U64:
    """Return a store page for each page, all of whose checksums the store holds.

    Pages sorted by (slot, page). ``merged`` (RUN) are runs that are mapped already; they count as
    neighbours.
    """
    first = np.searchsorted(store.checksums, checksums)
    last = np.searchsorted(store.checksums, checksums, side="right")
    places = store.pages[first]
    settled = last - first == 1
    if settled.all():
        return places
    by_page = _ByPage(store)

    def settle(at: Index, wish: U64) -> None:
        """Take what is wished for where the store holds the right page there."""
        good = by_page.holds(wish, checksums[at])
        places[at[good]] = wish[good]
        settled[at[good]] = True

    if merged is not None and merged.size:
        for key, wish in _beside(merged):
            open_ = np.flatnonzero(~settled)
            at = np.searchsorted(key, page_keys(slots[open_], pages[open_]))
            at = np.minimum(at, key.size - 1)
            hit = key[at] == page_keys(slots[open_], pages[open_])
            settle(open_[hit], wish[at[hit]])

    starts = starts_where(slots[1:] == slots[:-1], advances(pages))
    _spread(pages, checksums, places, settled, starts, by_page)
    if settled.all():
        return places
    joined = np.ones(pages.size, np.bool_)  # does the next entry hold the next page?
    joined[starts[1:] - 1] = False
    joined[-1] = False
    leads = _look_ahead(checksums, places, ~settled & joined, store, (first, last), by_page)
    # A page that neither leads its next one nor is led to keeps its first candidate.
    led = np.zeros(pages.size, np.bool_)
    led[1:] = leads[:-1]
    settled |= ~(leads | led)
    for _ in range(_ROUNDS):
        # Nothing settled touches the stretches that are left: let the first page of each begin.
        waits = ~settled
        heads = waits.copy()
        heads[1:] &= ~waits[:-1]
        heads[starts] = waits[starts]
        settled[heads] = True
        _spread(pages, checksums, places, settled, starts, by_page)
        if settled.all():
            break
    return places


def _look_ahead(
    checksums: U32,
    places: U64,
    asked: Bools,
    store: StoreIndex,
    candidates: tuple[Index, Index],
    by_page: _ByPage,
) -> Bools:
    """Prefer, for the pages asked about, the first candidate that the next page can continue.

    Sets ``places`` and returns which pages have such a candidate.
    """
    first, last = candidates
    leads = np.zeros(asked.size, np.bool_)
    for nth in range(_CANDIDATES):
        at = np.flatnonzero(asked & ~leads & (first + nth < last))
        wish = store.pages[first[at] + nth]
        good = by_page.holds(wish + np.uint64(1), checksums[at + 1])
        places[at[good]] = wish[good]
        leads[at[good]] = True
    return leads


def _beside(merged: NDArray[np.void]) -> list[tuple[U64, U64]]:
    """Return (sorted page keys, store pages) of what would continue merged runs on either side."""
    ahead = merged["page"] + merged["npages"]
    place = (merged["extent"].astype(np.uint64) << np.uint64(32)) | merged["index"]
    sides = []
    for page, wish in (
        (ahead, place + merged["npages"]),
        (merged["page"] - np.uint64(1), place - np.uint64(1)),
    ):
        inside = (merged["page"] > 0) & ((wish >> np.uint64(32)) == merged["extent"])
        key = page_keys(merged["target"][inside], page[inside])
        order = np.argsort(key)
        if order.size:
            sides.append((key[order], wish[inside][order]))
    return sides


def _spread(
    pages: U64, checksums: U32, places: U64, settled: Bools, starts: Index, by_page: _ByPage
) -> None:
    """Let settled pages draw their neighbours along, forwards and then backwards, in place."""
    n = pages.size
    here = np.arange(n)
    segment = np.zeros(n, np.intp)
    segment[starts] = 1
    segment = np.cumsum(segment)
    for step in (1, -1):
        # Work on reversed views for the way back: numpy accumulates only forwards.
        page, checksum = pages[::step], checksums[::step]
        place, known, within = places[::step], settled[::step], segment[::step]
        source = np.maximum.accumulate(np.where(known, here, -1))
        # uint64 wraps, so that "place + (page - page of source)" holds in both directions.
        wish = place[source] + (page - page[source])
        follows = (source >= 0) & ~known & (within[source] == within)
        follows &= by_page.holds(wish, checksum)
        broken = np.maximum.accumulate(np.where(known | follows, -1, here))
        take = follows & (broken < source)
        place[take] = wish[take]
        known[take] = True
