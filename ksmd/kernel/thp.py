"""Huge pages of targets, large folios of the store, and the host's policy for both.

Giving back a part of a huge page frees nothing until it is split. MADV_COLD asked from outside
(process_madvise(2), no stop) on one 4 KiB page of a huge page splits it: the kernel cannot age a
part, so it takes the whole apart first (mm/madvise.c). Content does not change; subpages that are
all zero are even freed by the split. A huge page that fork shares is left whole.

The store is made of folios of 1 MiB, the largest that nobody can map by a single entry. The kernel
gives them to shared memory that asks for huge pages, if hugepages-1024kB/shmem_enabled says so; but
it says never, unless somebody has changed it. So we change it for the milliseconds that it takes to
make a part of an extent. The other way (kernel/memfd.py) needs no setting, but memory that is free
in whole blocks of 2 MiB, which on some hosts costs twenty times as much: a virtual machine that
reports such blocks to its host as free has them taken away, and has to get them back.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ksmd.kernel import libc
from ksmd.kernel.sysfs import Settings, chosen
from ksmd.model.errors import KernelFeatureError, KsmdError, PrivilegeError, TargetGoneError
from ksmd.model.units import HUGE_PAGE_SIZE, PAGE_SIZE

SYSFS = Path("/sys/kernel/mm/transparent_hugepage")

_IOV_MAX = 1024

#: Policies under which shared memory that asks for huge pages gets folios of that size.
_GIVEN = frozenset({"always", "within_size", "advise"})


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


class LargeFolios:
    """Has the kernel give shared memory folios of 1 MiB, for the length of a with block.

    ``with folios as given:`` tells whether memory that is advised MADV_HUGEPAGE gets them, and none
    of 2 MiB. *may_change*: whether the setting may be changed for that, and put back. *note* is a
    file that holds the setting as it was for as long as it is changed: see :meth:`recover`.
    """

    def __init__(
        self,
        note: Path | None = None,
        may_change: Callable[[], bool] = lambda: False,
        folder: Path = SYSFS,
    ) -> None:
        self._note = note
        self._may_change = may_change
        self._folder = folder
        self._file = folder / "hugepages-1024kB" / "shmem_enabled"
        self._before = ""

    def _policy(self) -> tuple[bool, str]:
        """Tell whether folios of 1 MiB are given, and what their setting is.

        KsmdError where none can be had, or some of 2 MiB might be.
        """
        files = (
            self._folder / "shmem_enabled",
            self._file,
            self._folder / "hugepages-2048kB" / "shmem_enabled",
        )
        try:
            top, ours, huge = (chosen(file.read_text()) for file in files)
        except OSError as error:
            raise KsmdError("this kernel has no setting for them") from error
        if top in ("deny", "force") or (top if huge == "inherit" else huge) in _GIVEN:
            raise KsmdError(f"{files[0]} says {top}, that of 2 MiB {huge}")
        return (top if ours == "inherit" else ours) in _GIVEN, ours

    def describe(self) -> str:
        """Tell how folios of 1 MiB can be had, changing nothing; KsmdError where they cannot."""
        given, ours = self._policy()
        if given:
            return f"given: {self._file} says {ours}"
        if os.access(self._file, os.W_OK):
            return "given while part of an extent is made (store.large_folios)"
        raise KsmdError(f"{self._file} says {ours}, and we may not write to it; advise would do")

    def __enter__(self) -> bool:
        try:
            given, ours = self._policy()
        except KsmdError:
            return False
        return given or (self._may_change() and self._change(ours))

    def _change(self, before: str) -> bool:
        try:
            if self._note is not None:
                self._note.write_text(before)
            self._file.write_text("advise")
        except OSError:  # sysfs may be read-only for us, or belong to somebody else
            self._forget()
            return False
        self._before = before
        return True

    def __exit__(self, *_: object) -> None:
        before, self._before = self._before, ""
        if before:
            self._put_back(before)

    def _put_back(self, before: str) -> None:
        try:
            self._file.write_text(before)
        except OSError as error:
            raise KsmdError(f"{self._file}: cannot put back {before!r}: {error}") from error
        self._forget()

    def _forget(self) -> None:
        if self._note is not None:
            self._note.unlink(missing_ok=True)

    def recover(self) -> bool:
        """Put back what a process that was killed in the block had changed; whether one was.

        KsmdError where that fails.
        """
        try:
            before = self._note.read_text() if self._note is not None else ""
        except OSError:
            return False
        if before:
            self._put_back(before)
        return bool(before)
