"""What is known of a plan's records before anybody is stopped for them: the digests of their heads.

A matching checksum makes a candidate. Here candidates that cannot be equal any more, that have
nobody to share with, or whose mapping forbids it by now, fall out; what is left is compared byte
for byte in the stop window.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from ksmd.core.digest import DIGEST_SIZE, HEAD_SIZE, sampled
from ksmd.core.sets import among
from ksmd.core.spans import Spans
from ksmd.core.windows import Ground, Records, inside, pages_of
from ksmd.daemon.state import Domain, Target
from ksmd.daemon.targets import Targets
from ksmd.model.refusal import Reason
from ksmd.model.units import PAGE_SHIFT, PAGE_SIZE
from ksmd.model.window import Op
from ksmd.remap.store import Extent

#: A target, its ground as its records were made with it, and what it is to map of one extent.
User = tuple[Target, Ground, Records]
#: Seconds for which flags that were read with the same maps are good enough to merge by.
_FRESH_SECS = 5.0


def confirmed(
    domain: Domain, target: Target, extent: Extent, records: Records, refused: Counter[Reason]
) -> Records:
    """Keep records whose store pages are sound and whose digests match, before any stop."""
    first, end = _places(extent, records)
    counts = end - first
    bad = np.concatenate(([0], np.cumsum(~extent.good)))
    sound = bad[end] == bad[first]
    if not sound.all():
        refused[Reason.CHANGED] += int(counts[~sound].sum())
        domain.unequal(target.slot, pages_of(records[~sound]))
        records, counts, first = records[sound], counts[sound], first[sound]
    own = _own(target, records["start"], counts)
    refused[Reason.FORK_SHARED] += int(counts[~own].sum())
    records, counts, first = records[own], counts[own], first[own]
    found = _digests(domain, target, records["start"], counts)
    same: NDArray[np.bool_] = (found == _expected(domain, extent, first, counts)).all(axis=1)
    if not same.all():
        refused[Reason.DIGEST] += int(counts[~same].sum())
        domain.unequal(target.slot, pages_of(records[~same]))
    return records[same]


def _own(
    target: Target, starts: NDArray[np.uint64], counts: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Tell of which runs every page that is to be read now is still the target's alone.

    Reading any other would take the sharing away (kernel/memory.py), and none could be merged.
    """
    run, page = sampled(counts)
    pages = (starts[run] >> np.uint64(PAGE_SHIFT)) + page.astype(np.uint64)
    order = np.argsort(pages, kind="stable")
    own = np.ones(len(counts), np.bool_)
    own[run[order[~target.pagemap.exclusive_of(pages[order])]]] = False
    return own


def without_lonely(users: list[User], extent: Extent, refused: Counter[Reason]) -> list[User]:
    """Drop records of which no page has a second user now.

    That is what is left of two contents with one checksum: nobody is stopped for that.
    """
    company = Company(users, extent)
    return [(target, ground, company.of(records, refused)) for target, ground, records in users]


class Company:
    """Who has each page of a new extent: kept while one user after the other maps it."""

    def __init__(self, users: list[User], extent: Extent) -> None:
        self._extent = extent
        self._users = _users_of_pages(users, extent)

    def of(self, records: Records, refused: Counter[Reason]) -> Records:
        """Give those of *records* of which some page has a second user."""
        shared = np.concatenate(([0], np.cumsum(self._users > 1)))
        first, end = _places(self._extent, records)
        lonely = shared[end] == shared[first]
        refused[Reason.DIGEST] += int((end - first)[lonely].sum())
        kept: Records = records[~lonely]
        return kept

    def lose(self, records: Records, carried: list[Records]) -> None:
        """Take note that of one user's *records* only those that were *carried* out map it."""
        self._users += _per_page(carried, self._extent) - _per_page([records], self._extent)


def strangers(
    runs: NDArray[np.void], users: list[User], extent: Extent, fewest: int
) -> NDArray[np.uint32]:
    """Give the checksums of single pages of *extent* that too few of *users* have after all.

    *runs* is what was planned. A run of several pages may have failed because of any of them.
    *fewest*: of a new extent two; of one that others map already a single one would do.
    """
    slots = np.array([target.slot for target, _, _ in users], np.uint32)
    single = runs[(runs["npages"] == 1) & among(runs["target"], slots)]
    planned = np.bincount(single["index"], minlength=extent.npages)
    alone = (planned >= fewest) & (_users_of_pages(users, extent) < fewest) & extent.good
    return extent.checksums[alone]


