"""The thread's settings, from the file or from KSM_START_STOP_KTHREAD, and which of them is which.

What a caller sets holds until the daemon restarts or reads its file again. The settings in force
are always a whole :class:`~ksmd.settings.Settings`, so that nothing else has to know of this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from ksmd.daemon.connection import CallError
from ksmd.settings.values import Settings

#: Flags of StartStopThread: the patch's ksm_control_flags_run, and KSM's "run = 2".
FLAG_RUN = 1
FLAG_UNMERGE = 2
EPERM = 1
_UINT_MAX = 2**32 - 1
_SOURCE = "StartStopThread"
_RUN: dict[int, Literal["stop", "merge", "unmerge"]] = {
    0: "stop",
    FLAG_RUN: "merge",
    FLAG_UNMERGE: "unmerge",
}


@dataclass(frozen=True, slots=True)
class ThreadInfo:
    """The patch's ksm_kthread_info: ``sleep`` in microseconds, counts in pages."""

    sleep: int
    pages_to_scan: int
    max_pages_to_merge: int
    flags: int


#: Settings of ``scan`` that StartStopThread gives.
_SET_BY_CALL = ("pages_to_scan", "sleep_millisecs", "max_pages_to_merge")


@dataclass(slots=True)
class Tuning:
    """``base``: what the file says; ``origins``: "file:line" by path, for what the file gives."""

    base: Settings
    origins: Mapping[tuple[str | int, ...], str] = field(default_factory=dict)
    given: ThreadInfo | None = None

    def start_stop(self, info: ThreadInfo) -> None:
        """Take what a caller gives. ZeroCounts, as the patch: nothing could ever be scanned."""
        _check(info)
        if info.flags & FLAG_RUN and not (info.pages_to_scan and info.max_pages_to_merge):
            raise CallError(
                "ZeroCounts",
                message="pages_to_scan and max_pages_to_merge must not be zero while run is set",
                hint="clear the run flag to stop the thread",
                errno=EPERM,
            )
        self.given = info

    def resume(self) -> None:
        """Set the run flag again where a call cleared it and the file says merge."""
        if self.given is not None and not self.given.flags and self.base.run == "merge":
            self.given = replace(self.given, flags=FLAG_RUN)

    def reload(self, base: Settings, origins: Mapping[tuple[str | int, ...], str]) -> None:
        """Take the file's word again."""
        self.base, self.origins, self.given = base, origins, None

    @property
    def effective(self) -> Settings:
        """The settings in force. Milliseconds are rounded up; a zero count leaves the file's."""
        given, scan = self.given, self.base.scan
        if given is None:
            return self.base
        changed = replace(
            scan,
            sleep_millisecs=-(-given.sleep // 1000),
            pages_to_scan=given.pages_to_scan or scan.pages_to_scan,
            max_pages_to_merge=given.max_pages_to_merge or scan.max_pages_to_merge,
            advisor="none",  # it would choose another number of pages
        )
        return replace(self.base, scan=changed, run=_RUN[given.flags])

    def info(self, paused: bool) -> ThreadInfo:
        """Give what is in force, as it was given: a paused thread does not run."""
        if self.given is not None:
            flags = self.given.flags
        else:
            flags = next(flag for flag, run in _RUN.items() if run == self.base.run)
        if paused and flags == FLAG_RUN:
            flags = 0
        scan, given = self.base.scan, self.given
        if given is not None:
            counts = given.sleep, given.pages_to_scan, given.max_pages_to_merge
        else:
            counts = scan.sleep_millisecs * 1000, scan.pages_to_scan, scan.max_pages_to_merge
        return ThreadInfo(*counts, flags)

    def sources(self) -> dict[str, str]:
        """Say where what a call can set comes from: "default", "file:line", "StartStopThread"."""
        found = {}
        for path in (("run",), *(("scan", name) for name in _SET_BY_CALL)):
            origin = self.origins.get(path, "default")
            found[".".join(path)] = _SOURCE if self.given is not None else origin
        return found


def _check(info: ThreadInfo) -> None:
    most = {"sleep": _UINT_MAX * 1000, "pages_to_scan": _UINT_MAX, "max_pages_to_merge": _UINT_MAX}
    for name, limit in most.items():
        if not 0 <= getattr(info, name) <= limit:
            raise CallError("org.varlink.service.InvalidParameter", parameter=name)
    if info.flags not in _RUN:
        raise CallError("org.varlink.service.InvalidParameter", parameter="flags")
