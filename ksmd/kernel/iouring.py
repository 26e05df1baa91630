"""Long-term pins of store memory.

mlock keeps store pages in memory, but not in the page tables of the targets: any process that maps
an extent may ask for MADV_COLLAPSE, and the kernel then takes the pages out of every page table
(khugepaged and migration do the same). The guard reads a page that is not in the page table as
dropped by the program, so that must not happen. A page with a long-term pin is neither collapsed
nor migrated, and the one way to such a pin that needs no device is a registered buffer of io_uring
(io_uring_register(2)). No I/O is ever submitted.

A ring has a sparse table of buffers; a slot is set by a pin and cleared by its unpin. More rings
are made as they are needed, and those without a pin go again. Pins live until unpin or close, also
after the memory was unmapped, and they count in VmPin of our status.

To tell what it has accounted for already the kernel looks through all pages of a new buffer, and of
all others of its ring, once for each folio (headpage_already_acct, io_uring/rsrc.c). So what a pin
takes would grow with the square of the store: 0.6 ms for the first extent of 16 MiB, 350 ms for the
160th. Hence many small rings, and small buffers.

A pin can be made of writable memory only, and nobody can map an extent writable again once it is
sealed. So the pins of an earlier daemon cannot be made anew: they are adopted with their rings,
which any holder may use to take them off. New pins go into rings of our own, since those of an old
ring would be charged to the process that made it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping
from types import TracebackType

from ksmd.kernel import libc
from ksmd.model.errors import KernelFeatureError, KsmdError

NR_IO_URING_SETUP = 425
NR_IO_URING_REGISTER = 427
# include/uapi/linux/io_uring.h
IORING_REGISTER_BUFFERS2 = 15  # Linux 5.13
IORING_REGISTER_BUFFERS_UPDATE = 16
IORING_RSRC_REGISTER_SPARSE = 1  # Linux 5.19

#: Bytes of one registered buffer, at the most (the kernel allows 1 GiB), and slots of one ring.
BUFFER_MAX = 16 << 20
SLOTS = 4
#: Slots that a ring of any version of ksmd may have.
_MOST_SLOTS = 1024

_SETUP_ENTRIES = 1
_PARAMS_SIZE = 120  # struct io_uring_params


def _explain(error: OSError) -> KsmdError:
    if error.errno in (errno.ENOSYS, errno.EPERM, errno.EACCES, errno.EINVAL, errno.EOPNOTSUPP):
        return KernelFeatureError(
            f"io_uring registered buffers are not available: {error.strerror}",
            "the store cannot be pinned without them: check kernel.io_uring_disabled (sysctl), "
            "CONFIG_IO_URING, Linux 5.19, and seccomp or container filters",
        )
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return KsmdError(f"cannot make a ring: {error.strerror}", "raise LimitNOFILE= of ksmd")
    return KsmdError(
        f"cannot pin store memory: {error.strerror}",
        "raise LimitMEMLOCK= of ksmd or give it CAP_IPC_LOCK"
        if error.errno == errno.ENOMEM
        else "",
    )


def _setup() -> int:
    params = (ctypes.c_ubyte * _PARAMS_SIZE)()
    fd = libc.syscall("io_uring_setup", NR_IO_URING_SETUP, _SETUP_ENTRIES, ctypes.addressof(params))
    # struct io_uring_rsrc_register: nr, flags, resv2, data, tags
    table = ctypes.create_string_buffer(
        SLOTS.to_bytes(4, "little") + IORING_RSRC_REGISTER_SPARSE.to_bytes(4, "little"), 32
    )
    try:
        _register(fd, IORING_REGISTER_BUFFERS2, table)
    except OSError:
        os.close(fd)
        raise
    return fd


def _register(fd: int, opcode: int, argument: ctypes.Array[ctypes.c_char]) -> int:
    return libc.syscall(
        "io_uring_register",
        NR_IO_URING_REGISTER,
        fd,
        opcode,
        ctypes.addressof(argument),
        len(argument),  # for these opcodes the size of the argument
    )


def _update(fd: int, slot: int, address: int, length: int) -> None:
    vector = (ctypes.c_uint64 * 2)(address, length)
    # struct io_uring_rsrc_update2: offset, resv, data, tags, nr, resv2
    update = ctypes.create_string_buffer(
        slot.to_bytes(8, "little")
        + ctypes.addressof(vector).to_bytes(8, "little")
        + bytes(8)
        + (1).to_bytes(8, "little"),
        32,
    )
    _register(fd, IORING_REGISTER_BUFFERS_UPDATE, update)


class PinRing:
    """Pins of our own memory. Not thread-safe; one owner.

    Raises KernelFeatureError when io_uring is absent, disabled or filtered; KsmdError when memory
    or descriptors run out.
    """

    def __init__(self) -> None:
        self._free: list[tuple[int, int]] = []
        self._rings: dict[int, int] = {}  # name -> fd
        self._adopted: set[int] = set()  # fds
        self._drops = False
        self._pins: dict[int, list[tuple[int, int]]] = {}
        self._used: Counter[int] = Counter()  # fd -> slots that hold a pin
        self._next_token = 1
        self._grow()

    def __enter__(self) -> PinRing:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def fds(self) -> list[int]:
        """The rings' descriptors: while any process holds one, its pins last."""
        return list(self._rings.values())

    @property
    def named(self) -> dict[int, int]:
        """The rings' descriptors by names that no other ring will ever have."""
        return dict(self._rings)

    def slots(self, token: int) -> list[tuple[int, int]]:
        """Give (name of the ring, slot) of every part of a pin: what :meth:`adopt` needs."""
        names = {fd: name for name, fd in self._rings.items()}
        return [(names[fd], slot) for fd, slot in self._pins[token]]

    def adopt(self, rings: Mapping[int, int]) -> None:
        """Take in rings of an earlier daemon, by name; their descriptors are ours from then on."""
        self._rings |= rings
        self._adopted |= set(rings.values())

    def adopt_pin(self, slots: Iterable[tuple[int, int]]) -> int:
        """Take in one pin of adopted rings, as :meth:`slots` gave it; the token that unpins it.

        KeyError when one of its rings was not adopted.
        """
        return self._note([(self._rings[name], slot) for name, slot in slots])

    def drop_unknown(self) -> None:
        """Take off all pins of adopted rings that were not adopted, and close rings without any.

        They are of extents that an earlier daemon was giving back when it died. From now on a ring
        is closed with its last pin. Not to be called where a pin may have lost its name.
        """
        known = {slot for pin in self._pins.values() for slot in pin}
        for fd in self._adopted:
            for slot in range(_MOST_SLOTS):
                if (fd, slot) not in known:
                    try:
                        _update(fd, slot, 0, 0)
                    except OSError as error:
                        if error.errno != errno.EINVAL:  # it has no more slots
                            raise _explain(error) from error
                        break
        self._drops = True
        self._drop_empty(self._adopted)

    def _drop_empty(self, fds: Iterable[int]) -> None:
        """Close those of some rings that have no pin; one of our own stays."""
        for fd in set(fds):
            ours = fd not in self._adopted
            last = len(self._rings) - len(self._adopted) == 1
            if self._used[fd] or (last if ours else not self._drops):
                continue
            os.close(fd)
            self._adopted.discard(fd)
            self._free = [free for free in self._free if free[0] != fd]
            self._rings = {name: kept for name, kept in self._rings.items() if kept != fd}

    def close(self) -> None:
        """Take every pin off, unless another process holds the rings too."""
        for fd in self._rings.values():
            os.close(fd)
        self._adopted.clear()
        self._rings.clear()
        self._free.clear()
        self._pins.clear()
        self._used.clear()

    def _grow(self) -> None:
        try:
            fd = _setup()
        except OSError as error:
            raise _explain(error) from error
        self._rings[secrets.randbits(62)] = fd
        self._free.extend((fd, slot) for slot in reversed(range(SLOTS)))

    def pin(self, address: int, length: int) -> int:
        """Pin [address, address+length), writable memory of ours; the token that unpins it.

        Pages that are absent are made present. All of it is pinned or, on an error, nothing.
        """
        taken: list[tuple[int, int]] = []
        try:
            for start in range(address, address + length, BUFFER_MAX):
                if not self._free:
                    self._grow()
                fd, slot = self._free[-1]
                _update(fd, slot, start, min(BUFFER_MAX, address + length - start))
                taken.append(self._free.pop())
        except OSError as error:
            self._clear(taken)
            raise _explain(error) from error
        except KsmdError:
            self._clear(taken)
            raise
        return self._note(taken)

    def _note(self, slots: list[tuple[int, int]]) -> int:
        token = self._next_token
        self._next_token += 1
        self._pins[token] = slots
        self._used.update(fd for fd, _ in slots)
        return token

    def unpin(self, token: int) -> None:
        """Take the pin *token* off. KeyError when there is none."""
        slots = self._pins.pop(token)
        self._clear(slots)
        self._used.subtract(fd for fd, _ in slots)
        self._drop_empty(fd for fd, _ in slots)

    def _clear(self, slots: list[tuple[int, int]]) -> None:
        for fd, slot in slots:
            try:
                _update(fd, slot, 0, 0)
            except OSError as error:
                raise _explain(error) from error
            if fd not in self._adopted:
                self._free.append((fd, slot))
