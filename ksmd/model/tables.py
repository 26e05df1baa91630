"""numpy dtypes of the tables."""

from __future__ import annotations

from enum import IntEnum

import numpy as np

#: A page of the store: (extent id << 32) | page index inside the extent.
STORE_PAGE = np.dtype(np.uint64)

#: A run of neighbouring pages of one target that are neighbours in an extent too.
#: ``target`` is the target's slot number, ``page`` a page number (address >> 12),
#: ``extent`` the extent's id, ``index`` the first page inside that extent.
RUN = np.dtype(
    [
        ("target", np.uint32),
        ("npages", np.uint32),
        ("page", np.uint64),
        ("extent", np.uint32),
        ("index", np.uint32),
    ]
)

#: Neighbouring store pages that one target shows: ``first`` is a STORE_PAGE.
SITES = np.dtype([("first", np.uint64), ("npages", np.uint32)])

#: A run of neighbouring pages of one target, without a place in the store.
SPAN = np.dtype([("target", np.uint32), ("npages", np.uint32), ("page", np.uint64)])

#: A record of a stop window, as the tracer reads it: ``start`` and ``length`` in bytes of the
#: target, ``offset`` in bytes of the extent; ``op`` and ``advice`` are the enums of their names in
#: :mod:`ksmd.model.window`.
RECORD = np.dtype(
    [
        ("op", np.uint32),
        ("start", np.uint64),
        ("length", np.uint64),
        ("offset", np.uint64),
        ("advice", np.uint32),
    ]
)

#: The same as the stub reads and answers it (struct record in remap/stub.c): ``aside`` in bytes
#: from the start of the quarantine, ``flags`` are advice and more; ``result``, ``stage`` as below.
STUB_RECORD = np.dtype(
    [
        ("start", np.uint64),
        ("length", np.uint64),
        ("offset", np.uint64),
        ("aside", np.uint64),
        ("op", np.uint32),
        ("prot", np.uint32),
        ("flags", np.uint32),
        ("stage", np.uint32),
        ("result", np.int64),
    ]
)

#: What became of one record: ``result`` and ``stage`` of :class:`ksmd.model.window.Outcome`.
RESULT = np.dtype([("result", np.int64), ("stage", np.uint32)])


class Seen(IntEnum):
    """What the rmap table says of a page that was just read."""

    NEW = 0
    VOLATILE = 1
    STABLE = 2
    TABLE_FULL = 3
