"""The probe tells the truth about this kernel and leaves nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_victims import open_fds

from ksmd.kernel import features, ksm, procfs, sysfs, thp

pytestmark = pytest.mark.root

PROGRAM = """
import json
from ksmd.kernel import features
print(json.dumps({f.name: f.present for f in features.probe()}))
"""


def _probe_as(*command: str) -> dict[str, bool]:
    done = subprocess.run(
        [*command, sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True
    )
    return dict(json.loads(done.stdout))


def test_every_feature_has_a_name_and_says_what_its_absence_costs() -> None:
    found = features.probe()
    assert len({feature.name for feature in found}) == len(found)
    assert all(feature.without for feature in found)
    assert any(feature.needed for feature in found)
    assert all(feature.detail for feature in found if not feature.present)


def test_probing_leaves_no_child_no_descriptor_and_no_pin() -> None:
    features.probe()  # imports and caches
    fds = open_fds()
    maps = len(procfs.maps(os.getpid()))
    features.probe()
    assert open_fds() == fds
    assert len(procfs.maps(os.getpid())) <= maps + 1
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    assert not [pid for pid in children if procfs.task_stat(int(pid), int(pid)).state == "Z"]


def test_without_capabilities_what_needs_them_is_absent() -> None:
    found = _probe_as("setpriv", "--bounding-set=-all")
    for name in (
        "ptrace-seize",
        "ptrace-suspend-seccomp",
        "pidfd-getfd",
        "pagemap-frames",
        "mlock",
    ):
        assert not found[name], name
    assert found["x86-64"]
    assert found["memfd-seals"]


@pytest.mark.parametrize(
    ("capability", "feature"),
    [
        ("sys_ptrace", "ptrace-seize"),
        ("sys_admin", "ptrace-suspend-seccomp"),
        ("sys_admin", "pagemap-frames"),
        ("ipc_lock", "mlock"),
        ("sys_nice", "process-madvise"),
    ],
)
def test_each_feature_hangs_on_its_capability(capability: str, feature: str) -> None:
    with_all, without = _probe_as(), _probe_as("setpriv", f"--bounding-set=-{capability}")
    assert with_all[feature]
    assert not without[feature]


def test_a_process_under_seccomp_cannot_suspend_the_seccomp_of_others() -> None:
    # what systemd's SystemCallFilter= does to ksmd itself
    program = (
        "import ctypes, struct\n"
        "libc = ctypes.CDLL(None)\n"
        "allow = ctypes.create_string_buffer(struct.pack('HBBI', 6, 0, 0, 0x7fff0000))\n"
        "prog = struct.pack('HxxxxxxQ', 1, ctypes.addressof(allow))\n"
        "assert libc.prctl(38, 1, 0, 0, 0) == 0\n"
        "assert libc.prctl(22, 2, ctypes.c_char_p(prog)) == 0\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program + PROGRAM], check=True, capture_output=True, text=True
    )
    found = json.loads(done.stdout)
    assert not found["ptrace-suspend-seccomp"]
    assert found["ptrace-seize"]


def test_settings_of_kernel_ksm_come_back() -> None:
    before = ksm.read()
    if before is None:
        pytest.skip("the kernel was built without KSM")
    wanted = int(before["sleep_millisecs"]) + 1
    with ksm.KernelKsm(sleep_millisecs=wanted) as kernel:
        assert kernel.read()["sleep_millisecs"] == wanted
    after = ksm.read()
    assert after is not None
    assert after["sleep_millisecs"] == before["sleep_millisecs"]


def test_the_policy_for_huge_shared_memory_comes_back() -> None:
    before = thp.shmem_enabled()
    if before is None:
        pytest.skip("the kernel was built without huge pages for shared memory")
    wanted = "advise" if before != "advise" else "never"
    with thp.ThpSettings(shmem_enabled=wanted):
        assert thp.shmem_enabled() == wanted
    assert thp.shmem_enabled() == before
    assert sysfs.chosen((thp.SYSFS / "shmem_enabled").read_text()) == before
