"""``ksmctl estimate`` on real processes: right figures, and nothing of them changed by looking."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from ksmd.cli import estimate as verb
from ksmd.cli import ksmctl as ksmctl_command
from ksmd.cli.common import WIDTH, console
from ksmd.cli.demo_workers import Sizes, Worker
from ksmd.daemon import estimate
from ksmd.kernel import pageentries, procfs, proctext
from ksmd.kernel.pagemap import PageMap
from ksmd.model.errors import TargetGoneError
from ksmd.model.units import PAGE_SIZE
from ksmd.settings import loads

pytestmark = pytest.mark.root

SHARED, PRIVATE, ZERO = 512, 256, 128
SIZES = Sizes(SHARED * PAGE_SIZE, PRIVATE * PAGE_SIZE, ZERO * PAGE_SIZE)


@pytest.fixture(scope="module")
def workers():
    with contextlib.ExitStack() as stack:
        made = [Worker(number, SIZES) for number in range(3)]
        for worker in made:
            stack.callback(worker.kill)
        for worker in made:
            worker.wait_ready()
        yield made


def settings_for(workers, domains):
    """Settings that select exactly the workers' own memory, so that figures can be exact."""
    targets = [
        {
            "name": f"w{worker.number}",
            "match": {"pid": worker.pid},
            "domain": domain,
            "regions": [{"start": worker.parts[0].first_page * PAGE_SIZE, "npages": pages}],
        }
        for worker, domain, pages in zip(
            workers, domains, [SHARED + PRIVATE + ZERO] * len(workers), strict=True
        )
    ]
    return loads(json.dumps({"version": 1, "targets": targets}))


