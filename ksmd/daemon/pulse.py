"""Whether a target has run of late: asked of the kernel once in a pass, not by each who wants it.

An idle pass is made of such questions, some ten microseconds each. What was asked at the beginning
of a pass is as good as what could be asked a moment later: who has run in between has spent more,
which the next pass sees.
"""

from __future__ import annotations

import time

from ksmd.daemon.state import Target
from ksmd.kernel import procfs
from ksmd.model.errors import TargetGoneError
from ksmd.model.process import ProcessInfo

#: Seconds for which an answer counts: a short pass takes no longer.
_LASTS = 1.0
#: Seconds for which a process that has not run is taken to be what it was: others may move it to
#: another cgroup.
_INFO_LASTS = 10.0


def feel(target: Target) -> bool:
    """Ask anew; whether the target is still the process that it was."""
    target.felt_at = 0.0
    try:
        start_time, target.pulse = procfs.pulse(target.pid)
    except TargetGoneError:
        return False
    if start_time != target.id.start_time:
        return False
    target.felt_at = time.monotonic()
    return True


def spent(target: Target) -> tuple[int, ...]:
    """Tell what *target* has spent (procfs.spent), or had a moment ago. TargetGoneError."""
    if time.monotonic() < target.felt_at + _LASTS:
        return target.pulse
    return procfs.spent(target.pid)


def has_stood_still(target: Target, since: tuple[int, ...]) -> bool:
    """Whether *target* has not run since it had spent *since* in all; () is never."""
    try:
        return bool(since) and spent(target) == since
    except TargetGoneError:
        return False


def info(target: Target) -> ProcessInfo:
    """Describe a target for selection, as before where it has not run. TargetGoneError."""
    known, now = target.info, time.monotonic()
    still = feel(target) and target.pulse == target.info_spent
    if known is not None and still and now < target.info_until:
        return known
    target.info = procfs.process_info(target.pid)
    target.info_spent, target.info_until = target.pulse, now + _INFO_LASTS
    return target.info


def forget(target: Target) -> None:
    """Take what was asked for old: a stop window has made it run."""
    target.felt_at = 0.0
