"""One extent of the store: a memfd that only its owner's mapping can ever write.

What a target gets is a read-only descriptor, for the length of a stop window. That alone would not
protect the store: a memfd has mode 0777 at birth, and whoever holds any descriptor of it, or may
open /proc/PID/map_files, could reopen it for writing, truncate it or punch holes into it. So the
writable mapping is made first, then the mode is 0 (for everyone but root) and the file is sealed:
FUTURE_WRITE (no new writer and no new writable shared mapping, for root neither; mappings that
exist go on), SHRINK, GROW, SEAL. The price: the owner cannot punch holes either, so memory returns
only when the whole extent is released.

It is made of large folios, which are several times cheaper to fill than single pages and keep
neighbours neighbours, so that merged memory is read nearly at the speed of huge pages. But none of
2 MiB: a program could map one by a single 2 MiB entry, and when such an entry is split by a write,
a drop or fork, the kernel forgets all 512 pages of it, which the guard would take for drops. Where
the kernel gives folios of 1 MiB (thp.LargeFolios), they are asked for. Else each block of 2 MiB is
allocated as one huge page, and a hole is punched into it, which makes the kernel split it into
folios of 1 MiB and less (Linux 6.15; into single pages before), and the hole is filled again. What
is pinned then cannot be collapsed any more by anybody.

But where pages are mapped singly, and in any order, the store is made of single pages. When the
kernel asks who has used a page (reclaim does, and DAMON all the time), it goes through all mappings
of its whole folio, and who maps a page meanwhile waits: of a folio of 1 MiB that eight programs map
page by page that is 2,048 mappings instead of eight, and has kept a stop window open for 100 ms.

The file is 1 TiB long and sparse: when a target grows a merged mapping in place, it meets holes,
which fault as missing and are answered with zeros by the guard. Beyond the end of a short file it
would meet SIGBUS.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Generator
from dataclasses import dataclass

from ksmd.kernel import libc
from ksmd.kernel.thp import LargeFolios
from ksmd.model.errors import KernelFeatureError, KsmdError, PrivilegeError
from ksmd.model.units import HUGE_PAGE_SIZE, PAGE_SIZE

MFD_CLOEXEC = 0x1
MFD_ALLOW_SEALING = 0x2
MFD_NOEXEC_SEAL = 0x8  # Linux 6.3

F_ADD_SEALS = 1033
F_GET_SEALS = 1034
F_SEAL_SEAL = 0x01
F_SEAL_SHRINK = 0x02
F_SEAL_GROW = 0x04
F_SEAL_FUTURE_WRITE = 0x10
SEALS = F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE

FILE_SIZE = 1 << 40

_COLLAPSE_TRIES = 3
#: Bytes that are allocated at a time.
_STEP = 4 * HUGE_PAGE_SIZE


@dataclass(frozen=True, slots=True)
class ExtentMap:
    """An extent as its owner holds it.

    ``address``: our mapping of the file's first ``npages`` pages, on a 2 MiB boundary, writable
    where we made the extent. ``fd_ro``: the read-only descriptor, ours to close by
    :func:`release`. ``device`` (major, minor) and ``inode`` are what maps shows of it everywhere.
    """

    address: int
    npages: int
    fd_ro: int
    device: tuple[int, int]
    inode: int

    @property
    def length(self) -> int:
        """Bytes that are mapped."""
        return self.npages * PAGE_SIZE


def _translate(error: OSError, step: str) -> KsmdError:
    message = f"cannot make an extent of the store ({step}): {error.strerror or error}"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return KsmdError(message, "raise LimitNOFILE= of ksmd; each extent takes one descriptor")
    if error.errno in (errno.ENOMEM, errno.ENOSPC, errno.EAGAIN, errno.EFAULT):
        return KsmdError(message, "not enough memory, or too little of it may be locked")
    if error.errno in (errno.EPERM, errno.EACCES):
        return PrivilegeError(message, "ksmd needs CAP_IPC_LOCK, and memfd_create allowed")
    if error.errno in (errno.ENOSYS, errno.EINVAL):
        return KernelFeatureError(message, "memfd seals need Linux 5.1")
    return KsmdError(message)


def _memfd(name: str) -> int:
    flags = MFD_CLOEXEC | MFD_ALLOW_SEALING
    try:
        return os.memfd_create(name, flags | MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:  # EINVAL: Linux before 6.3
            raise
        return os.memfd_create(name, flags)


def _map(fd: int, length: int, prot: int) -> int:
    """Map the file's start at a 2 MiB boundary."""
    spare = length + HUGE_PAGE_SIZE
    flags = libc.MAP_PRIVATE | libc.MAP_ANONYMOUS | libc.MAP_NORESERVE
    base = libc.mmap(0, spare, libc.PROT_NONE, flags)
    address = (base + HUGE_PAGE_SIZE - 1) & ~(HUGE_PAGE_SIZE - 1)
    try:
        libc.mmap(address, length, prot, libc.MAP_SHARED | libc.MAP_FIXED, fd)
    except OSError:
        libc.munmap(base, spare)
        raise
    if address > base:
        libc.munmap(base, address - base)
    if base + spare > address + length:
        libc.munmap(address + length, base + spare - address - length)
    return address