def _users_of_pages(users: list[User], extent: Extent) -> NDArray[np.int64]:
    """Count for each page of the extent the users who map it."""
    return _per_page((records for _, _, records in users), extent)


def _per_page(parts: Iterable[Records], extent: Extent) -> NDArray[np.int64]:
    """Count for each page of the extent the records that it is in."""
    steps = np.zeros(extent.npages + 1, np.int64)
    for records in parts:
        first, end = _places(extent, records)
        np.add.at(steps, first, 1)
        np.add.at(steps, end, -1)
    return np.cumsum(steps[:-1])


def _places(extent: Extent, records: Records) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    first = extent.indexes(records["offset"])
    return first, first + (records["length"] >> np.uint64(PAGE_SHIFT)).astype(np.int64)


def _digests(
    domain: Domain, target: Target, starts: NDArray[np.uint64], counts: NDArray[np.int64]
) -> NDArray[np.uint8]:
    """Give the digests of runs of a target, 20 bytes each, from the heads of their pages."""
    run, page = sampled(counts)
    pieces = np.empty((len(run), 2), np.uint64)
    pieces[:, 0] = starts[run] + (page.astype(np.uint64) << np.uint64(PAGE_SHIFT))
    pieces[:, 1] = HEAD_SIZE
    heads = memoryview(bytearray(len(run) * HEAD_SIZE))
    # what is missing stays zero, and differs
    target.memory.gather_exclusive(pieces.reshape(-1).data, heads)
    found = domain.digest.of_all_heads(heads, counts)
    return np.frombuffer(b"".join(found), np.uint8).reshape(-1, DIGEST_SIZE)


def _expected(
    domain: Domain, extent: Extent, first: NDArray[np.int64], counts: NDArray[np.int64]
) -> NDArray[np.uint8]:
    """Give the digests of the runs of store pages that they are to equal, cached or anew."""
    cache = domain.sha1_cache
    pages = np.uint64(extent.number << 32) | first.astype(np.uint64)
    digests, known = cache.find(pages, counts)
    missing = np.flatnonzero(~known)
    store = np.frombuffer(extent.view(0, extent.npages), np.uint8).reshape(-1, PAGE_SIZE)
    found = domain.digest.of_runs(store, first[missing], counts[missing])
    for at, digest in zip(missing.tolist(), found, strict=True):
        cache.put(int(pages[at]), int(counts[at]), digest)
        digests[at] = np.frombuffer(digest, np.uint8)
    return digests


class SecondLook:
    """Reads the maps of who takes part in a plan anew, once it is known who that is.

    A program may have made a mapping afresh since the scan began, at the same address and with
    flags that forbid merging. Those were given before there was content to be found. Where a pass
    was asked for, smaps has been read at its beginning, and what may have changed since is found
    out in the stop window; but not of mappings that have one page only.
    """

    def __init__(self, targets: Targets) -> None:
        self._targets = targets
        self._fresh: dict[int, bool] = {}

    def at_all(self, users: list[User], asked: Callable[[Target], bool]) -> Iterator[User]:
        """Look at one after the other: maps may be long. Who is gone by then is left out."""
        for target, ground, records in users:
            if target.slot not in self._targets.by_slot or target.ground is not ground:
                continue  # read anew meanwhile: a range may have been taken back by its program
            left = self.at(target, records, asked=asked(target))
            if target.slot in self._targets.by_slot:
                yield target, target.ground, left

    def at(self, target: Target, records: Records, *, asked: bool) -> Records:
        """Look, unless that was done; give what of *records* may be merged."""
        known = self._fresh.get(target.slot)
        if known or not len(records):
            return records
        fresh = not asked or _any_alone(target, records)
        if known == fresh:
            return records
        self._fresh[target.slot] = fresh
        before = target.ground
        self._targets.read_areas(target, max_age=0.0 if fresh else _FRESH_SECS)
        return records if target.ground is before else inside(records, target.ground)


def _any_alone(target: Target, records: Records) -> bool:
    """Whether any of a target's *records* is or holds a mapping of one page.

    What is one page may be one by the time of its window: what is around it has been merged then.
    But pages of zeros are dropped, and their mapping stays as it is.
    """
    if records["op"][0] != Op.ZERO and int(records["length"].min()) == PAGE_SIZE:
        return True
    areas = target.areas
    single = (areas.vmas.ends - areas.vmas.starts == PAGE_SIZE)[areas.which]
    ordered = records[np.argsort(records["start"])]
    held = Spans.of(ordered["start"], ordered["start"] + ordered["length"])
    return bool(held.find(areas.starts[single])[1].any())
