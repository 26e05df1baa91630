"""The files of /sys/kernel/mm/ksm, with what ksmd has to say in them.

Tools that read or tune KSM (node_exporter, ksmtuned, netdata) find every file they know, with KSM's
meaning, and writing is answered as KSM answers (mm/ksm.c, admin-guide/mm/ksm.rst): EINVAL for what
is no number or out of range. A knob of KSM's that ksmd does not have shows the value that describes
ksmd best; writing another one is refused with EBUSY, the kernel's own answer for a knob that cannot
be turned now. One thing that KSM takes is refused with EPERM: to scan zero pages at a time while
run is 1, which would be a thread that only wakes up; run = 0 stops it.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from ksmd.client import RemoteError
from ksmd.daemon.tuning import FLAG_RUN, FLAG_UNMERGE
from ksmd.model.errors import KsmdError, PrivilegeError

_INT_MAX = 2**31 - 1
_UINT_MAX = 2**32 - 1
_ULONG_MAX = 2**64 - 1
#: What kstrtouint() takes: base ten, one newline at the end.
_NUMBER = re.compile(rb"\+?[0-9]+\n?")
#: ``run`` as the status names it, and as KSM numbers it.
_RUN = {"stop": 0, "merge": 1, "unmerge": 2}


class Caller(Protocol):
    """What is needed of a client."""

    def call(self, method: str, /, **parameters: Any) -> dict[str, Any]:
        """Call a method of the daemon."""


@dataclass(frozen=True, slots=True)
class File:
    """One file: ``read`` gives its value; ``write`` is None for KSM's read-only files."""

    read: Callable[[Caller], int | str]
    write: Callable[[Caller, bytes], None] | None = None


def number(data: bytes, most: int = _UINT_MAX, holds: int | None = None) -> int:
    """Parse what was written; OSError(EINVAL) as the kernel's parser.

    Some files pass the parser's own answer on: ERANGE for what their type does not hold.
    """
    if not _NUMBER.fullmatch(data) or len(data) > 32:
        raise OSError(errno.EINVAL, "not a number")
    if holds is not None and int(data) > holds:
        raise OSError(errno.ERANGE, f"more than {holds}")
    if int(data) > most:
        raise OSError(errno.EINVAL, f"more than {most}")
    return int(data)


def read(name: str, caller: Caller) -> bytes:
    """Give what *name* holds now. OSError: ENOENT, or EIO when the daemon does not answer."""
    try:
        return f"{_file(name).read(caller)}\n".encode()
    except KsmdError as error:
        raise _as_oserror(error) from error


def write(name: str, data: bytes, caller: Caller) -> None:
    """Write to *name*. OSError with the number that KSM would give."""
    setter = _file(name).write
    if setter is None:
        raise OSError(errno.EACCES, "the file is read-only")
    try:
        setter(caller, data)
    except KsmdError as error:
        raise _as_oserror(error) from error


def _file(name: str) -> File:
    if name not in FILES:
        raise OSError(errno.ENOENT, "KSM has no such file")
    return FILES[name]


def _as_oserror(error: KsmdError) -> OSError:
    if isinstance(error, PrivilegeError):
        return OSError(errno.EACCES, str(error))
    if isinstance(error, RemoteError):
        return OSError(int(error.parameters.get("errno", errno.EIO)), str(error))
    return OSError(errno.EIO, str(error))


# -- values -------------------------------------------------------------------------------------


def _counter(name: str) -> File:
    return File(lambda caller: int(caller.call("Status")[name]))


def _fixed(value: int, least: int = 0, most: int = _UINT_MAX, holds: int | None = None) -> File:
    def write_it(_caller: Caller, data: bytes) -> None:
        wanted = number(data, most, holds)
        if wanted < least:
            raise OSError(errno.EINVAL, f"at least {least}")
        if wanted != value:
            raise OSError(errno.EBUSY, "ksmd does not have this knob")

    return File(lambda _caller: value, write_it)


def _advisor(_caller: Caller, data: bytes) -> None:
    mode = data.removesuffix(b"\n")
    if mode == b"scan-time":
        raise OSError(errno.EBUSY, "the settings file chooses ksmd's advisor: scan.advisor")
    if mode != b"none":
        raise OSError(errno.EINVAL, "none or scan-time")


def _tune(caller: Caller, **changed: int) -> None:
    caller.call("StartStopThread", **(caller.call("GetInfoThread") | changed))


def _read_run(caller: Caller) -> int:
    """0 also while ksmd is paused: nothing is scanned then, and what is merged stays."""
    status = caller.call("Status")
    run = _RUN[status["run"]]
    return 0 if run == 1 and status["paused"] else run


def _write_run(caller: Caller, data: bytes) -> None:
    """Write 2 as to KSM: done when everything is unmerged; ENOMEM, and 0, when that cannot be."""
    wanted = number(data, max(_RUN.values()))
    if wanted != _RUN["unmerge"]:
        _tune(caller, flags=FLAG_RUN if wanted else 0)
        return
    try:
        _tune(caller, flags=FLAG_UNMERGE)
        left = caller.call("Unmerge", wait=True).get("refused")
    except RemoteError as error:
        _tune(caller, flags=0)
        raise OSError(errno.ENOMEM, str(error)) from error
    if left:
        raise OSError(errno.EBUSY, "some memory could not be given back yet")


def _write_pages_to_scan(caller: Caller, data: bytes) -> None:
    _tune(caller, pages_to_scan=number(data))


def _write_sleep(caller: Caller, data: bytes) -> None:
    _tune(caller, sleep=number(data) * 1000)


#: Every file that Linux 6.18 has, by name.
FILES: dict[str, File] = {
    "run": File(_read_run, _write_run),
    "pages_to_scan": File(
        lambda caller: int(caller.call("GetInfoThread")["pages_to_scan"]), _write_pages_to_scan
    ),
    "sleep_millisecs": File(
        lambda caller: -(-int(caller.call("GetInfoThread")["sleep"]) // 1000), _write_sleep
    ),
    "pages_shared": _counter("pages_shared"),
    "pages_sharing": _counter("pages_sharing"),
    "pages_unshared": _counter("pages_unshared"),
    "pages_volatile": _counter("pages_volatile"),
    "pages_scanned": _counter("pages_scanned"),
    "pages_skipped": _counter("pages_skipped"),
    "full_scans": _counter("full_scans"),
    "general_profit": _counter("general_profit"),
    "ksm_zero_pages": _counter("zero_pages"),
    # a store page is shared by any number of sites, without chains of duplicates
    "stable_node_chains": File(lambda _caller: 0),
    "stable_node_dups": File(lambda _caller: 0),
    "stable_node_chains_prune_millisecs": _fixed(2000),
    "max_page_sharing": _fixed(_INT_MAX, least=2, holds=_INT_MAX),
    "merge_across_nodes": _fixed(1, most=1, holds=_ULONG_MAX),
    "use_zero_pages": _fixed(1, most=1),
    "smart_scan": _fixed(1, most=1),
    "advisor_mode": File(lambda _caller: "[none] scan-time", _advisor),
    "advisor_max_cpu": _fixed(70, most=100),
    "advisor_min_pages_to_scan": _fixed(500),
    "advisor_max_pages_to_scan": _fixed(30000),
    "advisor_target_scan_time": _fixed(200),
}
