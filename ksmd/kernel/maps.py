"""Mappings of a process as columns, from /proc/PID/maps and smaps.

They say the same as :mod:`ksmd.kernel.proctext` does one by one, and fall back to it for any text
that is not as the kernel writes it: that one knows how to complain. Here a mapping takes a
microsecond and some thirty bytes instead of several and five hundred. Errors: as there.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable
from itertools import count

import numpy as np
from numpy.typing import NDArray

from ksmd.kernel import procfs, proctext
from ksmd.model.vma import Kind
from ksmd.model.vmas import U64, Index, Vmas

_NEWLINE, _SPACE, _DASH = b"\n -"
_PERMS = 4
_DIGITS = 16
_NO_DIGIT = 255
_VALUE = np.full(256, _NO_DIGIT, np.uint8)
_VALUE[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16)
_FLAGS = b"\nVmFlags:"
#: What differs from one mapping's fields to the next one's is as good as a space.
_FIGURES = bytes.maketrans(b"0123456789", b" " * 10)


def maps(pid: int, tid: int | None = None) -> Vmas:
    """Read the mappings of *pid*, without flags. Empty for a kernel thread."""
    return disjoint(parse_maps(procfs.maps_text(pid, tid)))


def smaps(pid: int, tid: int | None = None) -> Vmas:
    """Read the mappings with their flags. The kernel walks all page tables for it: some ms/GiB."""
    return disjoint(parse_smaps(procfs.smaps_text(pid, tid)))


def disjoint(vmas: Vmas) -> Vmas:
    """Do as :func:`ksmd.kernel.proctext.disjoint`."""
    if not np.any(vmas.ends[:-1] > vmas.starts[1:]):
        return vmas
    return Vmas.of(proctext.disjoint(list(vmas)))


def parse_maps(text: bytes) -> Vmas:
    """Parse maps as :func:`ksmd.kernel.proctext.parse_maps` does, ValueError included."""
    found = _parsed(text, _kind)
    return Vmas.of(proctext.parse_maps(text)) if found is None else found


def parse_smaps(text: bytes) -> Vmas:
    """Parse smaps as :func:`ksmd.kernel.proctext.parse_smaps` does, ValueError included."""
    lines = _with_flags(text)
    found = None if lines is None else _parsed(lines, _flagged_kind)
    return Vmas.of(proctext.parse_smaps(text)) if found is None else found


def _with_flags(text: bytes) -> bytes | None:
    """Give the lines of the mappings alone, each with its flags behind a NUL; None where unsure.

    The fields between are looked at once for each way in which they may be written: hardly anything
    but figures is different from one mapping to the next.
    """
    lines = []
    known: set[bytes] = set()
    at, end = 0, len(text)
    while at < end:
        line = text.find(b"\n", at)
        flags = text.find(_FLAGS, line) if line >= 0 else -1
        stop = text.find(b"\n", flags + 1) if flags >= 0 else -1
        if stop < 0:
            return None
        fields = text[line + 1 : flags + 1].translate(_FIGURES)
        if fields not in known:
            if not _are_fields(text[line + 1 : flags]):
                return None
            known.add(fields)
        lines.append(b"%b\0%b\n" % (text[at:line], text[flags + len(_FLAGS) : stop]))
        at = stop + 1
    return b"".join(lines)


def _are_fields(text: bytes) -> bool:
    return all(proctext.is_smaps_field(line) for line in text.split(b"\n") if text)


def _parsed(text: bytes, kind_of: Callable[[bytes], Kind]) -> Vmas | None:
    """Parse lines that begin as in maps; *kind_of* reads the rest. None where one is otherwise."""
    if not text:
        return Vmas.of(())
    raw = np.frombuffer(text, np.uint8)
    ends = np.flatnonzero(raw == _NEWLINE)
    starts = np.append(0, ends + 1)[:-1]
    places = _columns_of(raw, starts, ends) if raw[-1] == _NEWLINE else None
    if places is None:
        return None
    dash, first, second, third = places
    low, high = _hex(raw, starts, dash), _hex(raw, dash + 1, first)
    offset = _hex(raw, second + 1, third)
    if low is None or high is None or offset is None or np.any(low >= high):
        return None
    numbers: defaultdict[bytes, int] = defaultdict(count().__next__)
    rest = zip(first.tolist(), second.tolist(), third.tolist(), ends.tolist(), strict=True)
    kind = [numbers[text[one:two] + text[three:end]] for one, two, three, end in rest]
    try:
        kinds = [kind_of(words) for words in numbers]
    except ValueError:
        return None
    return Vmas(low, high, offset, np.array(kind, np.int32), kinds)


def _columns_of(
    raw: NDArray[np.uint8], starts: Index, ends: Index
) -> tuple[Index, Index, Index, Index] | None:
    """Give where in each line the first dash is, and the first, second and third space."""
    dashes, spaces = np.flatnonzero(raw == _DASH), np.flatnonzero(raw == _SPACE)
    nth_dash, nth_space = np.searchsorted(dashes, starts), np.searchsorted(spaces, starts)
    if nth_dash[-1] >= len(dashes) or nth_space[-1] + 2 >= len(spaces):
        return None
    dash = dashes[nth_dash]
    first, second, third = (spaces[nth_space + n] for n in range(3))
    if np.any(dash > first) or np.any(second != first + _PERMS + 1) or np.any(third >= ends):
        return None
    return dash, first, second, third


def _hex(raw: NDArray[np.uint8], starts: Index, ends: Index) -> U64 | None:
    """Give the numbers in [*starts*, *ends*) of each line; None where one is none."""
    lengths = ends - starts
    longest = int(lengths.max())
    if lengths.min() < 1 or longest > _DIGITS:
        return None
    found = np.zeros(len(starts), np.uint64)
    for nth in range(longest):
        here = lengths > nth
        digit = np.where(here, _VALUE[raw[np.maximum(ends - 1 - nth, starts)]], np.uint8(0))
        if digit.max() == _NO_DIGIT:
            return None
        found |= digit.astype(np.uint64) << np.uint64(4 * nth)
    return found


@functools.lru_cache(maxsize=4096)
def _kind(words: bytes) -> Kind:
    """Read " rw-p 00:00 0   path": what a line says besides its places. ValueError."""
    perms, rest = words[: _PERMS + 1], words[_PERMS + 1 :]
    (vma,) = proctext.parse_maps(b"0-1%b 0%b" % (perms, rest))
    return vma.kind


@functools.lru_cache(maxsize=4096)
def _flagged_kind(words: bytes) -> Kind:
    line, _, flags = words.rpartition(b"\0")
    return _kind(line)._replace(flags=proctext.flags(flags))
