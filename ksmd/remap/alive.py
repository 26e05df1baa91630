"""The alive word: how a stub learns that its tracer is dead before any other thread can run.

A robust futex (get_robust_list(2)) of the tracer's one thread, in a page that each stub maps
read-only. When a process dies the kernel marks its robust futexes first and lets go of its tracees
later, so while the word says alive, every thread that the tracer stopped stands still.

Between the two lies what else the kernel takes down at an exit: about a millisecond for a process
of Python, less than a long record may take, and than a stub may have to wait for a processor. A
thread that ran before the stub has ended its record might drop pages that lie in quarantine, or are
mapped and not guarded yet, and nobody would see it. So the tracer holds a *fuse*, a descriptor
whose closing waits for a grace period of the kernel: some ten milliseconds, and nothing per record.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from typing import Final

from ksmd.kernel import libc, memfd

NR_SET_ROBUST_LIST: Final = 273
NR_INOTIFY_ADD_WATCH: Final = 254
NR_INOTIFY_INIT1: Final = 294
_IN_DELETE_SELF: Final = 0x400


class _Node(ctypes.Structure):
    pass


_Node._fields_ = [("next", ctypes.POINTER(_Node))]


class _Head(ctypes.Structure):
    """struct robust_list_head, include/uapi/linux/futex.h."""

    _fields_ = [("list", _Node), ("futex_offset", ctypes.c_long), ("pending", ctypes.c_void_p)]


class AliveWord:
    """Owned by the thread that makes it; keep it for as long as the thread traces."""

    def __init__(self) -> None:
        self._extent = memfd.create_extent("ksmd-alive", 1)
        word = ctypes.c_uint32.from_address(self._extent.address)
        self._node = _Node()
        self._head = _Head()
        self._node.next = ctypes.pointer(self._head.list)
        self._head.list.next = ctypes.pointer(self._node)
        self._head.futex_offset = self._extent.address - ctypes.addressof(self._node)
        word.value = threading.get_native_id()
        libc.syscall(
            "set_robust_list",
            NR_SET_ROBUST_LIST,
            ctypes.addressof(self._head),
            ctypes.sizeof(self._head),
        )
        self.fuse = -1
        with contextlib.suppress(OSError):  # the user's instances of inotify may be used up
            self.fuse = _fuse()

    @property
    def fd(self) -> int:
        """The read-only descriptor that stubs map."""
        return self._extent.fd_ro


def _fuse() -> int:
    """Make a descriptor that is slow to close: an inotify group with a mark, on what never goes.

    fsnotify_destroy_group waits for a grace period of SRCU; where it does not, nothing is lost but
    time.
    """
    fd = libc.syscall("inotify_init1", NR_INOTIFY_INIT1, os.O_CLOEXEC | os.O_NONBLOCK)
    libc.syscall("inotify_add_watch", NR_INOTIFY_ADD_WATCH, fd, b"/", _IN_DELETE_SELF)
    return fd
