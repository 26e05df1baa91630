"""A page that another process has pinned, and will write to, must keep that write.

process_vm_writev(2) pins the page, lets go of the memory map and then copies. Here its source is a
page that is missing until the test says so: between the pin and the copy any window may come.
"""

# ruff: noqa: F401, F811  (fixtures are imported by their names)

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import struct
import threading
from collections.abc import Callable

import pytest
from remap_lab import content, lab, says
from test_remap_limits import Bench, bench

from ksmd.kernel import libc, userfaultfd
from ksmd.model.refusal import Reason
from ksmd.model.units import PAGE_SIZE
from ksmd.model.window import Op, WindowResult

pytestmark = pytest.mark.root

PAGE = 8
WRITTEN = b"\xee" * 8
PATIENCE = 30.0
_NR_PROCESS_VM_WRITEV = 311
_NR_USERFAULTFD = 323
_HOLE = (
    "UFFDIO_MOVE, which refuses pinned pages, takes none of a private file mapping: nothing tells"
    " that a page written since its merge is pinned by another process"
)


def stalled_write(pid: int, address: int) -> Callable[[], int]:
    """Begin to write eight bytes; the page there is pinned until the result is called.

    That lets the write go on and gives what process_vm_writev returned: bytes written.
    """
    context = libc.syscall("userfaultfd", _NR_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
    userfaultfd.api(context, 0)
    rights, kind = libc.PROT_READ | libc.PROT_WRITE, libc.MAP_PRIVATE | libc.MAP_ANONYMOUS
    source = libc.mmap(0, PAGE_SIZE, rights, kind)
    userfaultfd.register(context, source, PAGE_SIZE, userfaultfd.MODE_MISSING)
    local = (ctypes.c_uint64 * 2)(source, len(WRITTEN))
    remote = (ctypes.c_uint64 * 2)(address, len(WRITTEN))
    returned: list[int] = []

    def write() -> None:
        vectors = (ctypes.addressof(local), 1, ctypes.addressof(remote), 1, 0)
        returned.append(libc.syscall("process_vm_writev", _NR_PROCESS_VM_WRITEV, pid, *vectors))

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    assert select.select([context], [], [], PATIENCE)[0], "the write did not come to its source"

    def finish() -> int:
        page = ctypes.create_string_buffer(WRITTEN * (PAGE_SIZE // len(WRITTEN)), PAGE_SIZE)
        copy = struct.pack("=QQQQq", source, ctypes.addressof(page), PAGE_SIZE, 0, 0)
        fcntl.ioctl(context, userfaultfd.UFFDIO_COPY, bytearray(copy))
        thread.join(PATIENCE)
        os.close(context)
        libc.munmap(source, PAGE_SIZE)
        return returned[0]

    return finish


def _write_through_a_window(bench: Bench, op: Op, fail: tuple[int, int, int]) -> WindowResult:
    """Open a window on the page while the write to it stands between pin and copy."""
    finish = stalled_write(bench.pid, bench.address + PAGE * PAGE_SIZE)
    try:
        records = bench.records(op, ((PAGE, 1),))
        result = bench.lab.window(bench.subject, records, bench.extent, fail=fail)
    finally:
        assert finish() == len(WRITTEN)
    return result


def _arrived(bench: Bench) -> bool:
    return content(bench.pid, bench.address + PAGE * PAGE_SIZE, 1)[:8] == WRITTEN


def test_pinned_page_is_not_merged_and_keeps_the_write(bench: Bench) -> None:
    result = _write_through_a_window(bench, Op.MERGE, (0, 0, 0))
    assert [o.reason for o in result.outcomes] == [Reason.PINNED_PAGE], says(result)
    assert _arrived(bench)


def _written_since_its_merge(bench: Bench) -> None:
    assert bench.window(Op.MERGE, (PAGE, 1)) == [None]
    bench.script.ask(f"fill(a + {PAGE} * PAGE, 1, {PAGE + 1})")


@pytest.mark.parametrize("op", [Op.UNMERGE, Op.REMERGE], ids=lambda op: op.name.lower())
@pytest.mark.parametrize("step", [2, 3, 4])
def test_undone_window_keeps_the_write(bench: Bench, op: Op, step: int) -> None:
    _written_since_its_merge(bench)
    result = _write_through_a_window(bench, op, (step, errno.ENOMEM, 0))
    assert [o.result for o in result.outcomes] == [-errno.ENOMEM], says(result)
    assert _arrived(bench)


@pytest.mark.xfail(strict=True, reason=_HOLE)
@pytest.mark.parametrize("op", [Op.UNMERGE, Op.REMERGE], ids=lambda op: op.name.lower())
def test_pinned_page_that_was_written_since_its_merge_keeps_the_write(bench: Bench, op: Op) -> None:
    _written_since_its_merge(bench)
    _write_through_a_window(bench, op, (0, 0, 0))
    assert _arrived(bench)
