"""What the daemon knows: targets and trust domains. Values and small lookups, no kernel calls."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Collection, Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ksmd.core.checksum import sums_of, zero_sum
from ksmd.core.digest import HeadDigest, Sha1Cache
from ksmd.core.eligibility import RefusedRanges
from ksmd.core.foresight import Foresight
from ksmd.core.ledger import StopTimes
from ksmd.core.price import WindowPrice
from ksmd.core.selection import Selected
from ksmd.core.sets import distinct
from ksmd.core.sieve import Sieve
from ksmd.core.strangers import Strangers
from ksmd.core.tables import PageTables
from ksmd.core.windows import Ground, Records
from ksmd.daemon.memory import Room
from ksmd.kernel.iouring import PinRing
from ksmd.kernel.memory import Memory
from ksmd.kernel.pagemap import PageMap
from ksmd.kernel.thp import LargeFolios
from ksmd.model.plan import Plan
from ksmd.model.process import ProcessInfo, TargetId
from ksmd.model.refusal import Reason
from ksmd.model.tables import SITES
from ksmd.model.units import PAGE_SHIFT
from ksmd.model.vma import Kind, Vma
from ksmd.model.vmas import Areas, Vmas
from ksmd.model.window import Op
from ksmd.remap.engine import TargetContexts
from ksmd.remap.store import Extent, Keeper, Store
from ksmd.settings.values import TableSizes

#: Refusals that may pass: tried again after a while. All others last for the target's life.
PASSING = frozenset(
    {
        Reason.TRACED,
        Reason.FROZEN,
        Reason.UNSTOPPABLE,
        Reason.SHARED_MM,
        Reason.NO_ANCHOR,
        Reason.NO_THREAD,
        Reason.FD_TABLE,
        Reason.PINNED_PROCESS,
        Reason.STALE_STUB,
        Reason.WINDOW_FAILED,
        Reason.NO_GUARD,
        Reason.MEMORY,
    }
)
#: What maps shows of the store, before the domain's name.
STORE_PATH = "/memfd:ksmd-"
_FIRST_PAUSE_SECS = 5.0
_MISSES = 4
_DIGEST_ENTRY = 32  # bytes; entries that were never used take no memory
_LONGEST_PAUSE_SECS = 600.0
_SHIFT = np.uint64(PAGE_SHIFT)


class Tell(Protocol):
    """Who is told of what happens to a target: the kind of event, pages, and a refusal's name."""

    def __call__(self, kind: str, target: Target, pages: int = 0, reason: str = "") -> None:
        """Tell it."""


class Merged:
    """Our mappings in a target: VMAs as columns, ascending, and the extents that they show."""

    def __init__(self, vmas: Vmas, extents: Mapping[int, Extent]) -> None:
        """Take those VMAs that show any of *extents*, by inode."""
        self.vmas = vmas.only(vmas.where(lambda kind: is_ours(kind, extents)))
        used = distinct(self.vmas.kind).tolist()
        self._extents = {number: extents[self.vmas.kinds[number].inode] for number in used}

    def __len__(self) -> int:
        return len(self.vmas)

    def __iter__(self) -> Iterator[tuple[Vma, Extent]]:
        extents = map(self._extents.__getitem__, self.vmas.kind.tolist())
        return zip(self.vmas, extents, strict=True)

    def by_extent(self) -> Iterator[tuple[Extent, Vmas]]:
        """Give the mappings of one extent after the other."""
        inodes = {extent.map.inode: extent for extent in self._extents.values()}
        for inode, extent in inodes.items():
            yield extent, self.vmas.of_file(inode)

    @property
    def extents(self) -> Collection[Extent]:
        """Those that any mapping shows."""
        return self._extents.values()

    @property
    def nbytes(self) -> int:
        """Their length in all."""
        return int((self.vmas.ends - self.vmas.starts).sum())

    def of_vmas(self, what: Callable[[Extent], int]) -> NDArray[np.int64]:
        """Give for each mapping what *what* says of its extent."""
        found = np.zeros(len(self.vmas.kinds), np.int64)
        for number, extent in self._extents.items():
            found[number] = what(extent)
        return found[self.vmas.kind]


