"""The CPU budget: whatever the steps cost, no ten seconds take more than was promised."""

from __future__ import annotations

import random

import pytest

from ksmd.core.budget import CpuBudget, step_pages


def work(percent: int, cost, seconds: float) -> list[tuple[float, float]]:
    """Run steps that take *cost(n)* CPU seconds each: (when it began, what it used) of each."""
    budget, now, used, found = CpuBudget(), 100.0, {1: 5.0, 2: 1.0}, []
    budget.wait(percent, now, used)
    while now < 100 + seconds:
        spent = cost(len(found))
        found.append((now, spent))
        used = {1: used[1] + spent * 0.75, 2: used[2] + spent * 0.25}
        now += spent
        now += budget.wait(percent, now, used)
    return found


def most_in_ten_seconds(steps: list[tuple[float, float]]) -> float:
    return max(sum(spent for at, spent in steps if begin <= at < begin + 10) for begin, _ in steps)


@pytest.mark.parametrize("percent", [5, 20, 50])
def test_no_ten_seconds_take_more_than_was_promised(percent: int) -> None:
    source = random.Random(percent)
    steps = work(percent, lambda _: source.uniform(0.0005, percent / 2000), 120)
    assert most_in_ten_seconds(steps) <= percent / 100 * 10
    used = sum(spent for _, spent in steps)
    assert used > 0.8 * percent / 100 * 120, "the budget is not used"


def test_what_was_not_used_is_not_saved_up() -> None:
    steps = work(10, lambda n: 0.0001 if n < 3000 else 0.01, 60)
    late = [step for step in steps if step[1] == 0.01]
    assert late
    assert most_in_ten_seconds(late) <= 1.0


def test_without_a_limit_nothing_waits() -> None:
    budget = CpuBudget()
    assert [budget.wait(0, now, {1: now * 1.0}) for now in range(5)] == [0.0] * 5


def test_a_process_that_is_replaced_begins_anew() -> None:
    budget = CpuBudget()
    budget.wait(50, 10.0, {1: 100.0, 2: 50.0})
    assert budget.wait(50, 11.0, {1: 100.0, 3: 0.0}) == 0.0


def test_small_budgets_have_small_steps() -> None:
    assert step_pages(25000, 0) == 25000
    assert step_pages(25000, 5) == 5000
    assert step_pages(25000, 100) == 25000
    assert 0 < step_pages(25000, 1) < 25000
