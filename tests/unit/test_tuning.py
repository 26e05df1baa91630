"""The thread's settings by call, who may call what, and KSM's files."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from ksmd.cli import sysfs_files
from ksmd.client import DaemonUnavailableError, RemoteError
from ksmd.daemon import access, interface
from ksmd.daemon.connection import CallError
from ksmd.daemon.tuning import ThreadInfo, Tuning
from ksmd.model.errors import PrivilegeError
from ksmd.settings import Settings, defaults, loads

GOOD = ThreadInfo(sleep=1500, pages_to_scan=10, max_pages_to_merge=20, flags=1)


def changed(**keys: int) -> ThreadInfo:
    values = {name: getattr(GOOD, name) for name in GOOD.__slots__}
    return ThreadInfo(**values | keys)


@pytest.fixture
def tuning():
    text = "version: 1\nrun: stop\nscan: {pages_to_scan: 77}\n"
    origins = {("run",): "f.yaml:2", ("scan", "pages_to_scan"): "f.yaml:3"}
    return Tuning(loads(text).plain(), origins)


# -- tuning ----------------------------------------------------------------------------------------


def test_without_a_call_the_file_is_in_force(tuning):
    assert tuning.effective is tuning.base
    assert tuning.info(paused=False) == ThreadInfo(20_000, 77, 25_000, 0)
    assert tuning.sources() == {
        "run": "f.yaml:2",
        "scan.pages_to_scan": "f.yaml:3",
        "scan.sleep_millisecs": "default",
        "scan.max_pages_to_merge": "default",
    }


def test_a_call_holds_until_a_reload(tuning):
    tuning.start_stop(GOOD)
    assert tuning.info(paused=False) == GOOD
    assert tuning.effective.run == "merge"
    assert tuning.effective.scan.pages_to_scan == 10
    assert tuning.effective.scan.max_pages_to_merge == 20
    assert set(tuning.sources().values()) == {"StartStopThread"}
    tuning.reload(defaults().plain(), {})
    assert tuning.effective == defaults().plain()
    assert set(tuning.sources().values()) == {"default"}


def test_sleep_is_in_microseconds_and_never_shorter_than_was_asked_for(tuning):
    for micros, millis in ((0, 0), (1, 1), (1000, 1), (1001, 2)):
        tuning.start_stop(changed(sleep=micros))
        assert tuning.effective.scan.sleep_millisecs == millis
        assert tuning.info(paused=False).sleep == micros


@pytest.mark.parametrize("name", ["pages_to_scan", "max_pages_to_merge"])
def test_counts_of_zero_are_refused_while_run_is_set_and_kept_otherwise(name, tuning):
    with pytest.raises(CallError) as error:
        tuning.start_stop(changed(**{name: 0}))
    assert (error.value.name, error.value.parameters["errno"]) == ("ZeroCounts", errno.EPERM)
    assert tuning.given is None
    tuning.start_stop(changed(**{name: 0, "flags": 0}))
    assert getattr(tuning.info(paused=False), name) == 0
    assert getattr(tuning.effective.scan, name) == getattr(tuning.base.scan, name)


@pytest.mark.parametrize(
    "wrong", [{"flags": 3}, {"flags": 4}, {"flags": -1}, {"sleep": -1}, {"pages_to_scan": 1 << 32}]
)
def test_what_is_out_of_range_is_refused_by_its_name(wrong, tuning):
    with pytest.raises(CallError) as error:
        tuning.start_stop(changed(**wrong))
    assert error.value.parameters == {"parameter": next(iter(wrong))}


def test_a_paused_thread_does_not_run(tuning):
    tuning.start_stop(GOOD)
    assert tuning.info(paused=True).flags == 0
    tuning.start_stop(changed(flags=2))
    assert tuning.effective.run == "unmerge"
    assert tuning.info(paused=True).flags == 2


def test_resuming_runs_the_thread_again_that_a_call_had_stopped(tuning):
    tuning.start_stop(changed(flags=0))
    tuning.resume()
    assert tuning.info(paused=False).flags == 0  # the file says stop
    tuning.reload(defaults().plain(), {})
    tuning.start_stop(changed(flags=0))
    tuning.resume()
    assert tuning.info(paused=False) == GOOD
    tuning.start_stop(changed(flags=2))
    tuning.resume()
    assert tuning.info(paused=False).flags == 2


# -- access ----------------------------------------------------------------------------------------


def test_every_method_has_its_line_and_every_line_its_method():
    assert set(access.METHODS) == set(interface.load().methods)


def test_a_method_without_a_line_is_roots(monkeypatch):
    monkeypatch.delitem(access.METHODS, "GetApiVersion")
    access.check("GetApiVersion", 0)
    with pytest.raises(CallError) as error:
        access.check("GetApiVersion", 1)
    assert error.value.name == "PermissionDenied"


# -- KSM's files -----------------------------------------------------------------------------------


class Daemon:
    """A caller that answers as the daemon would."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.tuning = Tuning((settings or defaults()).plain())
        self.paused = False
        self.unmerged = 0
        self.fails: Exception | None = None

    def call(self, method: str, /, **parameters: Any) -> dict[str, Any]:
        if self.fails is not None:
            raise self.fails
        if method == "Status":
            run = self.tuning.effective.run
            return {"run": run, "paused": self.paused, "pages_sharing": 42, "zero_pages": 3}
        if method == "GetInfoThread":
            info = self.tuning.info(self.paused)
            return {name: getattr(info, name) for name in info.__slots__}
        if method == "StartStopThread":
            try:
                self.tuning.start_stop(ThreadInfo(**parameters))
            except CallError as error:
                raise RemoteError("no", "", error.name, error.parameters) from error
            return {}
        assert (method, parameters) == ("Unmerge", {"wait": True})
        self.unmerged += 1
        return {"pages": 1}


