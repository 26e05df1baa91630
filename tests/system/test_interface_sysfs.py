"""The view shaped as /sys/kernel/mm/ksm: tools that know KSM read and tune ksmd through it."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import KSMCTL, PATIENCE, Daemon, frames, store_mappings, until

from ksmd.kernel.ksm import SYSFS

pytestmark = pytest.mark.root


@contextlib.contextmanager
def mounted(daemon: Daemon) -> Iterator[Path]:
    """Mount the view of a daemon; the directory."""
    directory = daemon.socket.parent / "ksm"
    directory.mkdir()
    command = [KSMCTL, "--socket", str(daemon.socket), "sysfs", "--mount", str(directory)]
    process = subprocess.Popen(command)

    def there() -> bool:
        assert process.poll() is None, "ksmctl sysfs ended"
        return directory.is_mount()

    try:
        until(there, "the view is mounted")
        yield directory
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(PATIENCE)
        assert (code, directory.is_mount()) == (0, False)


@pytest.fixture
def daemon(open_daemons):
    return open_daemons()


@pytest.fixture
def view(daemon):
    """A view of a daemon of the test's own."""
    with mounted(daemon) as directory:
        yield directory


@pytest.fixture(scope="module")
def still(module_daemon):
    """The view of a daemon in which nothing is changed: one for many tests."""
    with mounted(module_daemon) as directory:
        before = knobs(directory)
        yield directory
        assert knobs(directory) == before


def knobs(view: Path) -> dict[str, str]:
    """Read every file that can be written."""
    return {file.name: file.read_text() for file in view.iterdir() if file.stat().st_mode & 0o200}


def value(view: Path, name: str) -> int:
    return int((view / name).read_text())


def pair(daemon, puppets):
    two = [puppets(daemon.socket, pages=64) for _ in range(2)]
    for puppet in two:
        puppet.register()
        puppet.share()
    return two


def test_it_has_the_files_that_the_running_kernel_has_with_the_same_permissions(still):
    if not SYSFS.is_dir():
        pytest.fail("this kernel has no KSM to compare with")
    real = {file.name: file.stat().st_mode for file in SYSFS.iterdir()}
    ours = {file.name: file.stat().st_mode for file in still.iterdir()}
    assert ours == real
    assert {file.stat().st_size for file in still.iterdir()} == {4096}


def test_its_counters_are_those_of_the_status(view, daemon, puppets):
    one, other = pair(daemon, puppets)
    status = daemon.status()
    assert status["pages_sharing"] == 64
    names = "pages_shared pages_sharing pages_unshared pages_volatile pages_scanned full_scans"
    for name in names.split():
        assert value(view, name) == status[name], name
    assert value(view, "ksm_zero_pages") == status["zero_pages"]
    assert (view / "pages_shared").read_bytes() == b"64\n"
    assert isinstance(value(view, "general_profit"), int)
    assert one.intact()
    assert other.intact()


def test_run_pages_to_scan_and_sleep_millisecs_tune_the_daemon(view, daemon, puppets):
    one, other = (puppets(daemon.socket, pages=64) for _ in range(2))
    for puppet in (one, other):
        puppet.register()
    assert value(view, "run") == 0  # paused
    (view / "pages_to_scan").write_text("1234\n")
    (view / "sleep_millisecs").write_text("7")
    assert (value(view, "pages_to_scan"), value(view, "sleep_millisecs")) == (1234, 7)
    (view / "run").write_text("1\n")
    assert value(view, "run") == 1
    until(lambda: bool((frames(one) == frames(other)).all()), "run = 1 merges")
    (view / "run").write_text("0")
    assert (value(view, "run"), bool(store_mappings(one.pid))) == (0, True)
    (view / "run").write_text("2")
    assert value(view, "run") == 2
    assert not store_mappings(one.pid)
    assert not store_mappings(other.pid)
    assert daemon.status()["sources"]["scan.pages_to_scan"] == "StartStopThread"
    assert one.intact()
    assert other.intact()


def error_of(file: Path, data: bytes) -> int:
    """Write in one go: the error number, 0 for none."""
    try:
        fd = os.open(file, os.O_WRONLY)
    except OSError as error:
        return error.errno or -1
    try:
        os.write(fd, data)
    except OSError as error:
        return error.errno or -1
    finally:
        with contextlib.suppress(OSError):
            os.close(fd)
    return 0


@pytest.mark.parametrize(
    "name",
    ["run", "pages_to_scan", "sleep_millisecs", "merge_across_nodes", "max_page_sharing",
     "use_zero_pages", "advisor_mode"],
)  # fmt: skip
@pytest.mark.parametrize(
    "data", [b"", b"x", b"-1", b"3x", b" 1", b"4294967296", b"99999999999999999999", b"1\n\n"]
)
def test_what_kernel_ksm_refuses_it_refuses_with_the_same_error(name, data, still):
    """Only what the kernel refuses is written to it, so nothing of the host is changed."""
    if not SYSFS.is_dir():
        pytest.fail("this kernel has no KSM to compare with")
    ours = error_of(still / name, data)
    if data.strip() == b"1":
        assert ours == errno.EINVAL  # not tried on the kernel, which might take it one day
    else:
        assert ours == error_of(SYSFS / name, data)
    assert ours or not data  # nothing at all is no value, and no error


