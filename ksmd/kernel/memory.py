"""Another process's memory, read so that nothing in it changes.

Two readers exist. pread on /proc/PID/mem copies through the kernel and leaves every page as it
was: it is always harmless. process_vm_readv(2) is some 20 % faster (with huge pages twice as fast),
but it pins the pages, and a pin of a page that fork or KSM shares gives the process a copy of its
own: reading a forked family that way makes it grow. So it has the longer name here, and may be used
only where pagemap says that every page is exclusive (bit 56).

Both readers map the zero page where a page is absent, so ask pagemap first. That answer may be old
by the time of the read, though, and a program that answers page faults itself (userfaultfd) tells
the two apart: /proc/PID/mem gives up where such a page is absent, but process_vm_readv asks the
program for the page, which it would not have had to give, and waits for it, perhaps for ever. So it
is left out until ``may_pin`` says that the program has no userfaultfd. What is merged is guarded by
one of ours, and never read that way: the pager may be dead, and wait for us to start the next.

Read pieces of 1 to 4 MiB: smaller ones pay for the call, larger ones fall out of the cache.

The file is opened through a live task and stays tied to the memory it was opened on: after execve
or exit every access raises TargetGoneError. Open it first and check the target's start time then:
from there on a reused pid cannot be mistaken for the target.
"""

from __future__ import annotations

import ctypes
import errno
import os
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, chain

from ksmd.kernel import libc, procfs
from ksmd.kernel.taskfile import TaskFile
from ksmd.model.errors import KsmdError, TargetGoneError

NR_PROCESS_VM_READV = 310

_IOV_MAX = 1024

#: A good size for one read, in bytes.
PIECE = 1 << 20


class Memory(TaskFile):
    """The memory of *pid*; close it, or use it as a context manager.

    Raises TargetGoneError, and PrivilegeError without the right to trace the process. Writing needs
    ``writable=True`` and goes past page protections, as a debugger's does: it breaks sharing.
    *tid*: a task that is known to live; one is looked for when None.
    """

    def __init__(self, pid: int, *, writable: bool = False, tid: int | None = None) -> None:
        super().__init__(pid, "mem", tid=tid, flags=os.O_RDWR if writable else os.O_RDONLY)
        #: Whether process_vm_readv may be used at all; its owner says so (risks.may_answer_faults).
        self.may_pin = False
        # a thread's id may be given away while its process lives on, the process's own may not
        self._vm_readv = self.tid == pid

    def read_into(self, address: int, view: memoryview) -> int:
        """Fill *view* (bytes, writable) from *address*; the number of bytes read.

        It is less than asked for where a hole or an unreadable mapping comes first, down to 0.
        """
        done, length = 0, view.nbytes
        while done < length:
            try:
                got = os.preadv(self._fd, [view[done:]], address + done)
            except OSError as error:
                if error.errno in (errno.EIO, errno.EFAULT):  # EFAULT: it shrank meanwhile
                    return done
                raise procfs.translate(error, f"process {self.pid}") from error
            if got == 0:
                raise TargetGoneError(f"process {self.pid} has exited or called execve")
            done += got
        return done

    def read(self, address: int, length: int) -> bytes:
        """Read up to *length* bytes at *address*; shorter where a hole follows."""
        buffer = bytearray(length)
        return bytes(buffer[: self.read_into(address, memoryview(buffer))])

    def read_exclusive_into(self, address: int, view: memoryview) -> int:
        """Do as :meth:`read_into`, by process_vm_readv: only where every page is exclusive.

        On a page that is shared by fork or KSM this call takes the sharing away. Whatever
        process_vm_readv does not deliver, or may not touch, is read from /proc/PID/mem.
        """
        done = self._vm_read(address, view)
        if done:
            # process_vm_readv goes by pid: the open file proves that it was still our process's
            self.read_into(address, memoryview(bytearray(1)))
        return done if done == view.nbytes else done + self.read_into(address + done, view[done:])

    def _vm_read(self, address: int, view: memoryview) -> int:
        target = (ctypes.c_char * view.nbytes).from_buffer(view)
        local = (ctypes.c_uint64 * 2)(ctypes.addressof(target), view.nbytes)
        remote = (ctypes.c_uint64 * 2)(address, view.nbytes)
        return self._process_vm_readv(local, ctypes.addressof(remote), 1)

    def _process_vm_readv(
        self, local: ctypes.Array[ctypes.c_uint64], remote: int, count: int
    ) -> int:
        """Read *count* pieces, (address, length) at *remote*, into one: bytes read, perhaps 0."""
        if not (self._vm_readv and self.may_pin):
            return 0
        try:
            return libc.syscall(
                "process_vm_readv",
                NR_PROCESS_VM_READV,
                self.pid,
                ctypes.addressof(local),
                1,
                remote,
                count,
                0,
            )
        except OSError as error:
            # EPERM, ENOSYS (a filter): for good. EFAULT: a hole. ESRCH: the first thread has ended,
            # others may live; the open file knows.
            if error.errno in (errno.EPERM, errno.ENOSYS):
                self._vm_readv = False
            return 0

    def gather_exclusive(
        self, pieces: memoryview | Sequence[tuple[int, int]], view: memoryview
    ) -> list[tuple[int, int]]:
        """Read many pieces (address, length) into *view*, one after the other, in few calls.

        Where they are many, they come as a writable memoryview of 64-bit numbers, two for each.
        Every page exclusive, as for :meth:`read_exclusive_into`. Gives the ranges [start, end) of
        *view* that could not be read, and are as they were.
        """
        missing: list[tuple[int, int]] = []
        if not isinstance(pieces, memoryview):
            pieces = memoryview(array("Q", chain.from_iterable(pieces)))
        count = len(pieces) // 2
        if not count:
            return missing
        ends = [0, *accumulate(pieces[1::2])]
        vectors = ctypes.addressof(ctypes.c_char.from_buffer(pieces))
        target = (ctypes.c_char * ends[-1]).from_buffer(view)
        start, at = ctypes.addressof(target), 0
        while at < count:
            until = min(at + _IOV_MAX, count)
            local = (ctypes.c_uint64 * 2)(start + ends[at], ends[until] - ends[at])
            got = ends[at] + self._process_vm_readv(local, vectors + at * 16, until - at)
            if got == ends[until]:
                at = until
                continue
            # a page of this piece is gone, or this way is closed
            at = bisect_right(ends, got) - 1
            address = pieces[2 * at] + got - ends[at]
            got += self.read_into(address, view[got : ends[at + 1]])
            if got < ends[at + 1]:
                missing.append((got, ends[at + 1]))
            at += 1
        # process_vm_readv goes by pid: the open file proves that it was still our process's
        self.read_into(pieces[0], memoryview(bytearray(1)))
        return missing

    def write(self, address: int, data: bytes) -> None:
        """Write all of *data* at *address*; KsmdError where nothing is mapped."""
        done = 0
        while done < len(data):
            try:
                got = os.pwrite(self._fd, data[done:], address + done)
            except OSError as error:
                if error.errno in (errno.EIO, errno.EFAULT):
                    raise KsmdError(
                        f"process {self.pid}: cannot write at {address + done:#x}"
                    ) from error
                raise procfs.translate(error, f"process {self.pid}") from error
            if got == 0:
                raise TargetGoneError(f"process {self.pid} has exited or called execve")
            done += got
