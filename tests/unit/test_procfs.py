"""Golden texts of /proc, as kernels write them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from itertools import pairwise

import pytest

from ksmd.kernel import procfs, proctext, risks
from ksmd.model.errors import PrivilegeError, TargetGoneError
from ksmd.model.process import TargetId
from ksmd.model.vma import Vma

STAT = (
    b"4242 (a) S (b c) R 17 4242 17 34816 4242 4194560 1201 0 3 0 12 4 0 0 20 0 9 0 "
    b"159701 1234567168 3021 18446744073709551615 1 1 0 0 0 0 0 16781312 2 0 0 0 17 1 0 0\n"
)

MAPS = rb"""55bb6a600000-55bb6a7cb000 rw-p 00000000 00:00 0                          [heap]
7f14027ff000-7f1402800000 ---p 00000000 00:00 0 
7f1402800000-7f1442800000 rw-s 00000000 00:01 1030                       /memfd:ksmd (deleted)
7f1443000000-7f1443028000 r--p 00001000 fd:10 2621                       /opt/a b/lib: x\012y.so
7ffd9d5f1000-7ffd9d613000 rw-p 00000000 00:00 0                          [stack]
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
"""  # noqa: W291 - the kernel's own blank

SMAPS = b"""7f1402800000-7f1442800000 rw-p 00000000 00:00 0 
Size:            1048576 kB
Rss:                   0 kB
THPeligible:           0
ProtectionKey:         0
VmFlags: rd wr mr mw me ac sd 
7ffd9d613000-7ffd9d615000 r-xp 00000000 00:00 0                          [vdso]
Size:                  8 kB
VmFlags: rd ex mr mw me de sd 
7f1443000000-7f1443028000 r--p 00001000 fd:10 2621   /srv/key: value
"""  # noqa: W291 - the kernel's own blanks

CGROUP_V2 = b"0::/system.slice/infer@3.service\n"
CGROUP_HYBRID = b"""12:freezer:/
3:memory:/docker/abc
1:name=systemd:/system.slice/ssh.service
0::/
"""


def test_comm_with_spaces_and_parentheses_does_not_shift_the_fields() -> None:
    stat = proctext.parse_stat(STAT)
    assert stat.comm == "a) S (b c"
    assert (stat.state, stat.ppid, stat.num_threads) == ("R", 17, 9)
    assert (stat.flags, stat.start_time, stat.vsize) == (4194560, 159701, 1234567168)


@pytest.mark.parametrize("text", [b"", b"12 (x", b"12 x) S", b"12 (x) S 1 2 3", b"(x) S" + STAT])
def test_what_is_no_stat_line_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match="stat"):
        proctext.parse_stat(text)


def test_maps_are_read_to_the_last_column() -> None:
    vmas = proctext.parse_maps(MAPS)
    assert vmas[0] == Vma(0x55BB6A600000, 0x55BB6A7CB000, "rw-p", 0, (0, 0), 0, "[heap]")
    assert vmas[1] == Vma(0x7F14027FF000, 0x7F1402800000, "---p", 0, (0, 0), 0, "")
    assert vmas[2] == Vma(
        0x7F1402800000, 0x7F1442800000, "rw-s", 0, (0, 1), 1030, "/memfd:ksmd (deleted)"
    )
    assert vmas[3] == Vma(
        0x7F1443000000,
        0x7F1443028000,
        "r--p",
        0x1000,
        (0xFD, 0x10),
        2621,
        r"/opt/a b/lib: x\012y.so",
    )
    assert [vma.path for vma in vmas[4:]] == ["[stack]", "[vsyscall]"]


def test_maps_are_read_at_once_whether_their_last_line_ends_or_not() -> None:
    """Each kind of mapping is read as a line of its own, and line by line that takes long."""
    line = b"7f00-7f10 rw-s 00000000 00:01 5634                       /dev/zero (deleted)"
    (vma,) = proctext._rows(line) or ()
    assert [vma] == proctext._rows(line + b"\n") == proctext.parse_maps(line)
    assert vma.path == "/dev/zero (deleted)"


def test_maps_accept_text_as_well_as_bytes() -> None:
    assert proctext.parse_maps(MAPS.decode()) == proctext.parse_maps(MAPS)


def test_a_path_that_is_not_utf8_survives() -> None:
    (vma,) = proctext.parse_maps(b"1000-2000 rw-p 0 00:00 7 /tmp/\xff\xfe")
    assert os.fsencode(vma.path) == b"/tmp/\xff\xfe"


@pytest.mark.parametrize(
    "line",
    [
        b"nonsense",
        b"1000-2000 rw-p 0 00:00",
        b"1000-2000 rwxq 0 00:00 0",
        b"2000-1000 rw-p 0 00:00 0",
        b"11111111111111111-2 rw-p 0 00:00 0",
    ],
)
def test_a_line_that_is_no_mapping_is_named_by_its_number(line: bytes) -> None:
    with pytest.raises(ValueError, match="line 2 "):
        proctext.parse_maps(b"1000-2000 rw-p 0 00:00 0\n" + line)


def test_smaps_give_flags_to_the_mapping_above_them() -> None:
    vmas = proctext.parse_smaps(SMAPS)
    assert vmas[0].flags == {"rd", "wr", "mr", "mw", "me", "ac", "sd"}
    assert vmas[1].flags == {"rd", "ex", "mr", "mw", "me", "de", "sd"}
    assert (vmas[1].path, vmas[1].perms) == ("[vdso]", "r-xp")
    assert (vmas[2].path, vmas[2].flags) == ("/srv/key: value", frozenset())


def test_smaps_fields_without_a_mapping_are_refused() -> None:
    with pytest.raises(ValueError, match="line 1 "):
        proctext.parse_smaps(b"Size: 4 kB\n")
    with pytest.raises(ValueError, match="line 11 "):
        proctext.parse_smaps(SMAPS + b"not a field\n")


def test_fields_keep_their_text_and_skip_what_has_no_colon() -> None:
    fields = proctext.parse_fields(
        b"Name:\ta:b c\nVmPin:\t       4 kB\nbroken\nUid:\t0\t65534\t0\t0\n"
    )
    assert fields == {"Name": "a:b c", "VmPin": "4 kB", "Uid": "0\t65534\t0\t0"}


@pytest.mark.parametrize(
    ("text", "path", "unit"),
    [
        (CGROUP_V2, "/system.slice/infer@3.service", "infer@3.service"),
        (CGROUP_HYBRID, "/system.slice/ssh.service", "ssh.service"),
        (b"4:memory:/jobs/7\n0::/\n", "/jobs/7", ""),
        (b"0::/\n", "/", ""),
        (b"", "", ""),
        (b"0::/user.slice/user@1.service/app.slice/x.scope\n", None, "x.scope"),
        (b"0::/a.service/with:colon\n", "/a.service/with:colon", "a.service"),
    ],
)
def test_the_cgroup_that_says_most_is_chosen(text: bytes, path: str | None, unit: str) -> None:
    found = proctext.parse_cgroup(text)
    if path is not None:
        assert found == path
    assert proctext.unit_of(found) == unit


def test_a_process_is_itself_until_the_start_time_differs() -> None:
    me = procfs.target_id(os.getpid())
    assert me.pid == os.getpid()
    assert procfs.is_same(me)
    assert not procfs.is_same(TargetId(me.pid, me.start_time + 1))


def test_a_pid_that_nobody_has_is_gone() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    for verb in (
        procfs.start_time, procfs.tasks, procfs.task_count, procfs.maps, procfs.process_info
    ):  # fmt: skip
        with pytest.raises(TargetGoneError):
            verb(pid)
    assert not procfs.is_same(TargetId(pid, 1))


def test_a_zombie_is_known_as_one() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        info = procfs.process_info(pid)
        assert info.zombie
        with pytest.raises(TargetGoneError):
            procfs.live_tid(pid)
    finally:
        os.waitpid(pid, 0)


def test_what_a_process_has_mapped_is_known_after_its_first_thread_has_ended() -> None:
    """Its own statm is all zeros then, and would never change."""
    script = (
        "import ctypes, threading, time\n"
        "threading.Thread(target=lambda: (time.sleep(0.2), print('on', flush=True),"
        " time.sleep(60))).start()\n"
        "ctypes.CDLL(None).syscall(60, 0)\n"  # exit(2): this thread alone
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"on\n"
            assert procfs.task_stat(process.pid, process.pid).state == "Z"
            assert procfs.read_process(process.pid, "statm").split() == [b"0"] * 7
            size, code, data = procfs.mapped_pages(process.pid)
            assert size > data > code > 0
        finally:
            process.kill()
    with pytest.raises(TargetGoneError):
        procfs.mapped_pages(process.pid)


def test_tasks_are_counted_as_they_are_listed() -> None:
    go = threading.Event()
    others = [threading.Thread(target=go.wait) for _ in range(3)]
    before = procfs.task_count(os.getpid())
    for thread in others:
        thread.start()
    assert procfs.task_count(os.getpid()) == len(procfs.tasks(os.getpid())) == before + 3
    go.set()
    for thread in others:
        thread.join()


def test_our_own_process_is_described_truly() -> None:
    info = procfs.process_info(os.getpid())
    assert info.uid == os.geteuid()
    assert info.exe == os.path.realpath("/proc/self/exe")
    assert "pytest" in info.cmdline
    assert not info.kernel_thread
    assert not info.zombie
    assert os.getpid() in procfs.pids()
    assert os.getpid() in procfs.tasks(os.getpid())


def test_maps_and_smaps_of_ourselves_agree() -> None:
    plain = {(vma.start, vma.perms, vma.path) for vma in procfs.maps(os.getpid()) if vma.inode}
    flagged = {(vma.start, vma.perms, vma.path) for vma in procfs.smaps(os.getpid()) if vma.flags}
    assert plain
    assert plain <= flagged


def test_a_mapping_that_grew_while_it_was_told_is_told_once() -> None:
    text = (
        "1000-3000 rw-p 00000000 00:00 0\n"
        "1000-5000 rw-p 00000000 00:00 0\n"  # grown together with its neighbour meanwhile
        "2000-4000 rw-p 00000000 00:00 0\n"
        "4000-8000 rw-p 00001000 00:01 7 /f\n"
        "8000-9000 r--p 00000000 00:00 0\n"
    )
    found = [
        (vma.start, vma.end, vma.offset) for vma in proctext.disjoint(proctext.parse_maps(text))
    ]
    assert found == [
        (0x1000, 0x3000, 0), (0x3000, 0x5000, 0), (0x5000, 0x8000, 0x2000), (0x8000, 0x9000, 0),
    ]  # fmt: skip


def test_mappings_that_change_all_the_time_are_disjoint_whenever_they_are_read() -> None:
    """A hundred mappings beside each other become one and many again, while they are read."""
    script = (
        "import mmap, ctypes\n"
        "libc = ctypes.CDLL(None)\n"
        "size = 400 * 4096\n"
        "m = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n"
        "at = ctypes.addressof(ctypes.c_char.from_buffer(m))\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        "    for page in range(0, 400, 2):\n"
        "        libc.mprotect(ctypes.c_void_p(at + page * 4096), 4096, 1)\n"
        "    for page in range(0, 400, 2):\n"
        "        libc.mprotect(ctypes.c_void_p(at + page * 4096), 4096, 3)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline()
            for _ in range(60):
                for read in (procfs.maps, procfs.smaps):
                    vmas = read(process.pid)
                    assert all(a.end <= b.start for a, b in pairwise(vmas))
        finally:
            process.kill()


def test_what_may_not_be_written_is_a_matter_of_privilege() -> None:
    with pytest.raises((PrivilegeError, TargetGoneError)):
        procfs.read_file("/proc/self/task/0/maps", "task 0")
    assert isinstance(procfs.translate(PermissionError(13, "no"), "x"), PrivilegeError)
    assert isinstance(procfs.translate(ProcessLookupError(3, "no"), "x"), TargetGoneError)


@pytest.mark.parametrize(
    ("header", "answer"),
    [
        (b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x03\x00\x3e\x00", True),
        (b"\x7fELF\x01\x01\x01" + bytes(9) + b"\x03\x00\x03\x00", False),  # i386
        (b"\x7fELF\x01\x01\x01" + bytes(9) + b"\x03\x00\x3e\x00", False),  # x32
        (b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x03\x00\xb7\x00", False),  # arm64
        (b"#!/bin/sh\n", False),
        (b"\x7fELF\x02", False),
    ],
)
def test_only_64_bit_x86_64_programs_are_taken(header: bytes, answer: bool) -> None:
    assert risks.is_x86_64_header(header) is answer


def test_a_namespace_has_a_name_while_somebody_is_in_it() -> None:
    assert procfs.namespace(os.getpid(), "pid").startswith("pid:[")
    assert procfs.namespace(1 << 22, "pid") == ""  # no such pid


def test_the_host_is_described_in_bytes_and_counts() -> None:
    assert procfs.mem_available() > 1 << 20
    assert risks.max_map_count() > 1000


@pytest.mark.parametrize(
    ("overcommit", "committed", "expected"),
    [(b"0\n", 900, None), (b"1\n", 900, None), (b"2\n", 900, 100 * 1024), (b"2\n", 1200, 0)],
)
def test_a_host_that_keeps_promises_has_so_much_left(monkeypatch, overcommit, committed, expected):
    files = {
        "/proc/meminfo": b"MemAvailable: 500 kB\nCommitLimit: 1000 kB\nCommitted_AS: %d kB\n"
        % committed,
        "/proc/sys/vm/overcommit_memory": overcommit,
    }
    monkeypatch.setattr(procfs, "read_file", lambda path, _what: files[path])
    assert procfs.mem_available() == 500 * 1024
    assert procfs.may_be_promised() == expected
