"""What a pager is given to hold, for the tests of all who hold it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from ksmd.kernel import libc, memfd, userfaultfd


@pytest.fixture
def contexts() -> Iterator[tuple[int, int]]:
    """Two contexts of this process: guard and tracking."""
    device = userfaultfd.open_device()
    guard, track = userfaultfd.create(device), userfaultfd.create(device)
    userfaultfd.api(guard, userfaultfd.GUARD_FEATURES)
    userfaultfd.api(track, userfaultfd.TRACK_FEATURES)
    yield guard, track
    for fd in (device, guard, track):
        os.close(fd)


@pytest.fixture
def extent(request: pytest.FixtureRequest) -> Iterator[memfd.ExtentMap]:
    """An extent of the test module's PAGES pages, filled and locked."""
    extent = memfd.create_extent("ksmd-test-held", request.module.PAGES)
    libc.view(extent.address, extent.length)[:] = b"k" * extent.length
    memfd.lock(extent)
    yield extent
    memfd.release(extent)
