"""The order in which messages are handled, and what becomes of contexts that end meanwhile."""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Iterator

import pytest

from ksmd.guard import watch as watch_module
from ksmd.guard.stored import Stored
from ksmd.guard.watch import Watch
from ksmd.kernel.userfaultfd import (
    EVENT_FORK,
    EVENT_PAGEFAULT,
    EVENT_REMOVE,
    Message,
)
from ksmd.model.units import PAGE_SIZE

P = PAGE_SIZE
BASE = 0x7F00_0000_0000


class Kernel:
    """Stands in for ``kernel.userfaultfd``: batches to read, and a record of the answers."""

    EVENT_FORK = EVENT_FORK
    EVENT_PAGEFAULT = EVENT_PAGEFAULT
    EVENT_REMAP = 0x14
    EVENT_REMOVE = EVENT_REMOVE

    def __init__(self) -> None:
        self.batches: dict[int, list[list[Message] | int]] = {}
        self.calls: list[tuple[str, int, int]] = []
        self.dead: set[int] = set()

    def read_messages(self, fd: int, limit: int = 16) -> list[Message]:
        batches = self.batches.get(fd, [])
        batch = batches.pop(0) if batches else []
        if isinstance(batch, int):
            raise OSError(batch, os.strerror(batch))
        return batch

    def _answer(self, name: str, fd: int, start: int, length: int) -> int:
        self.calls.append((name, start, length))
        if fd in self.dead:
            raise OSError(errno.ESRCH, "dead")
        return length

    def zeropage(self, fd: int, start: int, length: int, mode: int = 0) -> int:
        return self._answer("zeropage", fd, start, length)

    def continue_(self, fd: int, start: int, length: int, mode: int = 0) -> int:
        return self._answer("continue", fd, start, length)

    def wake(self, fd: int, start: int, length: int) -> None:
        self.calls.append(("wake", start, length))

    def wake_all(self, fd: int) -> None:
        self.calls.append(("wake_all", 0, 0))

    def is_dead(self, fd: int) -> bool:
        return fd in self.dead


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    fake = Kernel()
    monkeypatch.setattr(watch_module, "userfaultfd", fake)
    return fake


@pytest.fixture
def watch(kernel: Kernel) -> Iterator[Watch]:
    with select.epoll() as epoll:
        yield Watch(epoll, lambda: None, Stored())


def descriptor() -> int:
    """Something that epoll takes, to stand for a context; the watch closes it."""
    reader, writer = os.pipe()
    os.close(writer)
    return reader


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_a_drop_is_noted_before_any_fault_of_its_batch_is_filled(
    watch: Watch, kernel: Kernel
) -> None:
    root, child = descriptor(), descriptor()
    watch.add(root, 1, 0, [(BASE, BASE + 4 * P)])
    # what hinders filling at once: an event of the child waits
    kernel.batches[root] = [[Message(EVENT_FORK, fd=child)]]
    kernel.dead = set()
    fill = kernel.continue_
    kernel.continue_ = _again  # type: ignore[method-assign]
    watch.serve(root)
    kernel.continue_ = fill  # type: ignore[method-assign]
    kernel.calls.clear()
    kernel.batches[child] = [
        [Message(EVENT_PAGEFAULT, start=BASE), Message(EVENT_REMOVE, start=BASE, end=BASE + 2 * P)]
    ]
    watch.serve(child)
    assert ("continue", BASE, P) not in kernel.calls
    assert all(call[0] != "continue" or call[1] >= BASE + 2 * P for call in kernel.calls)
    assert kernel.calls[-1][:2] == ("zeropage", BASE)


def _again(fd: int, start: int, length: int, mode: int = 0) -> int:
    raise OSError(errno.EAGAIN, "an event waits")


def test_waiters_of_a_context_taken_over_are_woken(watch: Watch, kernel: Kernel) -> None:
    watch.add(descriptor(), 1, 0, [])
    assert kernel.calls == [("wake_all", 0, 0)]


def test_a_child_that_is_dead_by_its_first_answer_is_let_go_once(
    watch: Watch, kernel: Kernel
) -> None:
    root, child = descriptor(), descriptor()
    watch.add(root, 1, 0, [])
    kernel.batches[root] = [[Message(EVENT_FORK, fd=child)]]
    watch.serve(root)
    kernel.dead.add(child)
    kernel.batches[child] = [[Message(EVENT_PAGEFAULT, start=BASE + i * P) for i in range(3)]]
    watch.serve(child)
    assert not is_open(child)
    assert watch.live == 1
    assert watch.count.reaped == 1
    assert not watch.unannounced
    assert watch.gone == []  # the owner was never told of it
    assert not watch.busy


def test_a_closed_context_is_told_to_the_owner_that_knew_it(watch: Watch, kernel: Kernel) -> None:
    root, child = descriptor(), descriptor()
    watch.add(root, 1, 0, [])
    kernel.batches[root] = [[Message(EVENT_FORK, fd=child)]]
    watch.serve(root)
    (key,) = [context.key for context in watch.unannounced.values()]
    watch.unannounced.clear()
    kernel.dead.add(child)
    watch.sweep()
    assert watch.gone == [key]


def test_dead_targets_are_left_to_the_daemon_while_there_is_one(
    watch: Watch, kernel: Kernel
) -> None:
    root = descriptor()
    watch.add(root, 1, 0, [])
    kernel.dead.add(root)
    watch.sweep()
    assert watch.contexts == 1
    watch.sweep(roots=True)
    assert watch.contexts == watch.live == 0
    assert not is_open(root)
    watch.drop(1)  # no error


def test_a_context_that_cannot_be_read_is_tried_again_and_does_not_end_the_pager(
    watch: Watch, kernel: Kernel
) -> None:
    root, child = descriptor(), descriptor()
    watch.add(root, 1, 0, [])
    kernel.batches[root] = [errno.EMFILE, errno.EMFILE, [Message(EVENT_FORK, fd=child)]]
    watch.serve(root)
    assert watch.starving
    watch.go_on()
    assert watch.starving
    assert watch.live == 1
    watch._starving_until = 0.0
    watch.go_on()
    assert not watch.starving
    assert watch.live == 2
    assert watch.starved == 1
