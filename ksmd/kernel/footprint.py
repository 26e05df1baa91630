"""What a process of ours leaves behind of its start: code that ran once, and holes in the heap."""

from __future__ import annotations

import contextlib
import os

import numpy as np

from ksmd.kernel import libc, maps, pageentries
from ksmd.kernel.pagemap import PageMap
from ksmd.model.units import PAGE_SHIFT

_READ_ONLY = frozenset({"r-xp", "r--p"})


def settle_down() -> None:
    """Give back what only start-up needed, or work that is over.

    To load numpy and a cryptography library brings in some MiB of them that nobody looks at again.
    Where a read-only mapping of a file has no page of its own (as those have that the loader wrote
    to before), what is needed after all comes back from the page cache, sixteen pages at a time.
    """
    libc.trim_heap()
    with PageMap(os.getpid()) as pagemap:
        for vma in maps.maps(os.getpid()):
            if vma.perms in _READ_ONLY and vma.inode:
                length = vma.end - vma.start
                found = pagemap.entries(vma.start >> PAGE_SHIFT, length >> PAGE_SHIFT)
                own = pageentries.is_present(found) & ~pageentries.is_file(found)
                if not np.any(own | pageentries.is_swapped(found)):
                    with contextlib.suppress(OSError):  # locked: somebody wants it in memory
                        libc.madvise(vma.start, length, libc.MADV_DONTNEED)
