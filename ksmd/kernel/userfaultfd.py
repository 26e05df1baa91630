"""userfaultfd(2): contexts, registration and the answers to faults.

Structures and numbers as in include/uapi/linux/userfaultfd.h. This module is imported by the pager,
so it uses struct and fcntl only. Verbs raise OSError; those that may stop half way return how far
they came.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from dataclasses import dataclass

DEVICE = "/dev/userfaultfd"

UFFD_API = 0xAA
FEATURE_EVENT_FORK = 1 << 1
FEATURE_EVENT_REMAP = 1 << 2
FEATURE_EVENT_REMOVE = 1 << 3
FEATURE_MISSING_SHMEM = 1 << 5
FEATURE_MINOR_SHMEM = 1 << 10
FEATURE_WP_UNPOPULATED = 1 << 13
FEATURE_WP_ASYNC = 1 << 15
FEATURE_MOVE = 1 << 16

#: The guard: events that change what is guarded, and both kinds of fault on shared memory.
GUARD_FEATURES = (
    FEATURE_EVENT_FORK
    | FEATURE_EVENT_REMAP
    | FEATURE_EVENT_REMOVE
    | FEATURE_MISSING_SHMEM
    | FEATURE_MINOR_SHMEM
)
#: Quarantine and write tracking. No events: nobody reads this context.
TRACK_FEATURES = (
    FEATURE_WP_ASYNC
    | FEATURE_WP_UNPOPULATED
    | FEATURE_MOVE
    | FEATURE_MISSING_SHMEM
    | FEATURE_MINOR_SHMEM
)

MODE_MISSING = 1
MODE_WP = 2
MODE_MINOR = 4
DONTWAKE = 1

EVENT_PAGEFAULT = 0x12
EVENT_FORK = 0x13
EVENT_REMAP = 0x14
EVENT_REMOVE = 0x15
EVENT_UNMAP = 0x16
MESSAGE_SIZE = 32

NR_USERFAULTFD = 323

# user addresses that every request accepts: above any sane vm.mmap_min_addr, below TASK_SIZE
_USER_START = 1 << 20
_USER_END = (1 << 47) - 4096


def _iowr(number: int, size: int) -> int:
    return 3 << 30 | size << 16 | UFFD_API << 8 | number


def _ior(number: int, size: int) -> int:
    return 2 << 30 | size << 16 | UFFD_API << 8 | number


USERFAULTFD_IOC_NEW = UFFD_API << 8
UFFDIO_API = _iowr(0x3F, 24)
UFFDIO_REGISTER = _iowr(0x00, 32)
UFFDIO_UNREGISTER = _ior(0x01, 16)
UFFDIO_WAKE = _ior(0x02, 16)
UFFDIO_COPY = _iowr(0x03, 40)
UFFDIO_ZEROPAGE = _iowr(0x04, 32)
UFFDIO_MOVE = _iowr(0x05, 40)
UFFDIO_CONTINUE = _iowr(0x07, 32)


@dataclass(frozen=True, slots=True)
class Message:
    """One struct uffd_msg: ``event``, and what belongs to it.

    ``start`` is the faulting address or the range's start, ``end`` the range's end, ``to`` the new
    start of a REMAP, ``fd`` the child's context of a FORK (ours to close).
    """

    event: int
    start: int = 0
    end: int = 0
    to: int = 0
    fd: int = -1


def open_device() -> int:
    """Open /dev/userfaultfd (Linux 6.1), which gives full contexts to whoever holds it."""
    return os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)


def create(device: int) -> int:
    """Make a context for our own memory through *device*."""
    return fcntl.ioctl(device, USERFAULTFD_IOC_NEW, os.O_CLOEXEC | os.O_NONBLOCK)


def api(fd: int, features: int) -> int:
    """Handshake: enable *features*; return all that the kernel has. EINVAL where one is missing."""
    buffer = bytearray(struct.pack("=QQQ", UFFD_API, features, 0))
    fcntl.ioctl(fd, UFFDIO_API, buffer)
    return int(struct.unpack("=QQQ", buffer)[1])


def register(fd: int, start: int, length: int, mode: int) -> None:
    """Register [start, start+length) with *mode* (MODE_*). A subset of present modes is a no-op."""
    fcntl.ioctl(fd, UFFDIO_REGISTER, bytearray(struct.pack("=QQQQ", start, length, mode, 0)))


def unregister(fd: int, start: int, length: int) -> None:
    """Take a range off the context; waiters are woken."""
    fcntl.ioctl(fd, UFFDIO_UNREGISTER, bytearray(struct.pack("=QQ", start, length)))


def wake(fd: int, start: int, length: int) -> None:
    """Let whoever waits in the range try again."""
    fcntl.ioctl(fd, UFFDIO_WAKE, bytearray(struct.pack("=QQ", start, length)))


def _fill(fd: int, request: int, name: str, start: int, length: int, mode: int) -> int:
    buffer = bytearray(struct.pack("=QQQq", start, length, mode, 0))
    try:
        fcntl.ioctl(fd, request, buffer)
    except OSError as error:
        done: int = struct.unpack_from("=q", buffer, 24)[0]
        if done > 0 and error.errno == errno.EAGAIN:
            return done
        raise OSError(error.errno, f"{name}: {error.strerror}") from None
    return length


def zeropage(fd: int, start: int, length: int, mode: int = 0) -> int:
    """Map zeros where nothing is mapped; the number of bytes done. EEXIST: something is there."""
    return _fill(fd, UFFDIO_ZEROPAGE, "UFFDIO_ZEROPAGE", start, length, mode)


def continue_(fd: int, start: int, length: int, mode: int = 0) -> int:
    """Map the page cache's pages where nothing is mapped; the number of bytes done."""
    return _fill(fd, UFFDIO_CONTINUE, "UFFDIO_CONTINUE", start, length, mode)


