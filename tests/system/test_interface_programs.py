"""Programs that have their own memory shared: what they get, what they see, and how it ends."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from harness import Held, contents, descriptors, frames, state, store_mappings, target, until
from programs import NOBODY, RESOURCES, CallFailedError, Raw, lines_of
from victims import fields

from ksmd.cli import manual
from ksmd.client import Client, SharedMemoryArea

pytestmark = pytest.mark.root

#: The promise itself, not a guess at how fast it should be.
WITHIN = 1.0
#: Where the compiler finds what `ksmd install` puts into include/.
ENVIRONMENT = {**os.environ, "CPATH": str(RESOURCES)}


def same_frames(one, other, pages=slice(None)) -> int:
    """Count pages of two arenas that lie in one and the same frame."""
    here, there = frames(one)[pages], frames(other)[pages]
    return int(np.count_nonzero((here == there) & (here != 0)))


def test_a_c_and_a_python_program_of_no_privilege_share_memory_through_the_daemon(
    open_daemons, examples
):
    """GIVEN two instances each, WHEN each shares its table THEN both hold the same frames."""
    daemon = open_daemons()
    for language in ("c", "python"):
        first = examples(language, daemon.socket)
        assert (first.told["merged"], first.told["intact"]) == (0, 1)
        second = examples(language, daemon.socket)
        pages = second.told["pages"]
        assert (second.told["merged"], second.told["intact"]) == (pages, 1)
        assert same_frames(first, second) == pages
        assert first.again()["intact"] == 1
        for program in (first, second):
            assert "Uid:\t65534\t65534\t65534\t65534" in status_of(program.pid)
        assert first.end() == 0
        assert second.end() == 0


def test_the_commands_of_the_manual_show_it_end_to_end(open_daemons, tmp_path):
    """GIVEN the example, built and started as the manual says THEN the second one shares."""
    text = manual.markdown("ksmd.8").partition("# PROGRAMS THAT")[2].partition("\n# ")[0]
    build, first, second = re.findall(r"^ {4}((?:cc|sleep|\./share) .*)$", text, re.MULTILINE)
    daemon = open_daemons()
    shutil.copy(RESOURCES / "examples" / "share.c", tmp_path)
    subprocess.run(["sh", "-c", build], cwd=tmp_path, env=ENVIRONMENT, check=True)
    script = f"""
        share() {{ ./share {daemon.socket} 4; }}
        {first.replace("sleep 60 |", "mkfifo hold; cat hold |").replace("./share", "share > one")}
        exec 3> hold
        until test -s one; do sleep 0.01; done
        {second.replace("./share", "share > two")}
        exec 3>&-
        wait
    """
    subprocess.run(["sh", "-ec", script], cwd=tmp_path, check=True, timeout=60)
    one, two = (fields((tmp_path / name).read_text()) for name in ("one", "two"))
    assert (one["pages"], one["merged"], one["intact"]) == (1024, 0, 1)
    assert (two["pages"], two["merged"], two["intact"]) == (1024, 1024, 1)
    until(lambda: daemon.status()["targets"] == [], "both are forgotten")


def test_a_c_program_and_a_python_program_share_with_each_other(open_daemons, examples, puppets):
    """GIVEN a C program and a Python process whose pages are equal THEN they share frames."""
    daemon = open_daemons()
    program = examples("c", daemon.socket)
    puppet = puppets(daemon.socket, pages=program.told["pages"])
    write_into(puppet, b"".join(contents(program)))
    puppet.register()
    assert puppet.share()["merged"] == puppet.pages
    assert same_frames(program, puppet) == puppet.pages
    assert program.again()["intact"] == 1


def write_into(puppet, data: bytes) -> None:
    with Path(f"/proc/{puppet.pid}/mem").open("r+b", buffering=0) as mem:
        mem.seek(puppet.address)
        assert mem.write(data) == len(data)


def status_of(pid: int) -> str:
    return Path(f"/proc/{pid}/status").read_text()


def pair(open_daemons, puppets, pages=256):
    """Start two puppets of one user that share all they have."""
    daemon = open_daemons()
    one, other = puppets(daemon.socket, pages=pages), puppets(daemon.socket, pages=pages)
    for puppet in (one, other):
        puppet.register()
    assert one.share()["merged"] == 0
    assert other.share()["merged"] == pages
    assert same_frames(one, other) == pages
    return daemon, one, other


def test_share_returns_when_the_region_is_merged(open_daemons, puppets):
    """The synchronous merge: no scan of the daemon's, no waiting by the caller."""
    daemon, one, other = pair(open_daemons, puppets)
    status = daemon.status()
    assert status["paused"]
    assert status["full_scans"] == 0
    assert one.intact()
    assert other.intact()
    assert [line["merging_pages"] for line in status["targets"]] == [256, 256]
    assert other.share() == {"scanned": 0, "merged": 0, "settled": True, "refusals": {}}


