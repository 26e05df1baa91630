"""Work in turns, the allowance of users, the one plan at a time, and the log that stays short."""

from __future__ import annotations

import logging

import pytest

from ksmd.daemon.allowance import BURST_SECS, SHARE, Allowance
from ksmd.daemon.exclusive import Exclusive
from ksmd.daemon.quiet import Quiet
from ksmd.daemon.turns import Turn, Turns
from ksmd.model.errors import KsmdError


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def turns(clock):
    return Turns(clock)


def counting(name: str, said: list[str], *steps):
    for step in steps:
        said.append(name)
        yield step


def turn(name, steps, *, results=None, errors=None, wanted=lambda: True) -> Turn:
    got = [] if results is None else results
    bad = [] if errors is None else errors
    return Turn(name, steps, got.append, bad.append, wanted)


# -- turns -----------------------------------------------------------------------------------------


def test_everybody_gets_a_step_before_anybody_gets_another(turns):
    said: list[str] = []
    for name in "abc":
        turns.add(turn(name, counting(name, said, 0.0, 0.0)))
    for _ in range(9):
        turns.step()
    assert "".join(said) == "abcabc"
    assert len(turns) == 0


def test_urgent_work_goes_first(turns):
    said: list[str] = []
    turns.add(turn("slow", counting("s", said, *[0.0] * 5)))
    turns.step()
    turns.add(turn("now", counting("u", said, 0.0, 0.0)), urgent=True)
    for _ in range(4):
        turns.step()
    assert "".join(said) == "suus"  # the third look at the urgent work finds that it has ended


def test_work_that_waits_is_not_stepped_before_its_time_and_holds_up_nobody(turns, clock):
    said: list[str] = []
    turns.add(turn("waits", counting("w", said, 5.0, 0.0)), urgent=True)
    turns.add(turn("works", counting("x", said, 0.0, 0.0, 0.0)))
    for _ in range(3):
        turns.step()
    assert "".join(said) == "wxx"
    turns.step()
    turns.step()
    assert turns.due() == clock.now + 5.0
    clock.now += 5.0
    turns.step()
    assert "".join(said) == "wxxxw"


def test_without_work_nothing_is_due(turns):
    assert turns.due() == float("inf")
    turns.step()


def test_what_is_no_number_of_seconds_is_the_result(turns):
    results: list = []
    turns.add(turn("r", iter([0.0, {"merged": 3}]), results=results))
    turns.step()
    turns.step()
    assert results == [{"merged": 3}]


def test_a_failure_is_told_to_who_asked_and_ends_that_work_alone(turns, caplog):
    errors: list[KsmdError] = []
    said: list[str] = []

    def fails(error):
        raise error
        yield

    turns.add(turn("known", fails(KsmdError("so it is")), errors=errors))
    turns.add(turn("defect", fails(ZeroDivisionError("oh")), errors=errors))
    turns.add(turn("other", counting("o", said, 0.0)))
    with caplog.at_level(logging.ERROR):
        for _ in range(4):
            turns.step()
    assert str(errors[0]) == "so it is"
    assert "defect" in str(errors[1])
    assert said == ["o"]
    assert "ZeroDivisionError" in caplog.text


def test_work_that_nobody_wants_any_more_is_given_up_and_cleans_up(turns):
    cleaned: list[str] = []
    wanted = [True]

    def steps():
        try:
            while True:
                yield 0.0
        finally:
            cleaned.append("yes")

    turns.add(turn("w", steps(), wanted=lambda: wanted[0]))
    turns.step()
    wanted[0] = False
    turns.step()
    assert (cleaned, len(turns)) == (["yes"], 0)


def test_giving_up_tells_everybody(turns):
    errors: list[KsmdError] = []
    turns.add(turn("a", iter([0.0]), errors=errors))
    turns.add(turn("b", iter([0.0]), errors=errors), urgent=True)
    turns.give_up(KsmdError("stopping"))
    assert [str(error) for error in errors] == ["stopping", "stopping"]
    assert len(turns) == 0


# -- allowance -------------------------------------------------------------------------------------


def test_who_asked_for_nothing_has_the_whole_burst_and_root_is_never_held_back(clock):
    allowance = Allowance(clock)
    assert (allowance.left(1000), allowance.wait(1000)) == (BURST_SECS, 0.0)
    allowance.charge(0, 1e6)
    assert allowance.wait(0) == 0.0


def test_what_was_used_comes_back_with_time_and_users_do_not_pay_for_each_other(clock):
    allowance = Allowance(clock)
    allowance.charge(1000, BURST_SECS + 1.0)
    assert allowance.left(1000) == -1.0
    assert allowance.wait(1000) > 0
    assert allowance.wait(1001) == 0.0
    clock.now += 1.0 / SHARE
    assert allowance.left(1000) == pytest.approx(0.0)
    clock.now += 1000 / SHARE
    assert allowance.left(1000) == BURST_SECS


def test_paced_work_waits_when_its_user_has_nothing_left_and_goes_on_later(clock):
    allowance = Allowance(clock)

    def work():
        for _ in range(3):
            clock.now += BURST_SECS
            yield "step"

    steps = allowance.pacing(1000, work())
    assert next(steps) == "step"
    waited = 0.0
    for step in steps:
        if isinstance(step, float):
            assert step > 0
            clock.now += step
            waited += step
    assert waited > BURST_SECS
    assert allowance.left(1000) <= BURST_SECS


def test_charged_work_is_paid_for_and_never_delayed(clock):
    allowance = Allowance(clock)

    def work():
        for _ in range(5):
            clock.now += BURST_SECS
            yield 1

    assert list(allowance.charging(1000, work())) == [1] * 5
    assert allowance.left(1000) < 0


def test_users_who_are_well_off_are_forgotten(clock):
    allowance = Allowance(clock)
    for uid in range(1, 1500):
        allowance.charge(uid, 0.001)
        clock.now += 1
    assert len(allowance._levels) <= 1024


# -- one plan at a time ----------------------------------------------------------------------------


def test_who_comes_second_waits_until_the_first_is_done():
    lock = Exclusive()
    first, second = lock.holding(iter("ab")), lock.holding(iter("xy"))
    assert next(first) == "a"
    assert lock.waiting == 0
    assert isinstance(next(second), float)
    assert lock.waiting == 1
    assert next(first) == "b"
    assert isinstance(next(second), float)
    assert next(first, None) is None
    assert list(second) == ["x", "y"]
    assert (lock.taken, lock.waiting) == (False, 0)


def test_work_that_is_dropped_lets_go():
    lock = Exclusive()
    first = lock.holding(iter("ab"))
    next(first)
    first.close()
    assert list(lock.holding(iter("x"))) == ["x"]


# -- the log ---------------------------------------------------------------------------------------


def test_each_kind_is_said_once_for_each_user(caplog):
    quiet = Quiet(logging.getLogger("ksmd.test"))
    with caplog.at_level(logging.INFO, "ksmd.test"):
        for _ in range(10):
            for uid in (1, 2):
                quiet.info("stalled", uid, "pid %d stalled", 7)
            quiet.info("malformed", 1, "pid %d", 7)
    assert [record.getMessage() for record in caplog.records] == [
        "uid 1: pid 7 stalled (said once)",
        "uid 2: pid 7 stalled (said once)",
        "uid 1: pid 7 (said once)",
    ]


def test_a_log_of_many_kinds_takes_bounded_memory():
    quiet = Quiet(logging.getLogger("ksmd.test"))
    for number in range(5000):
        quiet.info(f"kind {number}", 1, "x")
    assert len(quiet._said) <= 1024