def is_ours(vma: Kind | Vma, inodes: Container[int]) -> bool:
    """Whether a mapping is ours, by the extents that there are."""
    return vma.inode in inodes and vma.path.startswith(STORE_PATH)


@dataclass(slots=True)
class Target:
    """One process. ``slot`` numbers it in the tables and is never used again."""

    slot: int
    selected: Selected
    memory: Memory
    pagemap: PageMap
    areas: Areas = field(default_factory=lambda: Areas.of(()))
    ground: Ground = field(default_factory=lambda: Ground.of(Areas.of(())))  # the areas' pages
    refused_ranges: RefusedRanges = field(default_factory=RefusedRanges.none)
    contexts: TargetContexts | None = None
    refused: Reason | None = None
    detail: str = ""
    pause_secs: float = 0.0
    released: bool = False  # somebody asked for its pages back
    room: Room = field(default_factory=Room)  # for what is given back
    brim: Room = field(default_factory=lambda: Room(hard=True))  # for what any window takes
    misses: int = 0
    retry_at: float = 0.0
    last_window: float = 0.0
    stops: StopTimes = field(default_factory=StopTimes)
    prices: dict[Op, WindowPrice] = field(default_factory=dict)
    zeros: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))
    emptied: list[NDArray[np.uint64]] = field(default_factory=list)
    zero_pages: int = 0
    recount_at: float = 0.0  # monotonic seconds; 0: something has changed
    counted_at: float = -math.inf
    rest_secs: float = 0.0  # from one count to the next, for as long as it was the same
    count_secs: float = 0.0  # what the last count took
    anonymous: int = 0  # pages that are no file's, when it was last looked at
    vmas: int = 0
    flagged: Vmas = field(default_factory=lambda: Vmas.of(()))  # all, as they were with VmFlags
    known_areas: int = 0  # what maps was when the areas were read last
    known_mappings: int = 0  # and when what is merged was
    flags_read: float = -math.inf  # monotonic seconds
    reread_at: float = -math.inf  # and then it is time for that, whether it has run or not
    maps_read: float = -math.inf  # likewise; what was mapped then, in pages
    mapped: tuple[int, int, int] = (0, 0, 0)
    #: What it had spent (procfs.spent) when it was scanned, its flags were read, it was counted.
    spent: tuple[int, ...] = ()
    flags_spent: tuple[int, ...] = ()
    count_spent: tuple[int, ...] = ()
    pulse: tuple[int, ...] = ()  # what it had spent when that was asked last: daemon/pulse.py
    felt_at: float = 0.0  # monotonic seconds
    info: ProcessInfo | None = None  # as it was when it had spent info_spent
    info_spent: tuple[int, ...] = ()
    info_until: float = -math.inf
    still_since: int | None = None  # scanner's seconds: core/looks.py
    settled: tuple[Ground, float] | None = None  # all of that was scanned then, and had settled
    foreseeable: bool = True  # what was foretold of its pages (core/foresight.py) has come true
    huge: bool = False  # it had huge pages, when that was looked at last
    handles_faults: bool = False  # by a userfaultfd of its own, when its maps were read last
    mappings: Merged = field(default_factory=lambda: Merged(Vmas.of(()), {}))
    sites: NDArray[np.void] = field(default_factory=lambda: np.empty(0, SITES))
    broken: int = 0
    cow_breaks: int = 0
    tell: Tell | None = None

    @property
    def id(self) -> TargetId:
        """The process."""
        return self.selected.process.id

    @property
    def pid(self) -> int:
        """Its pid."""
        return self.id.pid

    @property
    def merged_pages(self) -> int:
        """Pages that showed the store at the last count."""
        return int(self.sites["npages"].sum())

    @property
    def left_alone(self) -> Reason | None:
        """Why nothing more of it is merged, as operators are told."""
        return Reason.RELEASED if self.released else self.refused

    def release(self) -> None:
        """Merge nothing more of it, whatever becomes of the windows that give its pages back."""
        self.released = True
        if self.tell is not None:
            self.tell("refused", self, reason=str(Reason.RELEASED))

    def refuse(self, reason: Reason, detail: str, now: float) -> None:
        """Leave the target alone: for good, or with growing pauses where the reason may pass."""
        if self.tell is not None and self.refused is not reason:
            self.tell("refused", self, reason=str(reason))
        self.refused, self.detail = reason, detail
        if reason is Reason.UNSTOPPABLE:
            self.misses = min(self.misses + 1, _MISSES)
        if reason in PASSING:
            self.pause_secs = min(self.pause_secs * 2 or _FIRST_PAUSE_SECS, _LONGEST_PAUSE_SECS)
            self.retry_at = now + self.pause_secs
        else:
            self.retry_at = float("inf")

    def accepted(self) -> None:
        """A window went well: whatever was in the way has passed, if it was of that kind."""
        if self.refused is not None and self.refused not in PASSING:
            return
        self.refused, self.detail, self.pause_secs, self.retry_at = None, "", 0.0, 0.0

    def deadline_ms(self, base: float) -> float:
        """The deadline of the next stop: doubled for each that this target missed.

        A program with more busy threads than there are processors needs longer to stand still.
        """
        return base * (1 << self.misses)

    def may_stop(self, now: float, interval: float, asked: bool) -> bool:
        """Whether a stop window may be opened now.

        Not in a program that handles page faults itself: a stop takes the fault of a waiting thread
        back, and whoever was told of it by poll(2) reads EAGAIN.
        """
        if self.handles_faults or self.released:
            return False
        if self.refused is not None and self.refused not in PASSING:
            return False
        return asked or (now >= self.retry_at and now - self.last_window >= interval)


