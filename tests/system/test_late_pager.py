"""A pager that stands by itself and comes back late: the daemon moves over to it all the same."""

# ruff: noqa: F401, F811  (fixtures are imported by their names)

from __future__ import annotations

import pytest
from harness import settings_for, until
from test_kills import manager
from test_restart import check_all, lives, pair, shared

from ksmd.guard import door

pytestmark = pytest.mark.root


def test_a_daemon_that_helped_itself_moves_over_to_the_pager_that_comes_after_all(
    manager, pair, lives
):
    daemon = lives.start(settings_for(*pair))
    daemon.scan()
    first = lives.pager().pid
    merged = shared(*pair)
    assert merged[0] > 0
    manager.kill()
    until(lambda: door.pagers(manager.name) not in ([], [first]), "a pager of its own")
    (own,) = door.pagers(manager.name)
    assert door.standing(manager.name) == []
    late = manager.start()
    until(lambda: door.pagers(manager.name) == [late], "the pager that came late, alone")
    assert own != late
    assert shared(*pair) == merged
    daemon.give_back()
    check_all(pair)
    assert shared(*pair)[1] == 0
