"""Whether a target may be stopped, by what became of earlier windows and what was asked for."""

from __future__ import annotations

from typing import Any

import pytest

from ksmd.daemon.state import PASSING, Target
from ksmd.model.refusal import Reason

NOTHING: Any = None


@pytest.fixture
def target() -> Target:
    return Target(1, NOTHING, NOTHING, NOTHING)


def may(target: Target, now: float = 1000.0, *, asked: bool = False) -> bool:
    return target.may_stop(now, 10.0, asked)


def test_a_refusal_that_may_pass_is_tried_again_after_growing_pauses(target):
    assert may(target)
    target.refuse(Reason.TRACED, "", 1000.0)
    assert not may(target, 1004.9)
    assert may(target, 1005.0)
    assert may(target, 1000.0, asked=True)
    target.refuse(Reason.TRACED, "", 1005.0)
    assert not may(target, 1014.9)
    assert may(target, 1015.0)
    target.accepted()
    assert target.left_alone is None
    assert may(target, 1005.0)


@pytest.mark.parametrize("reason", sorted(set(Reason) - PASSING))
def test_any_other_refusal_is_for_good(target, reason):
    target.refuse(reason, "", 0.0)
    target.accepted()
    assert not may(target, 1e9, asked=True)
    assert target.left_alone is reason


@pytest.mark.parametrize("reason", sorted(PASSING))
def test_a_release_outlasts_what_hinders_its_own_windows(target, reason):
    told = []
    target.tell = lambda kind, _target, **more: told.append((kind, more.get("reason")))
    target.release()
    assert told == [("refused", "released")]
    target.refuse(reason, "in the way", 1000.0)
    target.accepted()
    assert target.left_alone is Reason.RELEASED
    assert not may(target, 1e9, asked=True)
    target.released = False
    assert may(target, 1e9)
