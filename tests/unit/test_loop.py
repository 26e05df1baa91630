"""When the background scan runs: rarely where nothing happens, at once where something does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ksmd.daemon import loop as module
from ksmd.daemon.loop import Loop
from ksmd.daemon.turns import Turn, Turns


class Clock:
    """Time that passes only where the loop waits."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class World:
    """A loop whose passes take a second each, and what it is told of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = Clock()
        self.passes: list[float] = []
        self.looks: list[float] = []
        self.settled = True
        self.stirs_at: set[int] = set()
        self.calls = 0.0  # seconds that callers take, each time they are heard
        self.end = 0.0
        monkeypatch.setattr(module.time, "monotonic", self.clock.monotonic)
        self.loop = Loop(
            self._background, lambda: True, lambda: self.settled, self._stirred,
            lambda: 0.0, lambda: None, lambda _: None,
        )  # fmt: skip
        monkeypatch.setattr(self.loop, "_events", self._wait)

    def _background(self) -> Iterator[float]:
        self.passes.append(self.clock.now - 1000)
        yield 1.0

    def _stirred(self) -> bool:
        self.looks.append(self.clock.now - 1000)
        return len(self.looks) in self.stirs_at

    def _wait(self, timeout: float) -> float:
        self.clock.now += timeout + self.calls
        if self.clock.now >= self.end:
            self.loop.stop()
        return self.calls

    def run(self, seconds: float) -> list[float]:
        """Give the pauses between passes."""
        self.end = self.clock.now + seconds
        self.loop.run()
        return [
            later - earlier for earlier, later in zip(self.passes, self.passes[1:], strict=False)
        ]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    made = World(monkeypatch)
    yield made
    made.loop.close()


def test_where_nothing_is_found_passes_become_rare(world: World) -> None:
    pauses = world.run(4000)
    assert [round(pause) for pause in pauses[:7]] == [21, 41, 81, 161, 321, 641, 641]
    assert (
        max(later - earlier for earlier, later in zip(world.looks, world.looks[1:], strict=False))
        < 45
    )


def test_while_passes_find_something_they_follow_each_other(world: World) -> None:
    world.settled = False
    assert {round(pause) for pause in world.run(100)} == {2}
    assert not world.looks, "nobody has to look while passes come anyway"


def test_what_stirs_ends_the_pause_and_passes_are_frequent_again(world: World) -> None:
    world.stirs_at = {8}
    pauses = [round(pause) for pause in world.run(1000)]
    stirred = world.looks[7]
    assert any(0 <= start - stirred < 2 for start in world.passes)
    after = [pause for start, pause in zip(world.passes, pauses, strict=False) if start >= stirred]
    assert after[:3] == [21, 41, 81]


@pytest.mark.parametrize("calls", [0.02, 0.5, 3.0])
def test_callers_without_end_leave_half_of_the_time_to_the_work(world: World, calls: float) -> None:
    """A step of the work takes 10 ms here, and there is always one more to do."""
    worked = 0.0

    def steps() -> Iterator[float]:
        nonlocal worked
        while True:
            world.clock.now += 0.01
            worked += 0.01
            yield 0.0

    world.calls = calls
    world.loop.turns = Turns(world.clock.monotonic)
    world.loop.turns.add(Turn("give back", steps(), lambda _: None, lambda _: None), urgent=True)
    world.run(300)
    assert worked >= 150
