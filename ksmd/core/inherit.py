"""VmFlags of mappings that were parts of others when flags were read last.

A merge cuts a mapping into many. What is left of it has the flags that it had.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ksmd.model.vma import Kind
from ksmd.model.vmas import Vmas


def flagged_as_before(vmas: Vmas, before: Vmas, ours: Callable[[Kind], bool]) -> Vmas | None:
    """Give *vmas*, read without flags, those that they had in *before*.

    None where any is not, as far as maps shows, a part of a mapping that was there. Those of *ours*
    stay without.
    """
    mine = vmas.where(ours)
    if not len(before):
        return vmas if mine.all() else None
    at = np.maximum(np.searchsorted(before.starts, vmas.starts, side="right") - 1, 0)
    ahead = vmas.starts - before.starts[at]  # wraps where it begins before the first
    part = (before.starts[at] <= vmas.starts) & (vmas.ends <= before.ends[at])
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
