"""A context's answers, against a kernel that says exactly what the test lets it say."""

from __future__ import annotations

import errno
from collections import deque

import pytest

from ksmd.guard.context import BULK_PAGES, DROPS, Answer, Context, Counters, State
from ksmd.model.units import HUGE_PAGE_SIZE, PAGE_SIZE

P = PAGE_SIZE
BASE = 0x7F00_0000_0000
Call = tuple[str, int, int]


class Script:
    """Requests that record their arguments and answer with bytes done or with an errno."""

    def __init__(self, *results: int | None) -> None:
        self.calls: list[Call] = []
        self._results = deque(results)

    def _next(self, name: str, start: int, length: int) -> int:
        self.calls.append((name, start, length))
        result = self._results.popleft() if self._results else None
        if result is not None and result < 0:
            raise OSError(-result, "scripted")
        return length if result is None else result

    def zeropage(self, fd: int, start: int, length: int, mode: int = 0) -> int:
        return self._next("zeropage", start, length)

    def continue_(self, fd: int, start: int, length: int, mode: int = 0) -> int:
        return self._next("continue", start, length)

    def wake(self, fd: int, start: int, length: int) -> None:
        self.calls.append(("wake", start, length))


@pytest.fixture
def root() -> Context:
    return Context(3, 1, 0, Counters())


def child_of(root: Context, *ranges: tuple[int, int]) -> Context:
    for start, end in ranges:
        root.extend(start, end)
    return root.fork(4, 1)


def test_a_fault_of_a_target_is_answered_with_zeros(root: Context) -> None:
    root.extend(BASE, BASE + 4 * P)
    kernel = Script()
    assert root.fault(kernel, BASE + P + 123) is Answer.DONE
    assert kernel.calls == [("zeropage", BASE + P, P)]


def test_a_page_that_is_there_only_wakes_its_waiter(root: Context) -> None:
    kernel = Script(-errno.EEXIST)
    assert root.fault(kernel, BASE) is Answer.DONE
    assert kernel.calls[-1] == ("wake", BASE, P)


def test_an_unmapped_page_wakes_its_waiter_to_find_out(root: Context) -> None:
    kernel = Script(-errno.ENOENT)
    assert root.fault(kernel, BASE) is Answer.DONE
    assert kernel.calls[-1] == ("wake", BASE, P)


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.ENOMEM, errno.EIO])
def test_whatever_else_fails_leaves_the_thread_waiting_and_is_tried_again(
    root: Context, code: int
) -> None:
    kernel = Script(-code)
    assert root.fault(kernel, BASE + 5) is Answer.AGAIN
    assert root.waiting == {BASE}
    assert [c[0] for c in kernel.calls] == ["zeropage"]
    assert root.fault(Script(), BASE) is Answer.DONE
    assert not root.waiting


def test_a_dead_address_space_is_told(root: Context) -> None:
    assert root.fault(Script(-errno.ESRCH), BASE) is Answer.GONE
    assert not root.waiting


def test_the_rest_of_a_drop_is_answered_with_its_first_fault(root: Context) -> None:
    root.on_remove(BASE, BASE + 10 * P)
    kernel = Script()
    root.fault(kernel, BASE + 3 * P)
    assert kernel.calls == [("zeropage", BASE + 3 * P, 7 * P)]


def test_bulk_answers_are_bounded(root: Context) -> None:
    root.on_remove(BASE, BASE + (1 << 30))
    kernel = Script()
    root.fault(kernel, BASE)
    assert kernel.calls == [("zeropage", BASE, BULK_PAGES * P)]
    for index in range(100):
        root.on_remove(BASE + index * P, BASE + (index + 1) * P)
    assert len(root.drops) == DROPS


def test_a_drop_that_reaches_past_the_vma_is_answered_by_one_page(root: Context) -> None:
    root.on_remove(BASE, BASE + 10 * P)
    kernel = Script(-errno.ENOENT)
    assert root.fault(kernel, BASE) is Answer.DONE
    assert kernel.calls == [("zeropage", BASE, 10 * P), ("zeropage", BASE, P)]


def test_a_drop_is_forgotten_where_memory_is_merged_anew(root: Context) -> None:
    root.on_remove(BASE, BASE + 10 * P)
    root.extend(BASE + 5 * P, BASE + 6 * P)
    kernel = Script()
    root.fault(kernel, BASE)
    assert kernel.calls == [("zeropage", BASE, P)]