class Domain:
    """A trust domain: pages merge only inside one. Seed and key are secrets of this run."""

    def __init__(
        self,
        name: str,
        sizes: TableSizes,
        ring: PinRing,
        keeper: Keeper,
        folios: LargeFolios | None = None,
    ) -> None:
        self.name = name
        self.seed = secrets.randbits(64)
        self.tables = PageTables(sizes.rmap_hash_size, sizes.page_hash_size)
        self.sieve = Sieve(min(sizes.rmap_hash_size, sizes.page_hash_size))
        self.zero = zero_sum(self.seed)  # checksum of a page of zeros
        self.foresight = Foresight(self.zero)
        self.strangers = Strangers()
        self.idle: tuple[tuple[object, ...], Plan] | None = None  # see Merger.plan
        self.digest = HeadDigest(secrets.token_bytes(32))
        self.sha1_cache = Sha1Cache(sizes.sha1_hash_size)
        self.store = Store(name, self._sums, ring, keeper, folios)

    def unequal(self, slot: int, pages: NDArray[np.uint64]) -> None:
        """Take note that *pages* (any order) of a target are not what their checksums say."""
        self.tables.wake(slot, pages)
        self.tables.doubt(slot, pages[self.foresight.foretold(slot).find(pages)[1]])

    def foretold(self, target: Target, records: Records) -> NDArray[np.bool_]:
        """Tell which of *records* hold pages whose checksums were foretold in this scan."""
        low, high = records["start"] >> _SHIFT, (records["start"] + records["length"]) >> _SHIFT
        held = np.zeros(len(records), np.bool_)
        held[self.foresight.foretold(target.slot).cut(low, high)[0]] = True
        return held

    def doubt_foretold(self, target: Target) -> None:
        """Have everything read that was foretold of a target in this scan."""
        spans = self.foresight.foretold(target.slot)
        for first, end in zip(spans.starts.tolist(), spans.ends.tolist(), strict=True):
            self.tables.doubt(target.slot, np.arange(first, end, dtype=np.uint64))

    def _sums(self, view: memoryview) -> NDArray[np.uint32]:
        return sums_of(view, self.seed)

    @property
    def table_bytes(self) -> int:
        """Bytes of page hash, rmap and digest tables, and of landmarks while there are some."""
        digests = len(self.sha1_cache) * _DIGEST_ENTRY
        return self.tables.nbytes + digests + self.store.nbytes + self.foresight.nbytes