def move(fd: int, to: int, start: int, length: int, mode: int = 0) -> int:
    """UFFDIO_MOVE within our own memory: take pages from *start* to *to*; the bytes moved.

    EBUSY: a page is pinned or shared by fork. EEXIST does not say that nothing moved.
    """
    buffer = bytearray(struct.pack("=QQQQq", to, start, length, mode, 0))
    try:
        fcntl.ioctl(fd, UFFDIO_MOVE, buffer)
    except OSError as error:
        done: int = struct.unpack_from("=q", buffer, 32)[0]
        if done > 0 and error.errno == errno.EAGAIN:
            return done
        raise OSError(error.errno, f"UFFDIO_MOVE: {error.strerror}") from None
    return length


def wake_all(fd: int) -> None:
    """Let everyone try again who waits on the context, also after a reader that died took notice.

    A fault that was read is not told again: whoever takes a context over has to wake its waiters.
    """
    wake(fd, _USER_START, _USER_END - _USER_START)


def is_dead(fd: int) -> bool:
    """Tell whether the address space of the context is gone (exit or execve).

    Nothing reports that; every request then fails with ESRCH. The one asked here changes nothing:
    no single VMA spans the range, which lies where both 64-bit and 32-bit programs may map.
    """
    try:
        continue_(fd, _USER_START, 0xE000_0000, DONTWAKE)
    except OSError as error:
        return error.errno == errno.ESRCH
    return False


def _parse(data: bytes, offset: int) -> Message:
    event = data[offset]
    if event == EVENT_PAGEFAULT:
        return Message(event, start=struct.unpack_from("=Q", data, offset + 16)[0])
    if event == EVENT_FORK:
        return Message(event, fd=struct.unpack_from("=I", data, offset + 8)[0])
    if event == EVENT_REMAP:
        old, new, length = struct.unpack_from("=QQQ", data, offset + 8)
        return Message(event, start=old, end=old + length, to=new)
    start, end = struct.unpack_from("=QQ", data, offset + 8)
    return Message(event, start=start, end=end)


def read_messages(fd: int, limit: int = 16) -> list[Message]:
    """Read up to *limit* messages, faults before events, each kind in order; [] when none waits.

    The fd must be non-blocking. Reading an event lets its sender go on at once. EMFILE: a child's
    context found no descriptor; its FORK event stays.
    """
    try:
        data = os.read(fd, MESSAGE_SIZE * limit)
    except BlockingIOError:
        return []
    return [_parse(data, offset) for offset in range(0, len(data), MESSAGE_SIZE)]


def read_message(fd: int) -> Message | None:
    """Read one message, None when there is none. The fd must be non-blocking."""
    messages = read_messages(fd, 1)
    return messages[0] if messages else None
