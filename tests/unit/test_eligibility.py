"""Which VMAs may be merged: plain private anonymous memory, and each other one by its name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from ksmd.core import eligibility
from ksmd.core.eligibility import HARMLESS_FLAGS, RefusedRange, detail_of, refusal_of
from ksmd.core.selection import Regions
from ksmd.model.refusal import Reason
from ksmd.model.units import PAGE_SIZE
from ksmd.model.vma import Area, Kind, Vma
from ksmd.model.vmas import Vmas

PLAIN = "rd wr mr mw me ac"
EVERY_FLAG = [  # show_smap_vma_flags(), all architectures, up to 6.19
    *("rd", "wr", "ex", "sh", "mr", "mw", "me", "ms", "gd", "pf", "lo", "io", "sr", "rr", "dc"),
    *("de", "lf", "ac", "nr", "ht", "sf", "ar", "wf", "dd", "bt", "sd", "mm", "hg", "nh", "mg"),
    *("um", "uw", "mt", "ui", "ss", "gu", "sl", "dp"),
]


def vma(first: int = 16, npages: int = 4, **changes: object) -> Vma:
    values: dict[str, object] = {
        "start": first * PAGE_SIZE,
        "end": (first + npages) * PAGE_SIZE,
        "perms": "rw-p",
        "offset": 0,
        "device": (0, 0),
        "inode": 0,
        "path": "",
        "flags": frozenset(PLAIN.split()),
    }
    return Vma(**(values | changes))  # type: ignore[arg-type]


def flags(text: str) -> frozenset[str]:
    return frozenset(f"{PLAIN} {text}".split())


@pytest.mark.parametrize("path", ["", "[heap]", "[anon:arena]", "[anon:[stack] of mine]"])
@pytest.mark.parametrize("more", ["", "nr", "hg", "nh", "sd", "nr hg sd"])
def test_plain_private_anonymous_memory_may_be_merged(path: str, more: str) -> None:
    assert refusal_of(vma(path=path, flags=flags(more))) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"path": "/usr/lib/libc.so.6", "inode": 5, "device": (8, 1)}, Reason.FILE_BACKED),
        ({"path": "/memfd:x (deleted)", "inode": 5, "device": (0, 1)}, Reason.FILE_BACKED),
        ({"path": "/dev/zero", "inode": 5, "device": (0, 6)}, Reason.FILE_BACKED),
        ({"inode": 5}, Reason.FILE_BACKED),
        ({"device": (0, 1)}, Reason.FILE_BACKED),
        ({"path": "/somewhere"}, Reason.FILE_BACKED),
        ({"perms": "rw-s"}, Reason.SHARED_MAPPING),
        ({"perms": "rw-s", "path": "[anon_shmem:x]", "inode": 5}, Reason.SHARED_MAPPING),
        ({"perms": "rw-s", "path": "/[aio] (deleted)", "inode": 9}, Reason.SHARED_MAPPING),
        ({"path": "[stack]", "flags": flags("gd")}, Reason.STACK),
        ({"path": "[stack:12]"}, Reason.STACK),
        ({"path": "[vdso]", "perms": "r-xp"}, Reason.SPECIAL_MAPPING),
        ({"path": "[vvar]", "perms": "r--p", "flags": flags("pf io")}, Reason.SPECIAL_MAPPING),
        ({"path": "[vsyscall]", "perms": "--xp"}, Reason.SPECIAL_MAPPING),
        ({"path": "[something-new]"}, Reason.SPECIAL_MAPPING),
        ({"perms": "r--p"}, Reason.NOT_WRITABLE),
        ({"perms": "---p"}, Reason.NOT_WRITABLE),
        ({"perms": "-w-p"}, Reason.NOT_WRITABLE),
        (
            {"path": "/secretmem (deleted)", "perms": "rw-s", "inode": 3, "flags": flags("sh lo")},
            Reason.SECRET,
        ),
        ({"path": "/anon_hugepage (deleted)", "inode": 3, "flags": flags("ht")}, Reason.HUGETLB),
        ({"perms": "rwxp", "flags": flags("ex")}, Reason.OTHER_FLAGS),
        ({"flags": frozenset()}, Reason.OTHER_FLAGS),
    ],
)
def test_every_other_memory_is_refused_by_its_name(
    changes: dict[str, object], reason: Reason
) -> None:
    assert refusal_of(vma(**changes)) is reason


@pytest.mark.parametrize(
    ("flag", "reason"),
    [
        ("lo", Reason.LOCKED),
        ("lf", Reason.LOCKED),
        ("dc", Reason.DONTFORK),
        ("wf", Reason.WIPEONFORK),
        ("dd", Reason.DONTDUMP),
        ("sl", Reason.SEALED),
        ("dp", Reason.DROPPABLE),
        ("nr wf dd dp", Reason.DROPPABLE),
        ("ht", Reason.HUGETLB),
        ("pf", Reason.PFN_IO),
        ("io", Reason.PFN_IO),
        ("mm", Reason.PFN_IO),
        ("um", Reason.USERFAULTFD),
        ("uw", Reason.USERFAULTFD),
        ("ui", Reason.USERFAULTFD),
        ("mg", Reason.KERNEL_KSM),
        ("gd", Reason.STACK),
        ("ss", Reason.SHADOW_STACK),
        ("ms", Reason.SHARED_MAPPING),
        ("sh", Reason.SHARED_MAPPING),
        ("de", Reason.OTHER_FLAGS),
        ("gu", Reason.OTHER_FLAGS),
        ("??", Reason.OTHER_FLAGS),
    ],
)
def test_each_harmful_flag_has_its_reason(flag: str, reason: Reason) -> None:
    assert refusal_of(vma(flags=flags(flag))) is reason


@pytest.mark.parametrize("flag", EVERY_FLAG)
def test_a_flag_outside_the_harmless_ones_always_refuses(flag: str) -> None:
    refused = refusal_of(vma(flags=flags(flag))) is not None
    assert refused == (flag not in HARMLESS_FLAGS)


def test_write_tracking_by_ourselves_is_no_reason_but_missing_faults_are() -> None:
    assert refusal_of(vma(flags=flags("uw")), write_tracked_by_us=True) is None
    tracked = vma(flags=flags("uw um"))
    assert refusal_of(tracked, write_tracked_by_us=True) is Reason.USERFAULTFD


def test_the_detail_names_what_was_not_known() -> None:
    assert detail_of(vma(flags=flags("zz sr"))) == "VmFlags sr zz"
    assert "executable" in detail_of(vma(perms="rwxp", flags=flags("ex")))
    assert detail_of(vma(flags=frozenset())) == "VmFlags not read"
    assert detail_of(vma()) == ""


HEAP = vma(16, 4, path="[heap]")
FILE = vma(20, 2, path="/lib", inode=3, device=(8, 1))
ANON = vma(30, 10)
LOCKED = vma(40, 5, flags=flags("lo"))
VMAS = [HEAP, FILE, ANON, LOCKED]


def whole(of: Vma) -> Area:
    return Area(of.start, of.end, of)


def areas(
    vmas: list[Vma], regions: Regions, **ours: Callable[[Kind], bool]
) -> tuple[list[Area], list[RefusedRange]]:
    allowed, refused = eligibility.areas(Vmas.of(vmas), regions, **ours)
    assert (len(allowed), len(refused)) == (len(list(allowed)), len(list(refused)))
    counted: Counter[Reason] = Counter()
    for one in refused:
        counted[one.reason] += one.npages
    assert counted == refused.pages()
    return list(allowed), list(refused)


def test_anon_means_every_eligible_vma_and_refuses_the_rest_by_name() -> None:
    allowed, refused = areas(VMAS, "anon")
    assert allowed == [whole(HEAP), whole(ANON)]
    assert refused == [
        RefusedRange(Reason.FILE_BACKED, FILE.start, 2, FILE),
        RefusedRange(Reason.LOCKED, LOCKED.start, 5, LOCKED),
    ]


def test_heap_means_the_heap_alone_and_mentions_nothing_else() -> None:
    assert areas(VMAS, "heap") == ([whole(HEAP)], [])
    locked = HEAP._replace(flags=flags("lo"))
    assert areas([locked, ANON], "heap") == (
        [],
        [RefusedRange(Reason.LOCKED, HEAP.start, 4, locked)],
    )


def test_explicit_ranges_are_cut_at_vmas_and_holes_are_said() -> None:
    allowed, refused = areas(VMAS, ((18 * PAGE_SIZE, 15), (44 * PAGE_SIZE, 3)))
    assert allowed == [
        Area(18 * PAGE_SIZE, 20 * PAGE_SIZE, HEAP),
        Area(30 * PAGE_SIZE, 33 * PAGE_SIZE, ANON),
    ]
    assert refused == [
        RefusedRange(Reason.FILE_BACKED, FILE.start, 2, FILE),
        RefusedRange(Reason.NOT_MAPPED, 22 * PAGE_SIZE, 8, None),
        RefusedRange(Reason.LOCKED, 44 * PAGE_SIZE, 1, LOCKED),
        RefusedRange(Reason.NOT_MAPPED, 45 * PAGE_SIZE, 2, None),
    ]


def test_two_ranges_in_one_vma_give_two_areas() -> None:
    allowed, refused = areas(VMAS, ((31 * PAGE_SIZE, 2), (35 * PAGE_SIZE, 2)))
    assert [(a.start // PAGE_SIZE, a.end // PAGE_SIZE) for a in allowed] == [(31, 33), (35, 37)]
    assert refused == []


def test_our_own_merged_mappings_are_neither_candidates_nor_refusals() -> None:
    allowed, refused = areas(VMAS, "anon", merged_by_us=lambda v: v.inode == 3)
    assert allowed == [whole(HEAP), whole(ANON)]
    assert [r.reason for r in refused] == [Reason.LOCKED]


def test_our_own_write_tracking_keeps_memory_eligible() -> None:
    tracked = ANON._replace(flags=flags("uw"))
    assert areas([tracked], "anon")[0] == []
    assert areas([tracked], "anon", write_tracked_by_us=lambda _v: True) == ([whole(tracked)], [])


@pytest.mark.parametrize("bad", [(1, 1), (PAGE_SIZE, 0), (PAGE_SIZE, -1), (-PAGE_SIZE, 1)])
def test_a_range_that_is_not_made_of_pages_is_an_error(bad: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="not a range of pages"):
        areas(VMAS, (bad,))
