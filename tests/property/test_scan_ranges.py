"""Areas and the cursor: every byte of what may be scanned, exactly once."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from ksmd.core.cursor import Cursor
from ksmd.core.eligibility import areas, refusal_of
from ksmd.model.refusal import Reason
from ksmd.model.units import PAGE_SIZE
from ksmd.model.vma import Area, Vma
from ksmd.model.vmas import Vmas

FLAGS = frozenset(("rd", "wr", "mr", "mw", "me", "ac"))
Pages = Counter[int]


@st.composite
def address_spaces(draw: st.DrawFn) -> list[Vma]:
    vmas, at = [], 0
    for hole, npages, locked, ours in draw(
        st.lists(
            st.tuples(st.integers(0, 3), st.integers(1, 6), st.booleans(), st.booleans()),
            max_size=8,
        )
    ):
        start = at + hole
        at = start + npages
        flags = FLAGS | ({"lo"} if locked else set())
        inode = 77 if ours else 0
        vmas.append(
            Vma(start * PAGE_SIZE, at * PAGE_SIZE, "rw-p", 0, (0, 0), inode, "", frozenset(flags))
        )
    return vmas


def pages(ranges: list[tuple[int, int]]) -> Pages:
    return Counter(p for start, end in ranges for p in range(start // PAGE_SIZE, end // PAGE_SIZE))


SPANS = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=5)


@given(address_spaces(), SPANS)
def test_explicit_ranges_are_covered_exactly_once_with_the_right_answer(
    vmas: list[Vma], spans: list[tuple[int, int]]
) -> None:
    regions = tuple((first * PAGE_SIZE, npages) for first, npages in spans)
    allowed, refused = areas(Vmas.of(vmas), regions, merged_by_us=lambda vma: vma.inode == 77)
    owner = {p: v for v in vmas for p in range(v.start // PAGE_SIZE, v.end // PAGE_SIZE)}
    wanted = {p for first, npages in spans for p in range(first, first + npages)}
    ours = {p for p in wanted if p in owner and owner[p].inode == 77}

    got = pages([(a.start, a.end) for a in allowed])
    said = pages([(r.start, r.start + r.npages * PAGE_SIZE) for r in refused])
    assert got + said == Counter(wanted - ours)
    for area in allowed:
        assert refusal_of(area.vma) is None
        assert area.vma.start <= area.start < area.end <= area.vma.end
    for refusal in refused:
        assert (refusal.vma is None) == (refusal.reason is Reason.NOT_MAPPED)
        first = refusal.start // PAGE_SIZE
        assert all(owner.get(p) == refusal.vma for p in range(first, first + refusal.npages))


@given(address_spaces())
def test_anon_covers_every_vma_exactly_once(vmas: list[Vma]) -> None:
    allowed, refused = areas(Vmas.of(vmas), "anon")
    got = pages([(a.start, a.end) for a in allowed])
    said = pages([(r.start, r.start + r.npages * PAGE_SIZE) for r in refused])
    assert got + said == pages([(v.start, v.end) for v in vmas])


@given(
    st.dictionaries(st.integers(0, 5), address_spaces()),
    st.lists(st.integers(1, 7), min_size=1, max_size=20),
)
def test_a_full_scan_meets_every_byte_exactly_once(
    spaces: dict[int, list[Vma]], sizes: list[int]
) -> None:
    cursor = Cursor()
    cursor.begin({slot: [Area(v.start, v.end, v) for v in vmas] for slot, vmas in spaces.items()})
    met: dict[int, list[tuple[int, int]]] = {slot: [] for slot in spaces}
    step = 0
    while (piece := cursor.next_piece(sizes[step % len(sizes)] * PAGE_SIZE)) is not None:
        assert 0 < piece.end - piece.start <= sizes[step % len(sizes)] * PAGE_SIZE
        met[piece.slot].append((piece.start, piece.end))
        step += 1
    for slot, vmas in spaces.items():
        assert pages(met[slot]) == pages([(v.start, v.end) for v in vmas])
    assert cursor.seqnr == (1 if spaces else 0)


CHANGES = st.tuples(st.sampled_from(["step", "forget", "replace"]), st.integers(0, 3))


@given(st.lists(st.tuples(CHANGES, address_spaces()), max_size=40))
def test_whatever_comes_and_goes_a_scan_ends_and_hands_out_only_known_areas(
    events: list[tuple[tuple[str, int], list[Vma]]],
) -> None:
    cursor = Cursor()
    known: dict[int, list[Vma]] = {}
    cursor.begin({})
    for (what, slot), vmas in events:
        if what == "forget":
            cursor.forget(slot)
            known.pop(slot, None)
        elif what == "replace":
            cursor.replace(slot, [Area(v.start, v.end, v) for v in vmas])
            known[slot] = vmas
        elif (piece := cursor.next_piece(2 * PAGE_SIZE)) is not None:
            assert any(
                v.start <= piece.start < piece.end <= v.end for v in known.get(piece.slot, [])
            )
    total = sum((v.end - v.start) // PAGE_SIZE for vmas in known.values() for v in vmas)
    before = cursor.seqnr
    steps = 0
    while cursor.next_piece(PAGE_SIZE) is not None:
        steps += 1
        assert steps <= total
    # a scan whose last target vanished ends, too
    assert cursor.seqnr - before in ({1} if known else {0, 1})
