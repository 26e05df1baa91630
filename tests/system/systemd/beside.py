"""Tests whose machine is their own, and which run beside the others: most of both is waiting.

A :class:`Lane` boots a machine and plays the tests of :meth:`Lane.test` on it in a thread, in their
order, from the first test of the session on. Pytest sees each as a test that waits for its end, and
fails as it did; they come last.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from inside import Lasting, installed, started, stopped

Story = Callable[..., None]
Stage = Callable[..., AbstractContextManager[Callable[[Story], None]]]

#: How long a test may take after all other tests have ended.
_PATIENCE = 240.0


class Lane:
    """*stage* gets the session's fixtures of these *names*; what it gives plays one test."""

    def __init__(self, stage: Stage, *names: str) -> None:
        self._stage = stage
        self._names = names
        self._stories: list[Story] = []
        self._ends: dict[Story, Future[None]] = {}
        self._thread: threading.Thread | None = None

    def test(self, story: Story) -> Callable[[], None]:
        """Make a test of *story*, whose parameters are the stage's."""

        def test(lanes: None) -> None:
            self._ends[story].result(_PATIENCE)

        test.__name__, test.__doc__ = story.__name__, story.__doc__
        marked: Callable[[], None] = pytest.mark.beside(self, story)(test)
        return marked

    def begin(self, request: pytest.FixtureRequest, stories: list[Story]) -> None:
        """Play *stories*, from now on."""
        self._stories = stories
        self._ends = {story: Future() for story in stories}
        given = [request.getfixturevalue(name) for name in self._names]
        self._thread = threading.Thread(target=self._play, args=given, daemon=True)
        self._thread.start()

    def end(self, seconds: float) -> None:
        """Begin no further test, and wait until the machine has ended."""
        self._stories.clear()
        if self._thread is not None:
            self._thread.join(seconds)

    def _play(self, *given: Any) -> None:
        # all in this one thread: a machine is killed with the thread that booted it
        try:
            with self._stage(*given) as play:
                for story in self._stories:
                    self._play_one(play, story)
        except BaseException as error:
            for end in self._ends.values():
                if not end.done():
                    end.set_exception(error)

    def _play_one(self, play: Callable[[Story], None], story: Story) -> None:
        try:
            play(story)
        except BaseException as error:
            self._ends[story].set_exception(error)
        else:
            self._ends[story].set_result(None)


@contextlib.contextmanager
def units_installed(tree: Path) -> Iterator[Callable[[Story], None]]:
    """A machine like that of the other tests; each test names what it wants, like their fixtures.

    ``service`` or ``running``, and ``pair``.
    """
    with installed(tree) as machine:
        lasting = Lasting(machine)

        def play(story: Story) -> None:
            named = inspect.signature(story).parameters
            begun = ("running", started) if "running" in named else ("service", stopped)
            with begun[1](machine) as made:
                given = {begun[0]: made}
                story(**given, **({"pair": lasting.pair()} if "pair" in named else {}))

        yield play
