"""Signs of danger are seen on processes that show them, and not on others."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from kernel_victims import Victim

from ksmd.kernel import cgroups, procfs, risks
from ksmd.model.errors import TargetGoneError

pytestmark = pytest.mark.root


def test_an_ordinary_process_shows_no_sign() -> None:
    with Victim() as victim:
        assert risks.pin_risks(victim.pid) == []
        assert risks.shares_memory(victim.pid) is None
        assert not risks.frozen(victim.pid)
        assert risks.is_x86_64_elf(victim.pid)


RING = """
params = (ctypes.c_ubyte * 120)()
ring = libc.syscall(425, 1, params)
at = anon(16 * PAGE)
vector = (ctypes.c_uint64 * 2)(at, 16 * PAGE)
reply(ring)
"""


def test_registered_buffers_are_seen_from_the_moment_they_exist() -> None:
    with Victim(RING) as victim:
        assert victim.ready >= 0
        assert risks.pin_risks(victim.pid) == []
        assert victim.ask("libc.syscall(427, ring, 0, vector, 1)") == 0
        found = " ".join(risks.pin_risks(victim.pid))
        assert "VmPin: 64 kB" in found
        assert f"io_uring (fd {victim.ready})" in found
        assert victim.ask("libc.syscall(427, ring, 1, None, 0)") == 0
        deadline = time.monotonic() + 20
        while risks.pin_risks(victim.pid):
            assert time.monotonic() < deadline, "the sign stays"
            time.sleep(0.01)


def test_a_ring_of_linux_aio_is_seen() -> None:
    with Victim(
        "context = ctypes.c_ulong(0); reply(libc.syscall(206, 8, ctypes.byref(context)))\n"
    ) as v:
        assert v.ready == 0
        assert any("[aio]" in risk for risk in risks.pin_risks(v.pid))


@pytest.mark.parametrize(
    ("device", "word"),
    [
        ("/dev/vfio/vfio", "vfio"),
        ("/dev/infiniband/uverbs0", "RDMA"),
        ("/dev/vhost-net", "vhost"),
        ("/dev/udmabuf", "udmabuf"),
    ],
)
def test_devices_that_write_behind_the_page_table_are_seen(
    device: str, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.readlink
    with Victim() as victim:
        prefix = f"/proc/{victim.pid}/fd/"
        monkeypatch.setattr(
            risks.os,
            "readlink",
            lambda path: device if str(path) == prefix + "0" else real(path),
        )
        (risk,) = risks.pin_risks(victim.pid)
    assert word in risk
    assert device in risk


CLONE = """
libc.clone.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
stack = anon(64 * PAGE)
code = ctypes.cast(libc.pause, ctypes.c_void_p)
twin = libc.clone(code, stack + 64 * PAGE, 0x100 | 17, None)
reply(twin)
"""


def test_a_process_that_shares_the_memory_is_found_both_ways() -> None:
    with Victim(CLONE) as victim:
        try:
            assert risks.shares_memory(victim.pid) == victim.ready
            assert risks.shares_memory(victim.ready) == victim.pid
        finally:
            os.kill(victim.ready, 9)


def test_sharing_is_found_when_the_other_ones_first_thread_has_ended() -> None:
    # a program of few calls, because two Pythons in one memory would trip over each other
    source = r"""
    #define _GNU_SOURCE
    #include <sched.h>
    #include <stdio.h>
    #include <stdlib.h>
    #include <unistd.h>
    #include <sys/syscall.h>
    static char a[65536], b[65536];
    static int sleeper(void *x) { for (;;) pause(); }
    static int leader(void *x) {
        clone(sleeper, a + sizeof a, CLONE_VM | CLONE_SIGHAND | CLONE_THREAD, 0);
        syscall(SYS_exit, 0);
        return 0;
    }
    int main(void) {
        printf("%d\n", clone(leader, b + sizeof b, CLONE_VM, 0));
        fflush(stdout);
        for (;;) pause();
    }
    """
    with _compiled(source) as program:
        process = subprocess.Popen([program], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        other = int(process.stdout.readline())
        try:
            deadline = time.monotonic() + 20
            while procfs.task_stat(other, other).state != "Z":
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert risks.shares_memory(process.pid) == other
            assert risks.shares_memory(other) == process.pid
        finally:
            os.kill(other, 9)
            process.kill()
            process.wait()
            process.stdout.close()


@contextmanager
def _compiled(source: str) -> Iterator[str]:
    if not shutil.which("cc"):
        pytest.skip("no C compiler")
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "program")
        subprocess.run(
            ["cc", "-O1", "-w", "-o", program, "-xc", "-"], input=source, text=True, check=True
        )
        yield program


def test_a_forked_child_does_not_share_the_memory() -> None:
    with Victim("reply(family(1)[0])\n") as victim:
        assert risks.shares_memory(victim.pid) is None
        assert risks.shares_memory(victim.ready) is None


@contextmanager
def _group(kind: str) -> Iterator[Path]:
    """A cgroup of our own in the freezer of version *kind*, removed afterwards."""
    for found in cgroups.groups_of(os.getpid(), "freezer"):
        if found.v2 == (kind == "v2"):
            folder = found.top / f"ksmd-test-{os.getpid()}"
            break
    else:
        pytest.skip(f"no cgroup {kind} freezer is mounted")
    folder.mkdir()
    try:
        yield folder
    finally:
        deadline = time.monotonic() + 20
        while (folder / "cgroup.procs").read_text() and time.monotonic() < deadline:
            time.sleep(0.01)
        folder.rmdir()


@pytest.mark.parametrize(
    ("kind", "file", "freeze", "thaw"),
    [("v1", "freezer.state", "FROZEN", "THAWED"), ("v2", "cgroup.freeze", "1", "0")],
)
def test_a_frozen_process_is_seen(kind: str, file: str, freeze: str, thaw: str) -> None:
    with _group(kind) as group, Victim() as victim:
        (group / "cgroup.procs").write_text(str(victim.pid))
        assert not risks.frozen(victim.pid)
        try:
            (group / file).write_text(freeze)
            _wait(victim.pid, True)
        finally:
            (group / file).write_text(thaw)
        _wait(victim.pid, False)


def _wait(pid: int, state: bool) -> None:
    deadline = time.monotonic() + 20
    while risks.frozen(pid) is not state:
        assert time.monotonic() < deadline, f"frozen is not {state}"
        time.sleep(0.01)


def test_coredump_filter_and_oom_score_are_set() -> None:
    with Victim() as victim:
        bits = risks.coredump_filter(victim.pid)
        risks.set_coredump_filter(victim.pid, bits | 4)
        assert risks.coredump_filter(victim.pid) == bits | 4
        risks.set_oom_score_adj(victim.pid, 123)
        assert procfs.read_process(victim.pid, "oom_score_adj") == b"123\n"


def test_a_32_bit_program_is_told_by_its_executable(tmp_path: Path) -> None:
    with Victim() as victim:
        real = Path(f"/proc/{victim.pid}/exe").read_bytes()[:20]
    assert risks.is_x86_64_header(real)
    assert not risks.is_x86_64_header(real[:4] + b"\x01" + real[5:])


def test_without_the_executable_auxv_tells_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError

    with Victim() as victim:
        monkeypatch.setattr(risks.Path, "open", refuse)
        assert risks.is_x86_64_elf(victim.pid)


def test_a_kernel_thread_runs_no_program() -> None:
    threads = (pid for pid in procfs.pids() if procfs.task_stat(pid, pid).flags & procfs.PF_KTHREAD)
    thread = next(threads, None)
    if thread is None:
        pytest.skip("this pid namespace has no kernel threads")
    assert procfs.process_info(thread).kernel_thread
    assert procfs.process_info(thread).exe == ""
    assert not risks.is_x86_64_elf(thread)
    assert procfs.maps(thread) == []


def test_the_dead_are_gone_to_every_question() -> None:
    with Victim() as victim:
        victim.kill()
        for verb in (risks.pin_risks, risks.shares_memory, risks.frozen, risks.coredump_filter):
            with pytest.raises(TargetGoneError):
                verb(victim.pid)


def test_a_process_of_another_user_is_described() -> None:
    process = subprocess.Popen(["/bin/sleep", "3600", "0"], user=65534)
    try:
        deadline = time.monotonic() + 20
        while "sleep" not in (info := procfs.process_info(process.pid)).cmdline:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert info.uid == 65534
        assert info.cmdline == "/bin/sleep 3600 0"
        assert info.exe == os.path.realpath("/bin/sleep")
    finally:
        process.kill()
        process.wait()
