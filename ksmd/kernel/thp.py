"""Huge pages of targets, and the host's policy for them.

Giving back a part of a huge page frees nothing until it is split. MADV_COLD asked from outside
(process_madvise(2), no stop) on one 4 KiB page of a huge page splits it: the kernel cannot age a
part, so it takes the whole apart first (mm/madvise.c). Content does not change; subpages that are
all zero are even freed by the split. A huge page that fork shares is left whole.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from ksmd.kernel import libc
from ksmd.kernel.sysfs import Settings, chosen
from ksmd.model.errors import KernelFeatureError, KsmdError, PrivilegeError, TargetGoneError
from ksmd.model.units import HUGE_PAGE_SIZE, PAGE_SIZE

SYSFS = Path("/sys/kernel/mm/transparent_hugepage")

_IOV_MAX = 1024


def _explain(error: OSError) -> KsmdError:
    if error.errno == errno.ESRCH:
        return TargetGoneError("the process has exited")
    if error.errno in (errno.EPERM, errno.EACCES):
        return PrivilegeError(
            error.strerror or "process_madvise", "ksmd needs CAP_SYS_PTRACE and CAP_SYS_NICE"
        )
    if error.errno == errno.ENOSYS:
        return KernelFeatureError("this kernel has no process_madvise", "Linux 5.10 is needed")
    return KsmdError(error.strerror or "process_madvise")


def cold(pidfd: int, ranges: Sequence[tuple[int, int]]) -> int:
    """Advise MADV_COLD on (address, length) ranges of the process; the bytes that were advised.

    Ranges are page-aligned. One that has no mapping (any more), or whose mapping is locked or
    special, is passed over. Huge pages that lie wholly in a range stay whole: see :func:`split`.
    """
    advised, position = 0, 0
    while position < len(ranges):
        batch = ranges[position : position + _IOV_MAX]
        flat = [word for extent in batch for word in extent]
        vectors = (ctypes.c_uint64 * len(flat))(*flat)
        try:
            got = libc.syscall(
                "process_madvise",
                libc.NR_PROCESS_MADVISE,
                pidfd,
                ctypes.addressof(vectors),
                len(batch),
                libc.MADV_COLD,
                0,
            )
        except OSError as error:
            if error.errno not in (errno.ENOMEM, errno.EINVAL):
                raise _explain(error) from error
            position += 1  # the first range was refused
            continue
        advised += got
        position += _completed(batch, got)
    return advised


def _completed(batch: Sequence[tuple[int, int]], advised: int) -> int:
    """Count the ranges that *advised* bytes cover, and the refused one that stopped the call."""
    for index, (_, length) in enumerate(batch):
        if advised < length:
            return index + 1
        advised -= length
    return len(batch)


def split(pidfd: int, addresses: Iterable[int]) -> int:
    """Split the huge pages in which *addresses* lie; the number of pages that were advised."""
    blocks = sorted({address & ~(HUGE_PAGE_SIZE - 1) for address in addresses})
    return cold(pidfd, [(block, PAGE_SIZE) for block in blocks]) // PAGE_SIZE


def split_in(pid: int, addresses: Iterable[int]) -> int:
    """Do as :func:`split`, by pid."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as error:
        raise _explain(error) from error
    try:
        return split(pidfd, addresses)
    finally:
        os.close(pidfd)


def shmem_enabled() -> str | None:
    """Read the policy for huge pages in shared memory ("never", "advise", ...), None if absent."""
    try:
        return chosen((SYSFS / "shmem_enabled").read_text())
    except OSError:
        return None


class ThpSettings(Settings):
    """Set files of transparent_hugepage for the length of a with block, for benches and tests.

    ``with ThpSettings(shmem_enabled="advise", enabled="madvise"):``
    """

    def __init__(self, folder: Path = SYSFS, **values: str) -> None:
        super().__init__(folder, values)
