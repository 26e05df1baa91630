"""Where a window finds room and code in a target: gadgets, the anchor, scratch memory."""

from __future__ import annotations

import contextlib
import os
import struct
from dataclasses import dataclass
from typing import Final

from ksmd.kernel import procfs
from ksmd.kernel.memory import Memory
from ksmd.kernel.vmaquery import VmaQuery
from ksmd.model.errors import KsmdError
from ksmd.model.process import TargetId
from ksmd.model.refusal import Reason
from ksmd.model.units import PAGE_SIZE
from ksmd.model.vma import Vma
from ksmd.remap import frame, gadgets
from ksmd.remap.frame import Anchor, Gadgets
from ksmd.remap.stop import RefusedError, Stopped, forget_calls

#: Fixed and unusual, so that a left-over can be told; tried in steps where a program is there.
SCRATCH: Final = 0x3FF000000000
SCRATCH_STEP: Final = 16 << 20
SCRATCH_TRIES: Final = 4
_PM_IN_USE: Final = 3 << 62  # present or swapped
_STACK_DEPTH_KEPT: Final = 64 << 10


@dataclass(slots=True)
class _Places:
    """What a target's earlier window found. ``laid``: frames of ours have been seen there."""

    gadgets: Gadgets
    stack_end: int
    laid: bool = False


_remembered: dict[int, _Places] = {}


def forget(pid: int) -> None:
    """Drop what is remembered of a process that is gone."""
    _remembered.pop(pid, None)
    forget_calls(pid)


def look_ahead(target: TargetId) -> None:
    """Search while the target runs yet, for :func:`find` to have it; what hinders is met again."""
    if target.pid in _remembered or not procfs.is_same(target):
        return
    with (
        contextlib.suppress(KsmdError, RefusedError),
        Memory(target.pid) as memory,
        VmaQuery(target.pid, memory.tid) as query,
    ):
        find(memory, query)


def find(memory: Memory, query: VmaQuery) -> tuple[Gadgets, Vma]:
    """Give the gadgets and the main stack: remembered from an earlier window, or searched.

    Reading all of maps takes milliseconds where there are many mappings; asking for a few does
    not. What is remembered is checked, since execve changes all of it.
    """
    known = _remembered.get(memory.pid)
    if known is not None:
        stack = query.covering(known.stack_end - 1)
        same = stack is not None and stack.end == known.stack_end and not stack.inode
        if same and stack and gadgets.still_there(memory, query, known.gadgets):
            return known.gadgets, stack
    found = gadgets.find(memory, query.files(executable=True))
    if found is None:
        raise RefusedError(Reason.NO_GADGET)
    main = query.covering(procfs.stack_start(memory.pid, memory.tid))
    if main is None or main.inode:
        raise RefusedError(Reason.NO_ANCHOR, "no main stack")
    _remembered[memory.pid] = _Places(found, main.end)
    return found, main


def find_anchor(
    stopped: Stopped, memory: Memory, stack: Vma, xstate: int, found: Gadgets
) -> Anchor:
    """Find room for the frames at the far end of the main stack.

    Memory far below the stack pointer is free by the ABI. Where the main thread runs on another
    stack (coroutines) or has exited, only a page that nobody touched will do, or our own.
    """
    length = frame.pages_needed(xstate) * PAGE_SIZE
    if length > stack.end - stack.start:
        raise RefusedError(Reason.NO_ANCHOR, "the main stack is too small")
    leader = stopped.threads.get(stopped.pid)
    depth = leader.registers.field("rsp") - stack.start if leader is not None else -1
    if 0 <= depth < length + _STACK_DEPTH_KEPT:
        raise RefusedError(Reason.NO_ANCHOR, "the main stack is used down to its end")
    known = _remembered[memory.pid]
    # to look is quicker than to ask, but touches what nobody has touched
    if not known.laid and not _touched(memory, stack.start, length // PAGE_SIZE):
        return Anchor(stack.start, length // PAGE_SIZE, None)
    content = memory.read(stack.start, length)
    known.laid = frame.is_ours(content, found)
    if known.laid:
        return Anchor(stack.start, length // PAGE_SIZE, None)
    if not 0 <= depth < stack.end - stack.start:
        raise RefusedError(Reason.NO_ANCHOR, "the end of the main stack is in use")
    return Anchor(stack.start, length // PAGE_SIZE, content)


def _touched(memory: Memory, address: int, npages: int) -> bool:
    fd = os.open(procfs.task_path(memory.pid, "pagemap", memory.tid), os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = os.pread(fd, npages * 8, address // PAGE_SIZE * 8)
    finally:
        os.close(fd)
    return any(entry & _PM_IN_USE for (entry,) in struct.iter_unpack("=Q", data))


def refuse_stale_stub(stopped: Stopped, anchor: Anchor) -> None:
    """An earlier tracer's stub on its way home still needs its frame.

    It may be in a signal handler then, whose frames lie at that end of the main stack too.
    """
    top = anchor.address + anchor.npages * PAGE_SIZE + _STACK_DEPTH_KEPT
    for thread in stopped.threads.values():
        rip, rsp = thread.registers.field("rip"), thread.registers.field("rsp")
        in_scratch = SCRATCH <= rip < SCRATCH + SCRATCH_TRIES * SCRATCH_STEP
        if in_scratch or anchor.address <= rsp < top:
            raise RefusedError(Reason.STALE_STUB)