def create_extent(
    name: str, npages: int, folios: LargeFolios | None = None, *, scattered: bool = False
) -> ExtentMap:
    """Make an extent of *npages* pages, zeros or holes yet, with our writable mapping of them.

    *name* is what maps shows ("/memfd:NAME (deleted)"). *folios*: how large ones may be had. Blocks
    of 2 MiB count from the file's start; for a last part below 2 MiB, where no large folio is free,
    and where use will be *scattered*, there are single pages. Raises KsmdError (memory,
    descriptors), PrivilegeError, KernelFeatureError.
    """
    steps = creating(name, npages, folios, scattered=scattered)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            made: ExtentMap = end.value
            return made


def creating(
    name: str, npages: int, folios: LargeFolios | None = None, *, scattered: bool = False
) -> Generator[None, None, ExtentMap]:
    """Do the same, in steps of 8 MiB. Closed before its end, it leaves nothing behind."""
    if npages <= 0 or npages * PAGE_SIZE > FILE_SIZE:
        raise ValueError(f"an extent cannot have {npages} pages")
    step = "memfd_create"
    try:
        fd = _memfd(name)
    except OSError as error:
        raise _translate(error, step) from error
    address, fd_ro, length = 0, -1, npages * PAGE_SIZE
    try:
        step = "ftruncate"
        os.ftruncate(fd, FILE_SIZE)
        step = "mmap"
        address = _map(fd, length, libc.PROT_READ | libc.PROT_WRITE)
        step = "allocate"  # before the seals, which forbid holes
        blocks = 0 if scattered else length & ~(HUGE_PAGE_SIZE - 1)
        for start in range(0, blocks, _STEP):
            _allocate(fd, address, start, min(start + _STEP, blocks), folios or LargeFolios())
            yield
        step = "open read-only"  # before the mode goes: afterwards it would take CAP_DAC_OVERRIDE
        fd_ro = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        step = "fchmod"
        os.fchmod(fd, 0)
        step = "seal"
        fcntl.fcntl(fd, F_ADD_SEALS, SEALS)
        found = os.fstat(fd)
    except BaseException as error:
        if address:
            libc.munmap(address, length)
        if fd_ro >= 0:
            os.close(fd_ro)
        if isinstance(error, OSError):
            raise _translate(error, step) from error
        raise
    finally:
        os.close(fd)
    device = (os.major(found.st_dev), os.minor(found.st_dev))
    return ExtentMap(address, npages, fd_ro, device, found.st_ino)


def map_existing(fd: int, npages: int) -> ExtentMap:
    """Map an extent that an earlier daemon made, read-only; *fd* becomes its ``fd_ro``.

    KsmdError when it is no extent: without the seals its content could have changed.
    """
    try:
        sealed = fcntl.fcntl(fd, F_GET_SEALS) & SEALS == SEALS
        found = os.fstat(fd)
        if not sealed or found.st_size != FILE_SIZE:
            raise KsmdError("what was left as an extent of the store is none")
        address = _map(fd, npages * PAGE_SIZE, libc.PROT_READ)
    except OSError as error:
        raise _translate(error, "map again") from error
    device = (os.major(found.st_dev), os.minor(found.st_dev))
    return ExtentMap(address, npages, fd, device, found.st_ino)


def _collapse(address: int) -> bool:
    for _ in range(_COLLAPSE_TRIES):
        try:
            libc.madvise(address, HUGE_PAGE_SIZE, libc.MADV_COLLAPSE)
        except OSError as error:
            if error.errno != errno.EAGAIN:  # EAGAIN: a page was busy
                return False
        else:
            return True
    return False


def _allocate(fd: int, address: int, start: int, end: int, folios: LargeFolios) -> None:
    """Back the blocks from *start* to *end* with large folios of zeros; see above."""
    with folios as given:
        if given:
            libc.madvise(address + start, end - start, libc.MADV_HUGEPAGE)
            libc.madvise(address + start, end - start, libc.MADV_POPULATE_WRITE)
            libc.madvise(address + start, end - start, libc.MADV_NOHUGEPAGE)
            return
    for offset in range(start, end, HUGE_PAGE_SIZE):
        _allocate_block(fd, address, offset)


def _allocate_block(fd: int, address: int, offset: int) -> None:
    """Back one empty block of 2 MiB with a huge page of zeros, and split it; see above."""
    # one page is there first, because the kernel does not collapse nothing
    libc.madvise(address + offset, PAGE_SIZE, libc.MADV_POPULATE_WRITE)
    if not _collapse(address + offset):
        return
    last = offset + HUGE_PAGE_SIZE - PAGE_SIZE
    libc.punch_hole(fd, last, PAGE_SIZE)
    if os.lseek(fd, last, os.SEEK_HOLE) != last:  # zeroed, but still one huge page
        libc.punch_hole(fd, offset, HUGE_PAGE_SIZE)


def lock(extent: ExtentMap) -> None:
    """Fill the holes with zeros and lock the pages. Goes before the pin."""
    try:
        libc.mlock(extent.address, extent.length)
    except OSError as error:
        raise _translate(error, "mlock") from error


def release(extent: ExtentMap) -> None:
    """Unmap and close; memory returns when no target maps the extent and no pin holds it."""
    libc.munmap(extent.address, extent.length)
    with contextlib.suppress(OSError):
        os.close(extent.fd_ro)
