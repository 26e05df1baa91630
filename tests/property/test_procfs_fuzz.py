"""The parsers of /proc take any input: values or ValueError, nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ksmd.kernel import proctext, risks
from ksmd.model.vma import Vma


def status_masks(data: bytes) -> object:
    return proctext.Status(data).masks("SigPnd", "SigCgt")


def status_numbers(data: bytes) -> object:
    return proctext.Status(data).own("NSpid", 7)


PARSERS: list[Callable[[bytes], object]] = [
    proctext.parse_stat,
    proctext.parse_maps,
    proctext.parse_smaps,
    proctext.parse_fields,
    proctext.parse_cgroup,
    status_masks,
    status_numbers,
    risks.is_x86_64_header,
]

LINES = [
    b"1 (x) S 1 1 1 0 -1 4194560 0 0 0 0 0 0 0 0 20 0 1 0 5 4096 1 1 1\n",
    b"7f00-8f00 rw-p 00000000 00:00 0                          [heap]\n",
    b"7f00-8f00 rw-p 00000000 00:00 0 \n",
    b"Size:  4 kB\n",
    b"VmFlags: rd wr mr mw me ac \n",
    b"0::/a.service\n",
    b"\nSigPnd:\t0000000000000000\n",
    b"\nSigCgt:\t",
    b"\nNSpid:\t41\t7\n",
    b"\x7fELF\x02\x01",
    b"99999999999999999999999999999999 (",
    b"\n\n",
]

#: Pieces of real lines in any order, with any bytes between.
soup = st.lists(st.sampled_from(LINES) | st.binary(max_size=20), max_size=12).map(b"".join)


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.__name__)
@given(data=st.binary(max_size=300) | soup)
@example(data=b"1000-2000 rw-p 0 00:00 0  \xff\n")
@example(data=b"1 (" + b"9" * 5000 + b") S" + b" 9" * 30)
@example(data=b"1 (x) S " + b" ".join([b"9" * 5000] * 30))
@example(data=b"Name:\tx\nNSpid:\nSigPnd:\nSigCgt:\n")
def test_no_input_raises_anything_but_value_error(
    parser: Callable[[bytes], object], data: bytes
) -> None:
    with contextlib.suppress(ValueError):
        parser(data)


@given(text=st.text(max_size=200))
def test_any_text_is_taken_too(text: str) -> None:
    for parser in (proctext.parse_maps, proctext.parse_smaps):
        with contextlib.suppress(ValueError):
            parser(text)


paths = st.text(
    st.characters(blacklist_characters="\n", blacklist_categories=("Cs",)), max_size=30
).map(lambda path: path.strip(" "))

vmas = st.builds(
    lambda start, size, perms, offset, device, inode, path: Vma(
        start, start + size, perms, offset, device, inode, path
    ),
    st.integers(0, (1 << 63) - 1),
    st.integers(1, 1 << 40),
    st.from_regex(r"[r-][w-][x-][ps]", fullmatch=True),
    st.integers(0, (1 << 64) - 1),
    st.tuples(st.integers(0, 0xFFF), st.integers(0, 0xFFFFF)),
    st.integers(0, (1 << 64) - 1),
    paths,
)


def _line(vma: Vma) -> str:
    """Write a mapping as fs/proc/task_mmu.c does."""
    head = (
        f"{vma.start:08x}-{vma.end:08x} {vma.perms} {vma.offset:08x}"
        f" {vma.device[0]:02x}:{vma.device[1]:02x} {vma.inode} "
    )
    return f"{head:<73}{vma.path}" if vma.path else head


@given(st.lists(vmas, max_size=20))
def test_every_mapping_that_a_kernel_can_print_is_read_back(mappings: list[Vma]) -> None:
    text = "".join(_line(vma) + "\n" for vma in mappings)
    assert proctext.parse_maps(text) == mappings
    assert proctext.parse_smaps(text) == mappings


@given(
    st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=15),
    st.integers(0, (1 << 63) - 1),
)
def test_no_comm_can_forge_the_start_time(comm: str, start: int) -> None:
    fields = " ".join(["0"] * 18)
    line = f"7 ({comm}) S {fields} {start} 4096 0\n".encode()
    stat = proctext.parse_stat(line)
    assert (stat.comm, stat.start_time, stat.state) == (comm, start, "S")
