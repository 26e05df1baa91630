"""Mappings as columns say what mappings one by one say: of any text, and of any process."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ksmd.core.inherit import flagged_as_before
from ksmd.kernel import maps, procfs, proctext
from ksmd.model.vma import Vma
from ksmd.model.vmas import Vmas

LINE = b"55bb6a600000-55bb6a7cb000 rw-p 00000000 00:00 0                          [heap]\n"
FIELDS = b"Size:                  4 kB\nVmFlags: rd wr mr mw me ac \n"
Parser = Callable[[bytes], list[Vma]]


def outcome(parse: Parser, text: bytes) -> list[Vma] | str:
    try:
        return list(parse(text))
    except ValueError as error:
        return str(error)


#: Lines that are mappings, or nearly.
LINES = st.lists(
    st.sampled_from(
        [
            LINE,
            b"1000-2000 r--s 7ffff000 fe:01 12345   /usr/lib/x y\n",
            b"ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0  [vsyscall]\n",
            b"00400000-00401000 r-xp 0 08:01 7\n",
            b"7f0000000000-7f0000001000 rw-p 00000000 00:00 0 \n",
            b"2000-1000 rw-p 0 00:00 0\n",
            b"1000-2000 rwxq 0 00:00 0\n",
            b"1000-2000 rw-p  0 00:00 0\n",
            b"1000 2000-rw-p 0 00:00 0\n",
            b"1000-2000 rw-p 0 00:00\n",
            b"1000-2g00 rw-p 0 00:00 0\n",
            b"-2000 rw-p 0 00:00 0\n",
            b"12345678123456789-2 rw-p 0 00:00 0\n",
            b"a-b-c d e f\n",
            b"\n",
            FIELDS,
            b"VmFlags: rd\n",
            b"Size: 4 kB\nRss: 1 kB\nVmFlags: rd ex\n",
            b"9ize: 4 kB\n",
            b"9Size: 4 kB\nRss: 1 kB\nVmFlags: rd ex\n",
            b"no field\n",
        ]
    ),
    max_size=8,
).map(b"".join)


@given(st.one_of(LINES, st.binary(max_size=200), st.tuples(LINES, st.binary()).map(b"".join)))
@example(LINE[:-1])
@example(b"")
@example(b"1000-2000 rw-p 0 00:00 0 \xff\xfe\0\n")
def test_any_text_is_read_or_refused_as_line_by_line(text: bytes) -> None:
    assert outcome(maps.parse_maps, text) == outcome(proctext.parse_maps, text)
    flagged = outcome(maps.parse_smaps, text)
    one_by_one = outcome(proctext.parse_smaps, text)
    assert flagged == one_by_one


@given(st.lists(st.sampled_from([LINE, LINE + FIELDS, FIELDS, b"x", b"9ize: 1 kB\n"])))
def test_a_mapping_without_flags_never_has_the_next_ones(parts: list[bytes]) -> None:
    text = b"".join(parts)
    assert outcome(maps.parse_smaps, text) == outcome(proctext.parse_smaps, text)


def test_our_own_mappings_are_read_likewise() -> None:
    for text, columns, single in (
        (procfs.maps_text(os.getpid()), maps.parse_maps, proctext.parse_maps),
        (procfs.smaps_text(os.getpid()), maps.parse_smaps, proctext.parse_smaps),
    ):
        assert list(columns(text)) == single(text)
    assert len(maps.maps(os.getpid())) > 10
    assert any("rd" in vma.flags for vma in maps.smaps(os.getpid()))


def test_overlapping_mappings_are_cut_as_one_by_one() -> None:
    text = b"1000-3000 rw-p 0 00:00 0\n2000-5000 rw-p 0 00:00 0\n"
    assert list(maps.disjoint(maps.parse_maps(text))) == proctext.disjoint(
        proctext.parse_maps(text)
    )


# ---------------------------------------------------------------- flags of before

ANON = frozenset({"rd", "wr"})
LOCKED = frozenset({"rd", "wr", "lo"})


def vma(start: int, end: int, flags: frozenset[str] = frozenset(), **changes: object) -> Vma:
    given = {"perms": "rw-p", "offset": 0, "device": (0, 0), "inode": 0, "path": ""} | changes
    return Vma(start=start, end=end, flags=flags, **given)  # type: ignore[arg-type]


def store(start: int, end: int) -> Vma:
    return vma(start, end, inode=9, device=(0, 1), path="/memfd:ksmd-x (deleted)")


def inherited(now: list[Vma], before: list[Vma]) -> list[Vma] | None:
    found = flagged_as_before(Vmas.of(now), Vmas.of(before), lambda kind: kind.inode == 9)
    return None if found is None else list(found)


def test_what_a_merge_leaves_of_a_mapping_has_the_flags_that_the_whole_had() -> None:
    before = [vma(10, 20, ANON), vma(20, 30, LOCKED)]
    now = [vma(10, 12), store(12, 14), vma(14, 20), vma(20, 30)]
    assert inherited(now, before) == [
        vma(10, 12, ANON), store(12, 14), vma(14, 20, ANON), vma(20, 30, LOCKED),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "now",
    [
        vma(18, 62),  # reaches into one that is locked
        vma(25, 32),  # and into one that is none of its kind
        vma(40, 41),  # where nothing was
        vma(5, 6),
        vma(12, 14, perms="r--p"),
        vma(12, 14, path="[heap]"),
        vma(12, 14, inode=3, device=(8, 1), path="/lib"),
        vma(32, 34, inode=3, device=(8, 1), path="/lib", offset=7),  # shows another part
    ],
)
def test_what_was_not_there_as_it_is_now_is_to_be_read(now: Vma) -> None:
    library = vma(30, 40, ANON, inode=3, device=(8, 1), path="/lib", offset=100)
    before = [vma(10, 20, ANON), vma(20, 30, ANON), library, vma(60, 70, LOCKED)]
    assert inherited([now], before) is None
    part = library._replace(start=32, end=34, offset=102, flags=frozenset())
    assert inherited([part], before) == [part._replace(flags=ANON)]


def test_what_has_grown_or_been_joined_has_the_flags_of_its_parts() -> None:
    before = [vma(10, 20, ANON), vma(25, 30, ANON), vma(40, 50, LOCKED)]
    now = [vma(8, 32), vma(39, 70)]
    assert inherited(now, before) == [vma(8, 32, ANON), vma(39, 70, LOCKED)]
    assert inherited([vma(8, 41)], before) is None
    heap = vma(10, 20, ANON, path="[heap]")
    assert inherited([heap._replace(end=30, flags=frozenset())], [heap]) == [heap._replace(end=30)]


def test_without_anything_read_before_only_the_store_is_known() -> None:
    assert inherited([store(1, 2)], []) == [store(1, 2)]
    assert inherited([vma(1, 2)], []) is None
    assert inherited([], []) == []