@pytest.mark.parametrize(
    "command",
    ["mkdir x", "mkfifo x", "touch x", "rm run", "mv run x", "ln run x", "ln -s run x",
     "rmdir run", "echo 1 > pages_shared", "echo 1 >> full_scans", "exec 3<> general_profit"],
)  # fmt: skip
def test_what_cannot_be_done_in_sysfs_cannot_be_done_there_for_the_same_reason(command, still):
    def tried(where: Path) -> tuple[int, str]:
        done = subprocess.run(
            ["sh", "-c", command], cwd=where, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stderr

    if not SYSFS.is_dir():
        pytest.fail("this kernel has no KSM to compare with")
    real = tried(SYSFS)
    assert real[0] != 0
    assert tried(still) == real
    assert not (still / "x").exists()


def test_a_value_is_what_is_written_wherever_in_the_file(daemon, view):
    """As in sysfs: appending, and writing again to an open file, are writing."""
    subprocess.run(["sh", "-c", "echo 31 >> sleep_millisecs"], cwd=view, check=True)
    assert value(view, "sleep_millisecs") == 31
    script = "exec 3> pages_to_scan; echo 1111 >&3; echo 22 >&3"
    subprocess.run(["sh", "-c", script], cwd=view, check=True)
    assert value(view, "pages_to_scan") == 22


def test_who_reads_byte_by_byte_reads_one_number(daemon, view):
    """GIVEN a reader in the middle of a number WHEN that changes THEN it reads the old one on."""
    (view / "pages_to_scan").write_text("12345")
    with (view / "pages_to_scan").open("rb", buffering=0) as one:
        begun = one.read(2)
        (view / "pages_to_scan").write_text("999")
        with (view / "pages_to_scan").open("rb", buffering=0) as other:
            assert other.read() == b"999\n"
        assert begun + one.read(100) == b"12345\n"
        assert one.read(1) == b""
        assert os.pread(one.fileno(), 100, 0) == b"999\n"  # from its start it is read anew
        assert os.pread(one.fileno(), 100, 1) == b"99\n"


def test_a_knob_that_ksmd_does_not_have_is_busy_and_its_own_value_is_taken(still):
    for name, other in (("merge_across_nodes", b"0"), ("max_page_sharing", b"256")):
        assert error_of(still / name, (still / name).read_bytes()) == 0
        assert error_of(still / name, other) == errno.EBUSY
    assert error_of(still / "advisor_mode", b"scan-time\n") == errno.EBUSY
    assert error_of(still / "advisor_mode", b"none") == 0
    assert error_of(still / "nonsense", b"1") == errno.ENOENT


def test_only_root_may_write_and_everybody_may_read(still):
    script = (
        f"cat {still}/run && ! echo 1 2>/dev/null > {still}/run && ! echo 1 > {still}/full_scans"
    )
    done = subprocess.run(["sh", "-c", script], cwd=still, user=65534, group=65534, check=False)
    assert done.returncode == 0


#: What the KSM collector of node_exporter reads, and how: a whole number in each file.
_EXPORTER = """
set -e
cd /sys/kernel/mm/ksm
for name in full_scans merge_across_nodes pages_shared pages_sharing pages_to_scan \
            pages_unshared pages_volatile run sleep_millisecs; do
    read -r number < $name
    test $number -ge 0
    echo "node_ksmd_$name $number"
done
echo 4321 > pages_to_scan
"""


def test_a_tool_finds_it_in_the_place_of_the_real_one(view, daemon, puppets):
    """GIVEN a mount namespace of its own WHEN a tool reads and tunes KSM there THEN it is ksmd."""
    pair(daemon, puppets)
    before = (SYSFS / "pages_to_scan").read_text()
    script = f"mount --bind {view} /sys/kernel/mm/ksm\n{_EXPORTER}"
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = dict(line.split() for line in done.stdout.splitlines())
    assert told["node_ksmd_pages_sharing"] == "64"
    assert told["node_ksmd_pages_to_scan"] == "25000"
    assert value(view, "pages_to_scan") == 4321
    assert (SYSFS / "pages_to_scan").read_text() == before


def test_without_a_daemon_it_says_so_at_once_and_later_every_reader_gets_an_error(view, daemon):
    daemon.stop()
    with pytest.raises(OSError, match="Input/output error"):
        (view / "run").read_text()
    done = subprocess.run(
        [KSMCTL, "--socket", str(daemon.socket), "sysfs", "--mount", "/tmp"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "not running" in done.stderr