def test_share_merges_all_of_what_is_more_than_one_plan_holds(open_daemons, puppets):
    """GIVEN 160 MiB each, while another program wants its own merged, THEN all of it is merged."""
    daemon = open_daemons()
    one, other = (puppets(daemon.socket, pages=40_000) for _ in range(2))
    few = [puppets(daemon.socket, pages=64, seed=2) for _ in range(2)]
    for puppet in (one, other, *few):
        puppet.register()
    one.share()
    few[0].share()
    other.raw.send("Share", sma=other.sma)
    assert few[1].share()["merged"] == 64
    # two of 40,000 contents have one checksum of 32 bits in one run of five: only one is shared
    few_less = 40_000 - 10
    assert few_less <= other.raw.receive()["merged"] <= 40_000
    assert few_less <= same_frames(one, other) <= 40_000
    assert all(puppet.intact() for puppet in (one, other, *few))


def test_a_write_to_a_shared_page_is_the_writers_own(open_daemons, puppets):
    _, one, other = pair(open_daemons, puppets)
    one.ask("write 3 5")
    assert other.intact()
    assert same_frames(one, other) == 254


def test_users_do_not_share_with_each_other(open_daemons, puppets):
    """GIVEN equal pages of two users WHEN both share THEN each keeps its own frames."""
    daemon = open_daemons()
    one, other = puppets(daemon.socket, uid=NOBODY), puppets(daemon.socket, uid=NOBODY - 1)
    assert one.register() == {"domain": f"uid:{NOBODY}"}
    assert other.register() == {"domain": f"uid:{NOBODY - 1}"}
    for puppet in (one, other, one):
        assert puppet.share()["merged"] == 0
    assert same_frames(one, other) == 0
    twin = puppets(daemon.socket, uid=NOBODY - 1)
    twin.register()
    assert twin.share()["merged"] == twin.pages
    assert same_frames(twin, other) == twin.pages
    assert same_frames(twin, one) == 0


