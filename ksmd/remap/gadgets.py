"""The two pieces of the target's own code that a window borrows.

Only executable, unwritable file mappings are searched: code that a compiler in the process may
rewrite is none to return to. The offsets are remembered per file, so that a second target that runs
the same libc costs nothing. The C library is looked at first: it has both, and a program may map a
hundred MiB of other code, at a millisecond each.
"""

from __future__ import annotations

from collections.abc import Iterable

from ksmd.kernel.memory import Memory
from ksmd.kernel.vmaquery import VmaQuery
from ksmd.model.vma import Vma
from ksmd.remap.frame import Gadgets

_SYSCALL_RET = b"\x0f\x05\xc3"
#: mov $15,%rax; syscall (glibc, Go) and mov $15,%eax; syscall (musl): rt_sigreturn
_RESTORERS = (b"\x48\xc7\xc0\x0f\x00\x00\x00\x0f\x05", b"\xb8\x0f\x00\x00\x00\x0f\x05")
_LARGEST = 64 << 20
_PIECE = 64 << 10
_OVERLAP = 16

_Key = tuple[tuple[int, int], int, int, int]
_cache: dict[_Key, tuple[int, int]] = {}


def _offsets(memory: Memory, vma: Vma) -> tuple[int, int]:
    """Offsets in *vma* of both gadgets, -1 where one is missing."""
    key = (vma.device, vma.inode, vma.offset, vma.end - vma.start)
    if key not in _cache:
        _cache[key] = _search(memory, vma.start, min(vma.end - vma.start, _LARGEST))
    return _cache[key]


def _search(memory: Memory, start: int, length: int) -> tuple[int, int]:
    """Search in pieces that overlap by more than a pattern: this process stays small."""
    syscall_ret = restorer = -1
    for at in range(0, length, _PIECE):
        text = memory.read(start + at, min(_PIECE + _OVERLAP, length - at))
        if syscall_ret < 0 <= (found := text.find(_SYSCALL_RET)):
            syscall_ret = at + found
        for pattern in _RESTORERS:
            if restorer < 0 <= (found := text.find(pattern)):
                restorer = at + found
        if syscall_ret >= 0 and restorer >= 0:
            break
    return syscall_ret, restorer


def find(memory: Memory, vmas: Iterable[Vma]) -> Gadgets | None:
    """Find both gadgets in the mappings of a target; None when one of them is missing."""
    syscall_ret = restorer = -1
    for vma in sorted(vmas, key=lambda vma: not _is_libc(vma.path)):
        if vma.perms != "r-xp" or not vma.inode:
            continue
        first, second = _offsets(memory, vma)
        if syscall_ret < 0 <= first:
            syscall_ret = vma.start + first
        if restorer < 0 <= second:
            restorer = vma.start + second
        if syscall_ret >= 0 and restorer >= 0:
            return Gadgets(syscall_ret, restorer)
    return None


def _is_libc(path: str) -> bool:
    return path.rpartition("/")[2].startswith(("libc.so", "libc-2", "libc.musl", "ld-musl"))


def still_there(memory: Memory, query: VmaQuery, found: Gadgets) -> bool:
    """Whether both gadgets are where they were, in code that nobody can write."""
    for address, patterns in ((found.syscall_ret, (_SYSCALL_RET,)), (found.restorer, _RESTORERS)):
        vma = query.covering(address)
        if vma is None or vma.perms != "r-xp" or not vma.inode:
            return False
        if not memory.read(address, max(map(len, patterns))).startswith(patterns):
            return False
    return True
