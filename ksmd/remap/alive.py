"""The alive word: how a stub learns that its tracer is dead before any other thread can run.

A robust futex (get_robust_list(2)) of the tracer's one thread, in a page that each stub maps
read-only. When a process dies the kernel marks its robust futexes first and lets go of its tracees
later, so while the word says alive, every thread that the tracer stopped stands still.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Final

from ksmd.kernel import libc, memfd

NR_SET_ROBUST_LIST: Final = 273


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

    @property
    def fd(self) -> int:
        """The read-only descriptor that stubs map."""
        return self._extent.fd_ro