def ksmctl(*argv, **options):
    command = [sys.executable, "-P", "-m", "ksmd.cli.ksmctl", "estimate", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


# -- figures ---------------------------------------------------------------------------------------


def test_the_figures_are_those_of_the_memory_that_was_made(workers):
    found = estimate.run(settings_for(workers, ["d", "d", "d"]).plain())
    (domain,) = found["domains"]
    assert domain["domain"] == "d"
    assert domain["processes"] == 3
    assert domain["pages"] == domain["resident_pages"] == 3 * (SHARED + PRIVATE + ZERO)
    assert domain["mergeable_pages"] == domain["pages"]
    assert domain["zero_pages"] == 3 * ZERO
    assert domain["duplicates_within"] == 0
    assert domain["duplicates_across"] == 2 * SHARED
    assert domain["saved_pages"] == 2 * SHARED + 3 * ZERO
    assert domain["saved_bytes"] == domain["saved_pages"] * PAGE_SIZE - domain["vma_bytes"]
    assert domain["share_of_runs_512"] == 1.0
    assert found["total"]["saved_pages"] == domain["saved_pages"]
    assert [one["pages"] for one in found["processes"]] == [SHARED + PRIVATE + ZERO] * 3


def test_pages_of_different_domains_are_not_counted_as_equal(workers):
    found = estimate.run(settings_for(workers, ["a", "b", "c"]).plain())
    assert found["total"]["duplicates_across"] == 0
    assert found["total"]["saved_pages"] == 3 * ZERO
    assert [one["domain"] for one in found["domains"]] == ["a", "b", "c"]


def test_by_pid_all_anonymous_memory_counts(workers):
    found = estimate.run([worker.pid for worker in workers])
    total = found["total"]
    assert total["duplicates_across"] >= 2 * SHARED
    assert total["zero_pages"] >= 3 * ZERO
    assert total["pages"] > 3 * (SHARED + PRIVATE + ZERO)
    assert found["refusals"]["file-backed"] > 0
    assert {one["domain"] for one in found["processes"]} == {"uid:0"}


def test_a_process_named_twice_is_looked_at_once(workers):
    pid = workers[0].pid
    found = estimate.run([pid, pid])
    assert len(found["processes"]) == 1
    assert found["total"]["duplicates_across"] == 0


def test_the_command_prints_the_same_figures_for_programs_and_people(workers, tmp_path):
    file = tmp_path / "ksmd.yaml"
    settings = settings_for(workers, ["d", "d", "d"])
    file.write_text(settings.model_dump_json(exclude_none=True))
    done = ksmctl("--config", file, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["total"]["saved_pages"] == 2 * SHARED + 3 * ZERO
    done = ksmctl("--pid", *(worker.pid for worker in workers))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Merging would save ")
    assert all(len(line) <= WIDTH for line in done.stdout.splitlines())
    for worker in workers:
        assert str(worker.pid) in done.stdout


def test_many_processes_and_long_names_fit_the_screen(workers, capsys):
    found = estimate.run([workers[0].pid])
    process = {**found["processes"][0], "name": "n" * 300, "detail": "d" * 300, "sentence": "s"}
    domain = {**found["domains"][0], "domain": "d" * 300, "resident_pages": 10**9}
    verb.show(console(), {**found, "processes": [process] * 100, "domains": [domain]})
    text = capsys.readouterr().out
    assert all(len(line) <= WIDTH for line in text.splitlines())
    assert "and 60 smaller ones" in text


# -- who cannot be looked at -----------------------------------------------------------------------


def test_a_kernel_thread_is_refused_by_name():
    found = estimate.run([2])
    assert found["processes"][0]["refused"] == "kernel-thread"
    assert found["refusals"] == {"kernel-thread": 1}
    assert found["total"]["saved_bytes"] == 0


def test_a_process_that_is_gone_is_an_error_when_it_was_named():
    child = subprocess.Popen(["/bin/true"])
    child.wait()
    with pytest.raises(TargetGoneError):
        estimate.run([child.pid])
    done = ksmctl("--pid", child.pid)
    assert done.returncode == 1
    assert done.stderr.startswith(f"ksmctl: process {child.pid} is gone")


def test_processes_that_share_one_memory_are_refused_not_counted_twice():
    program = """
        import ctypes, mmap, os, sys
        libc = ctypes.CDLL(None)
        memory = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.write(os.urandom(1 << 20))
        # CLONE_VM without CLONE_THREAD: a process of its own with the same memory
        stack = mmap.mmap(-1, 1 << 16)
        top = ctypes.addressof(ctypes.c_char.from_buffer(stack)) + (1 << 16) - 64
        pid = libc.clone(libc.pause, ctypes.c_void_p(top), 0x100 | 17, None)
        print(pid, flush=True)
        sys.stdin.read()
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    """
    with started(program) as (child, words):
        found = estimate.run([child.pid, int(words[0])])
        assert [one["refused"] for one in found["processes"]] == ["shared-mm", "shared-mm"]
        assert found["total"]["pages"] == 0


def test_without_privilege_it_says_so(workers):
    # forked, not executed: another user may have no way to this interpreter
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.dup2(writer, 2)
            sys.stderr = os.fdopen(2, "w", buffering=1)
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            os._exit(ksmctl_command.main(["estimate", "--pid", str(workers[0].pid)]))
        finally:
            os._exit(99)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    assert "CAP_SYS_PTRACE" in said


# -- harmlessness ----------------------------------------------------------------------------------


@contextlib.contextmanager
def started(program: str):
    """A Python program that prints a line when it is ready and ends when its stdin does."""
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield child, child.stdout.readline().split()
        child.stdin.close()
        assert child.wait(30) == 0
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


def pss(pid: int) -> int:
    return int(proctext.parse_fields(procfs.read_process(pid, "smaps_rollup"))["Pss"].split()[0])


def exclusive_and_frames(pid: int, start: int, npages: int):
    with PageMap(pid) as pagemap:
        entries = pagemap.entries(start // PAGE_SIZE, npages)
    return int(np.count_nonzero(pageentries.exclusive(entries))), pageentries.pfn(entries)


def test_memory_that_fork_shares_stays_shared_and_is_not_called_a_saving():
    program = """
        import ctypes, mmap, os, sys
        memory = mmap.mmap(-1, 16 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for _ in range(16):
            memory.write(os.urandom(1 << 20))
        child = os.fork()
        if child:
            print(ctypes.addressof(ctypes.c_char.from_buffer(memory)), child, flush=True)
        sys.stdin.read()
    """
    with started(program) as (parent, words):
        start, child = int(words[0]), int(words[1])
        pids = [parent.pid, child]
        npages = (16 << 20) // PAGE_SIZE
        before = [exclusive_and_frames(pid, start, npages) for pid in pids]
        pss_before = [pss(pid) for pid in pids]
        assert [one[0] for one in before] == [0, 0]
        found = estimate.run(pids)
        after = [exclusive_and_frames(pid, start, npages) for pid in pids]
        for old, new in zip(before, after, strict=True):
            assert new[0] == 0, "pages were un-shared by looking"
            assert np.array_equal(old[1], new[1])
        # 16 MiB un-shared would add 8 MiB to each
        assert max(abs(pss(pid) - old) for pid, old in zip(pids, pss_before, strict=True)) < 512
        assert all(one["fork_shared"] >= npages for one in found["processes"])
        assert found["refusals"]["fork-shared"] >= 2 * npages
        assert found["total"]["duplicates_across"] < npages // 4


def test_absent_pages_stay_absent():
    program = """
        import ctypes, mmap, sys
        memory = mmap.mmap(-1, 16 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for page in range(0, 4096, 8):
            memory[page * 4096] = 1
        print(ctypes.addressof(ctypes.c_char.from_buffer(memory)), flush=True)
        sys.stdin.read()
    """
    with started(program) as (child, words):
        start = int(words[0])
        before = exclusive_and_frames(child.pid, start, 4096)[1]
        assert np.count_nonzero(before) == 512
        estimate.run([child.pid])
        assert np.array_equal(exclusive_and_frames(child.pid, start, 4096)[1], before)


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_nothing_is_opened_for_writing_nobody_is_traced_or_signalled(workers, tmp_path):
    log = tmp_path / "strace"
    calls = (
        "open,openat,openat2,creat,ptrace,process_vm_readv,process_vm_writev,process_madvise,"
        "pidfd_open,pidfd_getfd,kill,tkill,tgkill,pidfd_send_signal,mount,write,pwrite64"
    )
    done = subprocess.run(
        ["strace", "-f", "-o", str(log), "-e", f"trace={calls}", "-s", "200", "-y"]
        + [sys.executable, "-P", "-m", "ksmd.cli.ksmctl", "estimate", "--json", "--pid"]
        + [str(worker.pid) for worker in workers],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 0, done.stderr
    lines = log.read_text().splitlines()
    for worker in workers:
        assert any(re.search(rf'"/proc/{worker.pid}/\S*mem"', line) for line in lines), (
            "the estimate was not seen reading memory: the test would prove nothing"
        )
    forbidden = re.compile(
        r"\b(ptrace|process_vm_\w+|process_madvise|pidfd_\w+|t?g?kill|mount|creat)\("
    )
    writing = re.compile(r"O_WRONLY|O_RDWR|O_CREAT|O_TRUNC")
    for line in lines:
        assert not forbidden.search(line), line
        if re.search(r"\bopenat?2?\(", line):
            assert not (writing.search(line) and re.search(r'"/(proc|sys)/', line)), line
        if re.search(r"\bp?write(64)?\(", line):
            assert not re.search(r"<(/proc|/sys|/dev/(?!null|pts|tty))", line), line
    assert Path(f"/proc/{workers[0].pid}").exists()


def test_the_content_of_the_workers_is_as_it_was(workers):
    before = [worker.sums() for worker in workers]
    estimate.run([worker.pid for worker in workers])
    assert [worker.sums() for worker in workers] == before
    assert len({sums[0] for sums in before}) == 1