@contextlib.contextmanager
def registrar(daemon, *victims) -> Iterator[int]:
    """A process of root's that registers other processes and shares them; its pid."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            ksmd = Client(daemon.socket)
            sma = ksmd.call("CreateSharedMemoryArea")["sma"]
            for victim in victims:
                start, pages = victim.region
                ksmd.call(
                    "RegisterMemoryRegion", sma=sma, addr=start, npages=pages, pid=victim.pid,
                    domain="d",
                )  # fmt: skip
            merged = ksmd.call("Share", sma=sma)["merged"]
            os.write(writer, str(merged).encode())
            signal.pause()
        finally:
            os._exit(1)
    os.close(writer)
    try:
        assert int(os.read(reader, 100)) > 0
        yield pid
    finally:
        os.close(reader)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def gone_within(promise: float, *victims) -> float:
    begun = time.monotonic()
    until(lambda: not any(store_mappings(v.pid) for v in victims), "unmerged", promise)
    return time.monotonic() - begun


@pytest.mark.parametrize("pages", [1024, 16384], ids=["4 MiB", "64 MiB"])
def test_a_killed_clients_regions_are_unmerged_within_a_second(pages, open_daemons, victims):
    """GIVEN regions that a client registered WHEN it is killed THEN they are unmerged in time."""
    daemon = open_daemons()
    one, other = (victims("idle", layout="runs:long", pages=pages, seed=3) for _ in range(2))
    with registrar(daemon, one, other) as pid:
        assert store_mappings(one.pid)
        assert store_mappings(other.pid)
        os.kill(pid, signal.SIGKILL)
        print(gone_within(WITHIN, one, other))
    assert one.check()
    assert other.check()
    assert same_frames(one, other) == 0
    until(lambda: daemon.status()["targets"] == [], "both are forgotten")


def test_so_are_those_of_a_killed_client_whose_child_keeps_the_connection(
    open_daemons, puppets, victims
):
    """The connection stays open in a child; the process that registered has ended."""
    daemon = open_daemons()
    one, other = (victims("idle", layout="runs:long", pages=256, seed=3) for _ in range(2))
    root = puppets(daemon.socket, uid=0)
    root.ask("fork")
    root.sma = root.raw.call("CreateSharedMemoryArea")["sma"]
    for victim in (one, other):
        start, pages = victim.region
        root.raw.call(
            "RegisterMemoryRegion", sma=root.sma, addr=start, npages=pages, pid=victim.pid
        )
    assert root.share()["merged"] > 0
    root.kill()
    gone_within(WITHIN, one, other)
    assert one.check()
    assert other.check()


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "never shared"])
def test_a_killed_client_that_nobody_waits_for_is_forgotten_within_a_second(
    shared, open_daemons, puppets
):
    """A zombie has its pid and its start time still, and no memory."""
    daemon = open_daemons()
    one, other = puppets(daemon.socket), puppets(daemon.socket)
    for puppet in (one, other):
        puppet.register()
        if shared:
            puppet.share()
    until(lambda: lines_of(daemon, other), "it is a target")
    with Client(daemon.socket) as ksmd:
        other.kill(reap=False)
        until(lambda: state(other.pid) == "Z", "it is a zombie")
        begun = time.monotonic()
        while any(line["pid"] == other.pid for line in ksmd.call("Targets")["targets"]):
            assert time.monotonic() - begun < WITHIN
            time.sleep(0.02)
    assert state(other.pid) == "Z"
    assert one.intact()


def test_that_holds_while_the_daemon_is_busy_with_what_others_asked_for(
    open_daemons, puppets, victims
):
    """GIVEN scans by root and by others without end WHEN a client dies THEN it does not wait."""
    big = victims("write", layout="unique", pages=20000)
    daemon = open_daemons(targets=[target(big)])
    one, other = (victims("idle", layout="runs:long", pages=256, seed=3) for _ in range(2))
    busy = puppets(daemon.socket, pages=2000, seed=9)
    busy.register()
    with registrar(daemon, one, other) as pid, Client(daemon.socket) as ksmd:
        progress = ksmd.stream("Scan", wait=True, until_settled=True)
        next(progress)
        busy.raw.send("Share", sma=busy.sma)
        os.kill(pid, signal.SIGKILL)
        gone_within(WITHIN, one, other)
    assert one.check()
    assert other.check()
    assert big.check()


@pytest.mark.parametrize("how", ["close", "remove", "killed twin"])
def test_a_program_gets_its_memory_back_when(how, open_daemons, puppets):
    daemon, one, other = pair(open_daemons, puppets)
    if how == "close":
        other.raw.hang_up()
    elif how == "remove":
        assert other.raw.call("RemoveMemoryRegion", sma=other.sma, wait=True) == {"regions": 1}
        assert not store_mappings(other.pid)
    else:
        other.kill()
        assert one.intact()
        assert store_mappings(one.pid)
        one.raw.hang_up()
        other = one
    gone_within(WITHIN, other)
    assert other.intact()
    assert one.intact()
    until(lambda: lines_of(daemon, other) == [], "no target any more")


def test_an_area_that_was_emptied_can_be_used_again(open_daemons, puppets):
    _, one, other = pair(open_daemons, puppets)
    other.raw.call("RemoveMemoryRegion", sma=other.sma, wait=True)
    other.register(0, 100)
    assert other.share()["merged"] == 100
    assert same_frames(one, other, slice(0, 100)) == 100
    assert same_frames(one, other) == 100
    assert other.intact()


def test_removing_one_of_two_areas_leaves_the_other_merged(open_daemons, puppets):
    daemon, one, other = pair(open_daemons, puppets)
    one.raw.call("RemoveMemoryRegion", sma=one.sma, wait=True)
    first = one.sma
    one.register(0, 128)
    one.sma = one.raw.call("CreateSharedMemoryArea")["sma"]
    one.register(128, 128)
    for area in (first, one.sma):
        one.raw.call("Share", sma=area)
    assert same_frames(one, other) == 256
    one.raw.call("RemoveMemoryRegion", sma=first, wait=True)
    assert same_frames(one, other) == 128
    assert same_frames(one, other, slice(128, 256)) == 128
    assert one.intact()
    assert other.intact()
    assert len(lines_of(daemon, one)) == 1


def test_what_a_rule_selects_stays_merged_when_its_registration_ends(open_daemons, puppets):
    """A process that both a rule and a client name is covered as both say; the rule outlives."""
    two = [puppets(None, uid=0, pages=128, seed=4) for _ in range(2)]
    first_half = [
        target(puppet, regions=[{"start": puppet.address, "npages": 64}]) for puppet in two
    ]
    daemon = open_daemons(targets=first_half)
    with Client(daemon.socket) as ksmd:
        sma = ksmd.call("CreateSharedMemoryArea")["sma"]
        for puppet in two:
            answer = ksmd.call(
                "RegisterMemoryRegion", sma=sma, addr=puppet.address + (64 << 12), npages=64,
                pid=puppet.pid,
            )  # fmt: skip
        daemon.scan()
        assert same_frames(*two) == 128
        assert ksmd.call(
            "RegisterMemoryRegion", sma=sma, addr=puppet.address, npages=1, pid=puppet.pid
        ) == {"domain": "d"}, answer  # the rule's, as it is one process
    until(lambda: same_frames(*two) == 64, "the registered half is given back")
    assert same_frames(*two, slice(0, 64)) == 64
    daemon.scan()
    assert same_frames(*two) == 64
    assert all(puppet.intact() for puppet in two)


def test_a_client_library_refuses_to_speak_for_a_forked_child(open_daemons):
    daemon = open_daemons()
    with SharedMemoryArea(daemon.socket) as area:
        pid = os.fork()
        if pid == 0:
            try:
                area.share()
            except RuntimeError:
                os._exit(7)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


def test_memory_of_an_exec_is_never_taken_for_what_was_registered(open_daemons, puppets):
    """GIVEN a registered process WHEN it runs another program THEN nothing of that is a target."""
    daemon, one, other = pair(open_daemons, puppets)
    other.ask("exec /bin/sleep 1000")
    until(lambda: "sleep" in (Path("/proc") / str(other.pid) / "comm").read_text(), "exec")
    daemon.scan()
    assert lines_of(daemon, other) == []
    assert other.raw.failure("Share", sma=other.sma).name in {"NothingRegistered", "TargetGone"}
    failure = other.raw.failure("RegisterMemoryRegion", sma=other.sma, addr=other.address, npages=1)
    assert failure.name == "TargetGone"
    assert one.intact()


def test_shared_pages_are_given_back_before_the_daemon_ends(open_daemons, puppets):
    daemon, one, other = pair(open_daemons, puppets)
    assert daemon.stop() == 0
    assert same_frames(one, other) == 0
    assert one.intact()
    assert other.intact()
    with pytest.raises((ConnectionError, CallFailedError)):
        one.share()


def test_a_pidfd_of_the_caller_is_held_only_while_it_has_an_area(open_daemons, puppets):
    """Thousands of callers come and go: what is kept of each must go with it."""
    daemon = open_daemons()
    before = len(descriptors(daemon.pid))
    for _ in range(5):
        puppet = puppets(daemon.socket, pages=8)
        puppet.register()
        puppet.share()
        puppet.raw.hang_up()
        held = Held(puppet.pid)
        assert not held.gone()
    until(lambda: daemon.status()["targets"] == [], "nothing is registered")
    until(lambda: len(descriptors(daemon.pid)) <= before, "descriptors come back")


def test_root_can_register_any_process_in_any_domain_and_each_is_one(open_daemons, puppets):
    daemon = open_daemons()
    two = [puppets(None, uid=uid, pages=64) for uid in (NOBODY, NOBODY - 1)]
    root = Raw.connect(daemon.socket)
    sma = root.call("CreateSharedMemoryArea")["sma"]
    for puppet in two:
        addr, npages = puppet.region
        given = {"sma": sma, "addr": addr, "pid": puppet.pid}
        assert root.call(
            "RegisterMemoryRegion", **given, npages=npages - 1, domain="together"
        ) == {"domain": "together"}  # fmt: skip
        given["addr"] = addr + (npages - 1 << 12)
        failure = root.failure("RegisterMemoryRegion", **given, npages=1, domain="apart")
        assert failure.name == "InvalidRegion"
        assert root.call("RegisterMemoryRegion", **given, npages=1) == {"domain": "together"}
    assert root.call("Share", sma=sma)["merged"] == 64
    assert same_frames(*two) == 64
    root.close()
    until(lambda: not any(store_mappings(puppet.pid) for puppet in two), "given back")
    assert all(puppet.intact() for puppet in two)
