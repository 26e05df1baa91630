"""Memory cgroups, as they look in both versions, in folders of our own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ksmd.daemon.memory import NotEnoughMemoryError, Room, check
from ksmd.kernel import cgroups, memcg, procfs
from ksmd.kernel.cgroups import Group, groups_of
from ksmd.model.errors import TargetGoneError

MIB = 1 << 20
LIMIT_FILES = {True: "memory.max", False: "memory.limit_in_bytes"}
MOUNTS = b"""\
24 1 0:22 / /sys rw - sysfs sysfs rw
30 24 0:26 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
31 24 0:27 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
32 24 0:28 /box /sys/fs/cgroup/freezer rw,relatime - cgroup cgroup rw,freezer
33 24 0:29 / /a\\040b
"""


@pytest.fixture
def proc(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """Have mountinfo say MOUNTS, and every process stand where the test wants it."""
    cgroup = b""

    def read_process(_pid: int, _name: str) -> bytes:
        return cgroup

    def stand(text: bytes) -> None:
        nonlocal cgroup
        cgroup = text

    monkeypatch.setattr(procfs, "read_file", lambda _path, _what: MOUNTS)
    monkeypatch.setattr(procfs, "read_process", read_process)
    cgroups._mounts.cache_clear()
    monkeypatch.setattr(cgroups, "_mounts", cgroups._mounts.__wrapped__)
    return stand


def test_groups_of_both_versions_are_found(proc):
    proc(b"4:memory:/a/b\n6:cpu,freezer:/box/c\n1:name=systemd:/x\n0::/a\n")
    top = Path("/sys/fs/cgroup")
    v1, v2 = groups_of(1, "memory")
    assert v1 == Group(top / "memory/a/b", top / "memory", v2=False)
    assert v2 == Group(top / "unified/a", top / "unified", v2=True)
    assert v1.upwards == [top / "memory/a/b", top / "memory/a", top / "memory"]
    # mounted from /box on: that part of the path is not seen
    assert groups_of(1, "freezer")[0].folder == top / "freezer/c"


@pytest.mark.parametrize("text", [b"", b"\n", b"0", b"4:memory", b"::", b"4:memory:/\xff"])
def test_odd_lines_are_no_groups_or_whole_ones(proc, text):
    proc(text)
    for group in groups_of(1, "memory"):
        assert group.folder.is_relative_to(group.top)


class Tree:
    """Groups below ``top``, of one version, around the processes that the test names."""

    def __init__(self, top: Path, v2: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        self.top, self.v2 = top, v2
        self._of: dict[int, str] = {}
        monkeypatch.setattr(cgroups, "groups_of", self._groups_of)

    def _groups_of(self, pid: int, controller: str) -> list[Group]:
        assert controller == "memory"
        if pid not in self._of:
            raise TargetGoneError("gone")
        return [Group(self.top / self._of[pid], self.top, self.v2)]

    def put(self, pid: int, path: str) -> None:
        """Have *pid* stand in the group *path*."""
        self._of[pid] = path

    def group(
        self, path: str, limit: int | None, taken: int, files: int = 0, high: int | None = None
    ) -> None:
        """Make a group, of bytes."""
        folder = self.top / path
        folder.mkdir(parents=True)
        names = ("memory.max", "memory.current") if self.v2 else (
            "memory.limit_in_bytes", "memory.usage_in_bytes")  # fmt: skip
        none = "max" if self.v2 else "9223372036854771712"
        (folder / names[0]).write_text(f"{none if limit is None else limit}\n")
        (folder / names[1]).write_text(f"{taken}\n")
        if self.v2:
            (folder / "memory.high").write_text("max" if high is None else str(high))
        prefix = "" if self.v2 else "total_"
        (folder / "memory.stat").write_text(
            f"anon 7\n{prefix}inactive_file {files // 2}\n{prefix}active_file {files // 2}\n"
        )


@pytest.fixture(params=[True, False], ids=["v2", "v1"])
def tree(request, tmp_path, monkeypatch) -> Tree:
    return Tree(tmp_path, request.param, monkeypatch)


def test_without_a_limit_there_is_room(tree):
    tree.group("a", None, 5 * MIB)
    tree.put(1, "a")
    assert memcg.limits(1) == []
    assert memcg.tightest(1) is None
    assert memcg.lacking({1: 1 << 60}) == []


def test_a_process_that_is_gone_has_no_limit(tree):
    assert memcg.tightest(99) is None


def test_room_is_what_is_left_and_what_files_take(tree):
    tree.group("a", 640 * MIB, 600 * MIB, files=100 * MIB)
    tree.put(1, "a")
    (one,) = memcg.limits(1)
    assert one.folder == tree.top / "a"
    assert one.limit == 640 * MIB
    assert one.room == 140 * MIB - 10 * MIB  # a 64th of the limit is left alone
    assert "room for 130 MiB below its limit of 640 MiB" in str(one)


def test_of_groups_in_groups_the_tightest_counts(tree):
    tree.group("a", 3200 * MIB, 3150 * MIB)
    tree.group("a/b", None, 900 * MIB)
    tree.group("a/b/c", 1600 * MIB, 600 * MIB)
    tree.put(1, "a/b/c")
    assert [one.folder.name for one in memcg.limits(1)] == ["c", "a"]
    tight = memcg.tightest(1)
    assert tight is not None
    assert tight.folder.name == "a"
    assert tight.room == 50 * MIB - 16 * MIB  # never more than 16 MiB is left alone


def test_what_processes_of_one_group_need_adds_up(tree):
    tree.group("a", 640 * MIB, 330 * MIB)  # room for 300
    tree.group("b", 640 * MIB, 330 * MIB)
    for pid, path in ((1, "a"), (2, "a"), (3, "b")):
        tree.put(pid, path)
    assert memcg.lacking({1: 200 * MIB, 3: 300 * MIB}) == []
    ((limit, needed),) = memcg.lacking({1: 200 * MIB, 2: 101 * MIB, 3: 300 * MIB})
    assert limit.folder.name == "a"
    assert needed == 301 * MIB


def test_where_threads_wait_counts_for_what_is_given_back_and_not_for_merging(
    tmp_path, monkeypatch
):
    tree = Tree(tmp_path, True, monkeypatch)
    tree.group("a", 640 * MIB, 310 * MIB, high=320 * MIB)
    tree.put(1, "a")
    high, hard = memcg.tightest(1), memcg.tightest(1, hard=True)
    assert high is not None
    assert hard is not None
    assert (high.file.name, high.room) == ("memory.high", 5 * MIB)
    assert (hard.file.name, hard.room) == ("memory.max", 320 * MIB)
    assert "(memory.high)" in str(high)
    assert Room().take(1, 6 * MIB) == high
    assert Room(hard=True).take(1, 6 * MIB) is None
    ((limit, needed),) = memcg.lacking({1: 6 * MIB})
    assert (limit, needed) == (high, 6 * MIB)


def test_a_full_group_has_no_room_and_says_so(tree):
    tree.group("a", 64 * MIB, 64 * MIB)
    tree.put(1, "a")
    (one,) = memcg.limits(1)
    assert one.room < 0
    assert "room for 0 MiB" in str(one)


def test_who_needs_nothing_finds_room_in_a_full_group_and_on_a_full_host(tree, monkeypatch):
    tree.group("a", 64 * MIB, 64 * MIB)
    tree.put(1, "a")
    monkeypatch.setattr(procfs, "mem_available", lambda: 0)
    assert memcg.lacking({1: 0}) == []
    check(1, 0)
    with pytest.raises(NotEnoughMemoryError, match="only 0 MiB are available"):
        check(1, MIB)
    monkeypatch.setattr(procfs, "mem_available", lambda: 1 << 40)
    with pytest.raises(NotEnoughMemoryError, match="room for 0 MiB"):
        check(1, MIB)


def test_what_a_check_refuses_it_explains(tree):
    tree.group("a", 64 * MIB, 32 * MIB)
    tree.put(1, "a")
    check(1, 20 * MIB)
    with pytest.raises(NotEnoughMemoryError) as caught:
        check(1, 40 * MIB)
    assert "process 1 takes 40 MiB" in str(caught.value)
    assert "room for 31 MiB below its limit of 64 MiB" in str(caught.value)
    assert f"({LIMIT_FILES[tree.v2]})" in str(caught.value)
    assert caught.value.hint


def test_our_own_limit_counts_where_it_is_less_than_the_host_has(tree, monkeypatch):
    tree.put(os.getpid(), "a")
    tree.group("a", 64 * MIB, 32 * MIB)
    assert memcg.available() == 31 * MIB
    (tree.top / "a" / LIMIT_FILES[tree.v2]).write_text(str(1 << 60))
    monkeypatch.setattr(procfs, "may_be_promised", lambda: None)
    assert memcg.available() == pytest.approx(procfs.mem_available(), rel=0.2)
    monkeypatch.setattr(procfs, "may_be_promised", lambda: 3 * MIB)
    assert memcg.available() == 3 * MIB


def test_room_is_taken_and_asked_for_anew(tree, monkeypatch):
    tree.group("a", 64 * MIB, 43 * MIB)  # room for 20
    tree.put(1, "a")
    asked = []
    tightest = memcg.tightest

    def ask(pid: int, *, hard: bool) -> memcg.Limit | None:
        asked.append(pid)
        return tightest(pid, hard=hard)

    monkeypatch.setattr(memcg, "tightest", ask)
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    room = Room()
    assert room.take(1, 8 * MIB) is None
    assert room.take(1, 8 * MIB) is None
    assert len(asked) == 1
    assert room.take(1, 8 * MIB) is None  # by its own account too much: but the group has it
    assert len(asked) == 2
    limit = room.take(1, 21 * MIB)
    assert limit is not None
    assert limit.room == 20 * MIB
    now += 1.0
    assert room.take(1, MIB) is None
    assert len(asked) == 4