def test_a_child_is_filled_before_its_faults_mean_zeros(root: Context) -> None:
    child = child_of(root, (BASE, BASE + 4 * P))
    assert child.state is State.FILL
    kernel = Script(None, -errno.EEXIST)
    assert child.fault(kernel, BASE + 2 * P) is Answer.DONE
    assert kernel.calls == [
        ("continue", BASE, 4 * P),
        ("zeropage", BASE + 2 * P, P),
        ("wake", BASE + 2 * P, P),
    ]
    assert child.state is State.ZERO


def test_a_settled_range_owes_a_child_nothing(root: Context) -> None:
    root.extend(BASE, BASE + 4 * P)
    root.settle(BASE, BASE + 4 * P)
    assert root.fork(4, 1).state is State.ZERO


def test_a_target_itself_is_never_filled(root: Context) -> None:
    root.extend(BASE, BASE + 4 * P)
    assert root.state is State.ZERO


def test_a_dropped_range_is_not_filled_in_a_child(root: Context) -> None:
    root.extend(BASE, BASE + 8 * P)
    root.on_remove(BASE + 2 * P, BASE + 4 * P)
    child = root.fork(4, 1)
    child.on_remove(BASE + 6 * P, BASE + 8 * P)
    kernel = Script()
    assert child.fill(kernel, 10) is Answer.DONE
    assert kernel.calls == [("continue", BASE, 2 * P), ("continue", BASE + 4 * P, 2 * P)]


def test_a_moved_range_is_filled_at_its_new_place(root: Context) -> None:
    child = child_of(root, (BASE, BASE + 2 * P))
    child.on_remap(BASE, BASE + 2 * P, BASE + 100 * P)
    kernel = Script()
    assert child.fill(kernel, 10) is Answer.DONE
    assert kernel.calls == [("continue", BASE + 100 * P, 2 * P)]


def test_nested_forks_inherit_what_is_owed(root: Context) -> None:
    child = child_of(root, (BASE, BASE + 4 * P))
    child.on_remove(BASE, BASE + P)
    grandchild = child.fork(5, 2)
    assert list(grandchild.owed) == [(BASE + P, BASE + 4 * P)]
    assert grandchild.target == root.target
    child.fill(Script(), 10)
    assert not child.owed
    assert grandchild.state is State.FILL


def test_a_page_that_fork_copied_vouches_for_its_piece_and_no_further(root: Context) -> None:
    child = child_of(root, (BASE, BASE + 2 * HUGE_PAGE_SIZE))
    kernel = Script(-errno.EEXIST, -errno.EEXIST)
    assert child.fill(kernel, 10) is Answer.DONE
    assert kernel.calls == [
        ("continue", BASE, HUGE_PAGE_SIZE),
        ("continue", BASE + HUGE_PAGE_SIZE, HUGE_PAGE_SIZE),
    ]


def test_filling_stops_at_an_event_and_goes_on_after_it(root: Context) -> None:
    child = child_of(root, (BASE, BASE + 4 * P))
    assert child.fill(Script(2 * P, -errno.EAGAIN), 10) is Answer.AGAIN
    child.on_remove(BASE + 2 * P, BASE + 3 * P)
    kernel = Script()
    assert child.fill(kernel, 10) is Answer.DONE
    assert kernel.calls == [("continue", BASE + 3 * P, P)]


def test_a_fault_is_not_answered_with_zeros_while_filling_cannot_go_on(root: Context) -> None:
    child = child_of(root, (BASE, BASE + 4 * P))
    kernel = Script(-errno.EAGAIN)
    assert child.fault(kernel, BASE) is Answer.AGAIN
    assert [c[0] for c in kernel.calls] == ["continue"]
    assert child.waiting == {BASE}


def test_filling_is_bounded_and_says_so(root: Context) -> None:
    child = child_of(root, (BASE, BASE + 8 * HUGE_PAGE_SIZE))
    kernel = Script()
    assert child.fill(kernel, 3) is Answer.MORE
    assert len(kernel.calls) == 3
    assert child.fill(Script(-errno.ESRCH), 3) is Answer.GONE


def test_a_hole_of_the_store_and_memory_never_merged_are_passed_over(root: Context) -> None:
    child = child_of(root, (BASE, BASE + P), (BASE + 2 * P, BASE + 3 * P))
    kernel = Script(-errno.EFAULT, -errno.ENOENT)
    assert child.fill(kernel, 10) is Answer.DONE
    assert child.state is State.ZERO