def text(name: str, daemon: Daemon) -> str:
    return sysfs_files.read(name, daemon).decode()


def failure(name: str, data: bytes, daemon: Daemon) -> int | None:
    with pytest.raises(OSError) as error:  # noqa: PT011  (callers look at the number)
        sysfs_files.write(name, data, daemon)
    return error.value.errno


def test_counters_are_the_daemons_with_a_newline():
    daemon = Daemon()
    assert text("pages_sharing", daemon) == "42\n"
    assert text("ksm_zero_pages", daemon) == "3\n"


def test_run_is_0_1_or_2_and_2_waits_until_all_is_unmerged():
    daemon = Daemon()
    assert text("run", daemon) == "1\n"
    daemon.paused = True
    assert text("run", daemon) == "0\n"
    daemon.paused = False
    for wanted in ("0", "1", "2"):
        sysfs_files.write("run", wanted.encode(), daemon)
        assert text("run", daemon) == f"{wanted}\n"
    assert daemon.unmerged == 1


def test_run_stays_0_when_there_is_not_the_memory_to_unmerge():
    daemon = Daemon()
    call = daemon.call

    def scarce(method: str, /, **parameters: Any) -> dict[str, Any]:
        if method == "Unmerge":
            raise RemoteError("no memory", "", "org.ksmd.Control.Failed", {"exit_code": 1})
        return call(method, **parameters)

    daemon.call = scarce  # type: ignore[method-assign]
    assert failure("run", b"2", daemon) == errno.ENOMEM
    assert text("run", daemon) == "0\n"


def test_one_knob_is_turned_without_the_others():
    daemon = Daemon()
    sysfs_files.write("pages_to_scan", b"100\n", daemon)
    sysfs_files.write("sleep_millisecs", b"+7", daemon)
    info = daemon.tuning.info(paused=False)
    assert info == ThreadInfo(7000, 100, 25_000, 1)
    assert (text("pages_to_scan", daemon), text("sleep_millisecs", daemon)) == ("100\n", "7\n")


@pytest.mark.parametrize("data", [b"", b"\n", b"x", b"-1", b"1 ", b"1\n\n", b"0x10", b"9" * 40])
@pytest.mark.parametrize("name", ["run", "pages_to_scan", "sleep_millisecs", "merge_across_nodes"])
def test_what_is_no_number_is_invalid(name, data):
    assert failure(name, data, Daemon()) == errno.EINVAL


def test_errors_have_the_numbers_that_kernel_ksm_gives():
    daemon = Daemon()
    assert failure("run", b"3", daemon) == errno.EINVAL
    assert failure("pages_to_scan", b"4294967296", daemon) == errno.EINVAL
    assert failure("pages_shared", b"1", daemon) == errno.EACCES
    assert failure("max_page_sharing", b"1", daemon) == errno.EINVAL
    assert failure("max_page_sharing", b"256", daemon) == errno.EBUSY
    assert failure("nonsense", b"1", daemon) == errno.ENOENT
    assert failure("pages_to_scan", b"0", daemon) == errno.EPERM
    daemon.fails = DaemonUnavailableError("gone")
    assert failure("run", b"1", daemon) == errno.EIO
    daemon.fails = PrivilegeError("no")
    assert failure("run", b"1", daemon) == errno.EACCES


def test_every_writable_file_takes_what_it_shows():
    daemon = Daemon()
    for name, file in sysfs_files.FILES.items():
        if file.write is not None and name != "advisor_mode":
            sysfs_files.write(name, sysfs_files.read(name, daemon), daemon)
    assert daemon.tuning.info(paused=False).flags == 1
