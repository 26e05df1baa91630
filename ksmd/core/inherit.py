"""VmFlags of mappings that were there, in another shape, when flags were read last.

A merge cuts a mapping into many; a heap grows; the kernel makes one mapping of neighbours that have
the same flags. One mapping has one set of flags, so it has those of what was there before.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ksmd.model.vma import Kind
from ksmd.model.vmas import Vmas


def flagged_as_before(vmas: Vmas, before: Vmas, ours: Callable[[Kind], bool]) -> Vmas | None:
    """Give *vmas*, read without flags, those that they had in *before*.

    None where any lies in none of those, as far as maps shows, or in some with different flags.
    Those of *ours* stay without.
    """
    mine = vmas.where(ours)
    if not len(before):
        return vmas if mine.all() else None
    first = np.searchsorted(before.ends, vmas.starts, side="right")
    last = np.searchsorted(before.starts, vmas.ends, side="left") - 1
    part = first <= last
    at, last = np.minimum(first, len(before) - 1), np.maximum(last, 0)
    changes = np.concatenate(([0], np.cumsum(before.kind[1:] != before.kind[:-1])))
    part &= changes[at] == changes[last]
    ahead = vmas.starts - before.starts[at]  # wraps where it begins before that one
    numbers: dict[Kind, int] = {}
    was, now = (
        np.array([numbers.setdefault(_bare(kind), len(numbers)) for kind in some.kinds], np.int32)
        for some in (before, vmas)
    )
    part &= was[before.kind[at]] == now[vmas.kind]
    in_file = vmas.where(lambda kind: kind.inode != 0)
    part &= ~in_file | (vmas.offsets - before.offsets[at] == ahead)
    if not np.all(mine | part):
        return None
    kind = np.where(mine, vmas.kind + np.int32(len(before.kinds)), before.kind[at])
    used, number = np.unique(kind, return_inverse=True)
    kinds = [(before.kinds + vmas.kinds)[at] for at in used.tolist()]
    return Vmas(vmas.starts, vmas.ends, vmas.offsets, number.astype(np.int32), kinds)


def _bare(kind: Kind) -> Kind:
    return kind._replace(flags=frozenset())
