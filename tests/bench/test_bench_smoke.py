"""The benchmark from outside, tiny: its answer has the promised shape, and the host stays as found.

How fast anybody is, is not judged here.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ksmd.bench import theirs
from ksmd.bench.clocks import kernel_thread
from ksmd.bench.model import Point
from ksmd.bench.options import parse
from ksmd.bench.victims import Yard
from ksmd.kernel import ksm, procfs
from ksmd.model.errors import KsmdError

pytestmark = [pytest.mark.root, pytest.mark.slow]

BENCH = [sys.executable, "-m", "ksmd.bench"]
# smaller, and the few pages that a stop costs a victim are more than 1 %
TINY = ["--mib", "4", "--victims", "3", "--rounds", "1", "--json"]


def settings() -> dict[str, str]:
    """What KSM is set to; the counters beside it change by themselves."""
    return {
        file.name: file.read_text()
        for file in sorted(ksm.SYSFS.iterdir())
        if file.stat().st_mode & 0o200
    }


def run(*options: str) -> dict[str, Any]:
    done = subprocess.run(
        [*BENCH, *TINY, *options], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["failed"] == {}
    return found


def test_ksmd_alone_saves_all_that_can_be_saved_and_says_so() -> None:
    found = run("--only", "W1,W4,W6,W7", "--no-ksm")
    assert [workload["name"] for workload in found["workloads"]] == ["W1", "W4", "W6", "W7"]
    assert "kernel KSM was left out" in found["missing"]
    for workload in found["workloads"]:
        assert workload["ksm"] is None
        side = workload["ksmd"]
        assert side["median"]["saved_share"] > 0.95
        assert all(run["intact"] for run in side["runs"])
        for name in ("wall_99", "cpu_99", "wall_end", "cpu_end", "rescan_idle_ms_per_gib"):
            assert side["median"][name] > 0, name
        assert side["median"]["wall_95"] <= side["median"]["wall_99"] <= side["median"]["wall_end"]
        assert side["runs"][0]["written"] >= 3
        assert set(side["pauses"]) == {"before", "during"}
    assert found["machine"]["kernel"] == os.uname().release


def test_unique_pages_save_nothing_and_have_no_mark() -> None:
    (workload,) = run("--only", "W3", "--no-ksm", "--no-pauses")["workloads"]
    assert workload["possible_bytes"] == 0
    assert workload["ksmd"]["median"]["saved_bytes"] == 0
    assert workload["ksmd"]["median"]["wall_99"] is None
    assert "pauses" not in workload["ksmd"]


def test_how_long_sharing_at_once_takes_is_told_for_each_size() -> None:
    """The synchronous merge of short-lived workers, who have no privileges."""
    command = [*BENCH, "--share", "1,4", "--rounds", "2"]
    done = subprocess.run(
        [*command, "--json"], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [one["mib"] for one in found["share"]] == [1, 4]
    for one in found["share"]:
        assert len(one["ms"]) == found["rounds"] == 2
        assert all(merged == one["pages"] for merged in one["merged"])
        assert one["pages"] in {(one["mib"] << 8) - 1, one["mib"] << 8}
        assert 0 < min(one["ms"]) <= one["median_ms"] <= max(one["ms"])
    shown = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True).stdout
    assert [line.split()[0] for line in shown.splitlines()[2:4]] == ["1", "4"]
    assert shown.count("100.0%") == 2


def test_the_cpu_budget_is_tried_on_a_daemon_that_has_work() -> None:
    done = subprocess.run(
        [*BENCH, *TINY, "--cpu-percent", "20"],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (kept,) = json.loads(done.stdout)["cpu_percent"]
    assert kept["percent"] == 20
    assert 0 < kept["mean"] <= kept["most"]
    assert kept["saved_mib"] > 0


def test_both_sides_are_measured_and_the_settings_of_ksm_come_back() -> None:
    if why := theirs.unusable():
        pytest.skip(why)
    before = settings()
    (workload,) = run("--only", "W2")["workloads"]
    assert settings() == before
    assert workload["ksm"]["median"]["saved_share"] > 0.95
    assert workload["ksm"]["runs"][0]["details"]["rmap_items"] >= 3 * 1024
    for name in ("wall_99", "cpu_end", "metadata_per_page"):
        assert workload["ratios"][name] > 0, name
    assert int((ksm.SYSFS / "pages_shared").read_text()) == 0


def test_a_failure_under_ksm_puts_its_settings_back(tmp_path: Path) -> None:
    if why := theirs.unusable():
        pytest.skip(why)
    before = settings()
    options = parse([*TINY, "--only", "W1"])

    def fail() -> None:
        with (
            theirs.kept(),
            Yard(tmp_path, options).victims(options.workloads[0]) as victims,
            theirs.KernelKsmd(victims) as contender,
        ):
            contender.start(lambda: Point(0.0, 0.0, 0))
            assert (ksm.SYSFS / "run").read_text().strip() == "1"
            raise KsmdError("on purpose")

    with pytest.raises(KsmdError, match="on purpose"):
        fail()
    assert settings() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_no_process_and_no_setting(number: signal.Signals) -> None:
    before = settings() if ksm.SYSFS.is_dir() else {}
    bench = subprocess.Popen(
        [*BENCH, "--mib", "8", "--victims", "3", "--rounds", "50", "--only", "W1"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert bench.stderr is not None
        while "round 2" not in bench.stderr.readline():
            assert bench.poll() is None
        started = procfs.children(bench.pid)
        bench.send_signal(number)
        bench.communicate(timeout=120)
    finally:
        bench.kill()
        bench.wait()
    assert bench.returncode == 130
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in started) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in started if Path(f"/proc/{pid}").exists()]
    assert (settings() if before else {}) == before


def test_the_kernel_thread_is_told_from_a_process_that_bears_its_name() -> None:
    named = subprocess.Popen(
        [sys.executable, "-c", "open('/proc/self/comm','w').write('ksmd'); print(); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert named.stdout is not None
        named.stdout.readline()
        assert Path(f"/proc/{named.pid}/comm").read_text().strip() == "ksmd"
        assert kernel_thread("ksmd") != named.pid
    finally:
        named.kill()
        named.communicate()
