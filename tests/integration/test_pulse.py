"""What was asked of a process once counts for a moment, and never hides that it has run."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from kernel_victims import Victim

from ksmd.core.selection import Selected
from ksmd.daemon import pulse
from ksmd.daemon.state import Target
from ksmd.kernel import procfs
from ksmd.kernel.memory import Memory
from ksmd.kernel.pagemap import PageMap
from ksmd.model.errors import TargetGoneError
from ksmd.model.process import TargetId

pytestmark = pytest.mark.root


@pytest.fixture
def victim() -> Iterator[Victim]:
    with Victim() as one:
        yield one


@pytest.fixture
def target(victim: Victim) -> Iterator[Target]:
    selected = Selected(procfs.process_info(victim.pid), "v", "d", "anon", False)
    with Memory(victim.pid) as memory, PageMap(victim.pid) as pagemap:
        yield Target(1, selected, memory, pagemap)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The pids that were described anew."""
    pids: list[int] = []
    describe = procfs.process_info

    def describing(pid: int) -> object:
        pids.append(pid)
        return describe(pid)

    monkeypatch.setattr(procfs, "process_info", describing)
    return pids


def settle(victim: Victim) -> None:
    before = None
    while (now := procfs.spent(victim.pid)) != before:
        before = now
        time.sleep(0.1)


def test_who_has_not_run_is_described_as_before_for_a_while(
    victim: Victim, target: Target, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(victim)
    first = pulse.info(target)
    assert pulse.info(target) is first
    assert asked == [victim.pid]
    victim.ask("libc.prctl(15, b'renamed', 0, 0, 0)")
    settle(victim)
    assert pulse.info(target).comm == "renamed"
    assert asked == [victim.pid] * 2
    monkeypatch.setattr(pulse, "_INFO_LASTS", -1.0)
    target.info_until = 0.0
    pulse.info(target)
    pulse.info(target)
    assert asked == [victim.pid] * 4, "others may have moved it"


def test_a_moment_ago_is_good_enough_and_a_window_makes_it_old(
    victim: Victim, target: Target
) -> None:
    settle(victim)
    assert pulse.feel(target)
    before = pulse.spent(target)
    assert pulse.has_stood_still(target, before)
    assert not pulse.has_stood_still(target, ()), "never asked before"
    victim.ask("sum(range(1000000))")
    assert pulse.spent(target) == before, "as it was at the beginning of the pass"
    pulse.forget(target)
    assert pulse.spent(target) != before
    assert not pulse.has_stood_still(target, before)
    target.felt_at = time.monotonic() - pulse._LASTS
    assert pulse.spent(target) != before, "old by itself"


def test_another_process_of_that_pid_is_another_and_none_is_gone(
    victim: Victim, target: Target
) -> None:
    info = target.selected.process
    other = TargetId(info.id.pid, info.id.start_time - 1)
    object.__setattr__(info, "id", other)
    assert not pulse.feel(target)
    assert target.felt_at == 0.0, "so that the caller asks who it is"
    victim.process.kill()
    victim.process.wait()
    assert not pulse.feel(target)
    with pytest.raises(TargetGoneError):
        pulse.spent(target)
    with pytest.raises(TargetGoneError):
        pulse.info(target)
    assert not pulse.has_stood_still(target, (1, 2, 3))
