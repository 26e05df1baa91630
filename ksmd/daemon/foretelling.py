"""Reads as few pages of a target as tell what all of them are; see core/foresight.py.

Only for scans after which a compare of bytes follows at once, and only of pages that were never
read: what was foretold wrong is found out by that compare, and is read by the next scan.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ksmd.core.checksum import NO_CHECKSUM, UNKNOWN_CHECKSUM
from ksmd.core.foresight import Source, samples_of
from ksmd.core.sets import places_in
from ksmd.daemon.reader import Pages, Reader
from ksmd.daemon.state import Domain, Target

#: Pages that are read before the first try to foretell those behind them; then twice as many.
_FIRST_LOOK = 1024
#: Fewer pages are read: nothing would be spared.
_LEAST = 64

Sums = NDArray[np.uint32]


def look(reader: Reader, domain: Domain, target: Target, pages: Pages) -> tuple[Pages, Sums]:
    """Give those of *pages* (numbers, ascending) that are still there, and their checksums.

    Pages must be exclusive; TargetGoneError as for :meth:`Reader.read`.
    """
    slot, foresight = target.slot, domain.foresight
    known = bool(np.count_nonzero(domain.tables.remembered(slot, pages)))
    if known or not len(pages) or not target.foreseeable:
        return reader.read(target.memory, pages, domain.seed, at_once=True)
    found: list[tuple[Pages, Sums]] = []
    at, ahead = 0, _FIRST_LOOK
    while at < len(pages):
        source = foresight.source(slot)
        if source is None or len(pages) - at < _LEAST:
            part = pages[at : at + ahead]
            there, sums = reader.read(target.memory, part, domain.seed, at_once=True)
            foresight.learn(slot, there, sums)
            found.append((there, sums))
            ahead *= 2
        else:
            part = pages[at:]
            found.append(_foretell(reader, domain, target, part, source))
        at += len(part)
    there, sums = (np.concatenate(column) for column in zip(*found, strict=True))
    return there, sums


def _foretell(
    reader: Reader, domain: Domain, target: Target, pages: Pages, source: Source
) -> tuple[Pages, Sums]:
    slot, foresight, memory = target.slot, domain.foresight, target.memory
    expected = domain.tables.remembered(source.slot, source.of(pages))
    samples = samples_of(len(pages))
    there, sums = reader.read(memory, pages[samples], domain.seed, at_once=True)
    at, right = places_in(pages[samples], there)
    right[right] = sums[at[right]] == expected[samples[right]]
    told = foresight.foretell(slot, pages, samples, right)
    told &= (expected != NO_CHECKSUM) & (expected != UNKNOWN_CHECKSUM)
    left = ~told
    left[samples] = False
    others, more = reader.read(memory, pages[left], domain.seed, at_once=True)
    foresight.learn(slot, others, more)
    all_pages = np.concatenate((there, pages[told], others))
    order = np.argsort(all_pages, kind="stable")
    return all_pages[order], np.concatenate((sums, expected[told], more))[order]
