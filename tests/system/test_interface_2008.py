"""The interface of the 2008 patch, row by row: each of its calls and promises, as ksmd keeps it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from harness import PAGE, Daemon, contents, frames, mappings, store_mappings, target, until
from programs import NOBODY, Raw, lines_of

from ksmd.client import Client
from ksmd.kernel import pageentries
from ksmd.kernel.pagemap import PageMap

pytestmark = pytest.mark.root


@pytest.fixture
def daemon(open_daemons):
    return open_daemons()


@pytest.fixture
def root(daemon):
    raw = Raw.connect(daemon.socket)
    yield raw
    raw.close()


def distinct(*arenas) -> int:
    """Count the frames that some arenas take, together."""
    return len(np.unique(np.concatenate([frames(arena) for arena in arenas])))


def register_all(root: Raw, *victims, sma: int = 0) -> int:
    sma = sma or root.call("CreateSharedMemoryArea")["sma"]
    for victim in victims:
        start, npages = victim.region
        root.call(
            "RegisterMemoryRegion", sma=sma, addr=start, npages=npages, pid=victim.pid, domain="d"
        )
    return sma


# -- KSM_GET_API_VERSION -------------------------------------------------------------------------


def test_ksm_get_api_version(module_daemon, puppets):
    """It is 1 for everybody, as the patch's KSM_API_VERSION."""
    assert puppets(module_daemon.socket).raw.call("GetApiVersion") == {"version": 1}
    assert Raw.connect(module_daemon.socket).call("GetApiVersion") == {"version": 1}


# -- KSM_CREATE_SHARED_MEMORY_AREA ---------------------------------------------------------------


def test_ksm_create_shared_memory_area(module_daemon, puppets):
    """Areas are the connection's: others cannot use them, and they end with it."""
    one, other = puppets(module_daemon.socket), puppets(module_daemon.socket)
    first, second = (one.raw.call("CreateSharedMemoryArea")["sma"] for _ in range(2))
    assert first != second
    failure = other.raw.failure("RemoveMemoryRegion", sma=first)
    assert (failure.name, failure.parameters["sma"]) == ("NoSuchArea", first)
    assert Raw.connect(module_daemon.socket).failure("Share", sma=first).name == "NoSuchArea"
    assert one.raw.call("RemoveMemoryRegion", sma=first) == {"regions": 0}


# -- KSM_REGISTER_MEMORY_REGION ------------------------------------------------------------------


def test_ksm_register_memory_region(daemon, puppets):
    """npages and addr, of the caller's own memory; what is registered is what is scanned."""
    puppet = puppets(daemon.socket, pages=64)
    assert puppet.register(8, 16) == {"domain": f"uid:{NOBODY}"}
    assert puppet.share()["scanned"] == 2 * 16
    (line,) = lines_of(daemon, puppet)
    assert (line["name"], line["domain"]) == ("registered", f"uid:{NOBODY}")
    assert daemon.status()["pages_unshared"] == 16
    areas = puppet.raw.call("Why", pid=puppet.pid)["areas"]
    start = puppet.address + 8 * PAGE
    assert [(area["start"], area["end"]) for area in areas] == [(start, start + 16 * PAGE)]


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"addr": 1}, ""),
        ({"npages": 0}, ""),
        ({"npages": -1}, ""),
        ({"npages": 1 << 80}, ""),
        ({"addr": 1 << 47}, ""),
        ({"addr": -PAGE}, ""),
        ({"addr": 1 << 70}, ""),
        ({"addr": 0}, "not-mapped"),
        ({"npages": 1 << 20}, "not-mapped"),
    ],
)
def test_ksm_register_memory_region_refuses_wrong_ranges(wrong, reason, module_daemon, puppets):
    puppet = puppets(module_daemon.socket)
    sma = puppet.raw.call("CreateSharedMemoryArea")["sma"]
    given = {"addr": puppet.address, "npages": puppet.pages} | wrong
    if wrong.get("npages") == 1 << 20:
        given["addr"] = puppet.address + (puppet.pages - 1) * PAGE
    failure = puppet.raw.failure("RegisterMemoryRegion", sma=sma, **given)
    assert failure.name == "InvalidRegion"
    assert failure.parameters["reason"] in {reason, "shared-mapping", "file-backed", "not-writable"}
    assert bool(failure.parameters["reason"]) == bool(reason)
    assert puppet.raw.call("RemoveMemoryRegion", sma=sma) == {"regions": 0}


def test_ksm_register_memory_region_refuses_overlaps_and_memory_that_is_no_anonymous_one(
    module_daemon, puppets
):
    puppet = puppets(module_daemon.socket)
    puppet.register(8, 16)
    for first, pages in ((0, 9), (8, 16), (23, 1), (0, 64)):
        addr = puppet.address + first * PAGE
        failure = puppet.raw.failure(
            "RegisterMemoryRegion", sma=puppet.sma, addr=addr, npages=pages
        )
        assert (failure.name, failure.parameters["reason"]) == ("InvalidRegion", "")
        assert "overlaps" in failure.parameters["message"]
    puppet.register(0, 8)
    puppet.register(24, 1)
    start, end = next(
        (start, end) for start, end, perms, path in mappings(puppet.pid) if "libc" in path
    )
    failure = puppet.raw.failure(
        "RegisterMemoryRegion", sma=puppet.sma, addr=start, npages=(end - start) // PAGE
    )
    assert failure.parameters["reason"] == "file-backed"


# -- KSM_REMOVE_MEMORY_REGION --------------------------------------------------------------------


def test_ksm_remove_memory_region(daemon, root, victims):
    """It forgets the area's regions and unmerges them; the contents are as they were."""
    pair = [victims("idle", layout="runs:long", pages=256, seed=5) for _ in range(2)]
    separate = distinct(*pair)
    sma = register_all(root, *pair)
    assert root.call("Share", sma=sma)["merged"] > 0
    assert distinct(*pair) < separate
    assert root.call("RemoveMemoryRegion", sma=sma, wait=True) == {"regions": 2}
    assert not any(store_mappings(victim.pid) for victim in pair)
    assert distinct(*pair) == separate
    assert all(victim.check() for victim in pair)
    assert daemon.status()["targets"] == []


# -- KSM_CREATE_SCAN, KSM_SCAN -------------------------------------------------------------------


def test_ksm_create_scan_and_ksm_scan(daemon, puppets):
    """Each scanner has a cursor of its own, on which it walks on; counts are held exactly."""
    puppet = puppets(daemon.socket, pages=250)
    first, second = (puppet.raw.call("CreateScan")["scan"] for _ in range(2))
    puppet.register()

    def scan(scanner: int, pages: int) -> int:
        done = puppet.raw.call("Scan", scan=scanner, pages_to_scan=pages, max_pages_to_merge=9)
        assert done["merged"] == 0
        return int(done["scanned"])

    # a page is unshared when it was met twice: a cursor that started anew would meet 100 of them
    assert (scan(first, 100), scan(first, 100)) == (100, 100)
    assert daemon.status()["pages_unshared"] == 0
    assert scan(second, 30) == 30
    assert daemon.status()["pages_unshared"] == 30
    assert scan(first, 50) == 50
    assert daemon.status()["pages_unshared"] == 30
    assert scan(first, 100) == 100
    assert daemon.status()["pages_unshared"] == 100
    # at most twice over everything in one call, however many pages it is allowed
    rest = scan(first, 1 << 31)
    assert 500 <= rest <= 750
    assert daemon.status()["pages_unshared"] == 250
    assert daemon.status()["pages_scanned"] == 100 + 100 + 30 + 50 + 100 + rest


def test_ksm_scan_merges_no_more_than_max_pages_to_merge(daemon, puppets):
    one, other = puppets(daemon.socket, pages=100), puppets(daemon.socket, pages=100)
    for puppet in (one, other):
        puppet.register()
    assert one.share()["merged"] == 0
    scanner = other.raw.call("CreateScan")["scan"]
    total = 0
    for most in (1, 10, 50, 100):
        done = other.raw.call("Scan", scan=scanner, pages_to_scan=1000, max_pages_to_merge=most)
        assert done["merged"] == min(most, 100 - total)
        total += done["merged"]
        assert int(np.count_nonzero(frames(one) == frames(other))) == total
    assert total == 100
    assert one.intact()
    assert other.intact()


def test_ksm_scan_without_anything_registered_is_eagain(daemon, root, puppets):
    puppet = puppets(daemon.socket)
    callers = [(raw, raw.call("CreateScan")["scan"]) for raw in (root, puppet.raw)]
    for raw, scanner in callers:
        failure = raw.failure("Scan", scan=scanner)
        assert failure.name == "NothingRegistered"
        assert failure.parameters["errno"] == errno.EAGAIN
    puppet.register()
    for raw, scanner in callers:
        assert raw.call("Scan", scan=scanner)["scanned"] > 0


def test_ksm_scan_does_nothing_without_its_run_flag_and_nothing_for_zero_pages(daemon, puppets):
    puppet = puppets(daemon.socket)
    puppet.register()
    scanner = puppet.raw.call("CreateScan")["scan"]
    assert puppet.raw.call("Scan", scan=scanner, flags=0)["scanned"] == 0
    assert puppet.raw.call("Scan", scan=scanner, pages_to_scan=0)["scanned"] == 0
    for name in ("pages_to_scan", "max_pages_to_merge", "flags"):
        failure = puppet.raw.failure("Scan", scan=scanner, **{name: -1})
        assert (failure.name, failure.parameters) == ("InvalidParameter", {"parameter": name})


@pytest.mark.parametrize("flags", [0, 2], ids=["stop", "unmerge"])
def test_ksm_scan_reads_and_merges_nothing_while_run_is(flags, daemon, root, puppets):
    one, other = puppets(daemon.socket), puppets(daemon.socket)
    for puppet in (one, other):
        puppet.register()
        puppet.share()
    for puppet in (one, other):
        puppet.raw.call("RemoveMemoryRegion", sma=puppet.sma, wait=True)
        puppet.register()
    info = {"sleep": 1000, "pages_to_scan": 100, "max_pages_to_merge": 100}
    root.call("StartStopThread", **info, flags=flags)
    scanner = one.raw.call("CreateScan")["scan"]
    for done in (one.share(), other.share(), one.raw.call("Scan", scan=scanner)):
        assert (done["scanned"] > 0, done["merged"], done["settled"]) == (True, 0, False)
    assert not store_mappings(one.pid) + store_mappings(other.pid)
    root.call("StartStopThread", **info, flags=1)
    for puppet in (one, other):
        puppet.share()
    until(lambda: np.array_equal(frames(one), frames(other)), "they merge, or the thread does")
    assert one.intact()
    assert other.intact()


def test_ksm_scan_of_a_user_covers_what_that_connection_registered(daemon, puppets):
    """GIVEN two programs of one user THEN a scan by one reads nothing of the other."""
    one, other = puppets(daemon.socket, pages=50), puppets(daemon.socket, pages=70, seed=2)
    for puppet in (one, other):
        puppet.register()
    scanner = one.raw.call("CreateScan")["scan"]
    assert one.raw.call("Scan", scan=scanner, pages_to_scan=10000)["scanned"] == 100
    assert daemon.status()["pages_unshared"] == 50
    assert one.raw.failure("Scan").name == "PermissionDenied"
    assert other.raw.failure("Scan", scan=scanner).name == "NoSuchScan"


def test_ksm_scanners_run_side_by_side(daemon, root, puppets, victims):
    """GIVEN six scanners at work at once, and root's scans THEN all is merged and all is right."""
    pairs = [[puppets(daemon.socket, pages=300, seed=s) for _ in range(2)] for s in (1, 2, 3)]
    own = [victims("idle", layout="mixed", pages=512, seed=7) for _ in range(2)]
    register_all(root, *own)
    everybody = [puppet for pair in pairs for puppet in pair]
    for puppet in everybody:
        puppet.register()
    failed: list[BaseException] = []

    def work(puppet) -> None:
        try:
            scanner = puppet.raw.call("CreateScan")["scan"]
            for _ in range(12):
                puppet.raw.call("Scan", scan=scanner, pages_to_scan=170, max_pages_to_merge=40)
                puppet.share()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(puppet,)) for puppet in everybody]
    for thread in threads:
        thread.start()
    with Client(daemon.socket) as ksmd:
        while any(thread.is_alive() for thread in threads):
            ksmd.call("Scan", wait=True)
    for thread in threads:
        thread.join()
    assert not failed
    for one, other in pairs:
        assert int(np.count_nonzero(frames(one) == frames(other))) == 300
    assert all(puppet.intact() for puppet in everybody)
    assert all(victim.check() for victim in own)
    daemon.give_back()
    assert all(puppet.intact() for puppet in everybody)
    assert all(victim.check() for victim in own)


# -- KSM_START_STOP_KTHREAD, KSM_GET_INFO_KTHREAD ------------------------------------------------


def test_ksm_start_stop_kthread_and_get_info(daemon, root, puppets):
    """What is set holds until a reload; the status says where each value comes from."""
    default = {"sleep": 20_000, "pages_to_scan": 25000, "max_pages_to_merge": 25000, "flags": 0}
    assert root.call("GetInfoThread") == default  # paused
    given = {"sleep": 1500, "pages_to_scan": 70, "max_pages_to_merge": 60, "flags": 1}
    assert root.call("StartStopThread", **given) == {}
    assert root.call("GetInfoThread") == given
    status = daemon.status()
    assert (status["run"], status["paused"]) == ("merge", False)
    assert set(status["sources"].values()) == {"StartStopThread"}
    root.call("StartStopThread", **given | {"flags": 0})
    assert daemon.status()["run"] == "stop"
    daemon.configure({"version": 1, "socket_mode": "0666", "scan": {"pages_to_scan": 99}})
    root.call("Reload")
    sources = daemon.status()["sources"]
    assert sources["scan.pages_to_scan"].startswith(f"{daemon.config}:")
    assert sources["run"] == "default"
    assert root.call("GetInfoThread") == default | {"pages_to_scan": 99, "flags": 1}
    for name, arguments in (("StartStopThread", given), ("GetInfoThread", {})):
        assert puppets(daemon.socket).raw.failure(name, **arguments).name == "PermissionDenied"


def test_what_ksm_start_stop_kthread_set_ends_with_the_daemon(tmp_path):
    given = {"sleep": 1500, "pages_to_scan": 70, "max_pages_to_merge": 60, "flags": 1}
    for _ in range(2):
        daemon = Daemon(tmp_path, {"version": 1, "scan": {"pages_to_scan": 88}})
        try:
            root = Raw.connect(daemon.socket)
            assert root.call("GetInfoThread")["pages_to_scan"] == 88
            assert daemon.status()["sources"]["scan.sleep_millisecs"] == "default"
            root.call("StartStopThread", **given)
            assert daemon.status()["sources"]["scan.sleep_millisecs"] == "StartStopThread"
            root.close()
        finally:
            daemon.close()


def test_ksm_start_stop_kthread_refuses_zero_counts_while_run_is_set(daemon, root):
    good = {"sleep": 0, "pages_to_scan": 1, "max_pages_to_merge": 1, "flags": 1}
    before = root.call("GetInfoThread")
    for name in ("pages_to_scan", "max_pages_to_merge"):
        failure = root.failure("StartStopThread", **good | {name: 0})
        assert (failure.name, failure.parameters["errno"]) == ("ZeroCounts", errno.EPERM)
    for wrong in ({"flags": 3}, {"flags": -1}, {"sleep": -1}, {"pages_to_scan": 1 << 32}):
        assert root.failure("StartStopThread", **good | wrong).name == "InvalidParameter"
    assert root.call("GetInfoThread") == before
    zeros = {"sleep": 0, "pages_to_scan": 0, "max_pages_to_merge": 0, "flags": 0}
    root.call("StartStopThread", **zeros)
    assert root.call("GetInfoThread") == zeros


def test_ksm_kthread_scans_what_is_registered_when_it_is_started(daemon, root, puppets):
    one, other = puppets(daemon.socket), puppets(daemon.socket)
    for puppet in (one, other):
        puppet.register()
    info = {"sleep": 1000, "pages_to_scan": 100, "max_pages_to_merge": 100}
    root.call("StartStopThread", **info, flags=1)
    until(lambda: np.array_equal(frames(one), frames(other)), "the thread merges")
    root.call("StartStopThread", **info, flags=2)
    until(lambda: not (store_mappings(one.pid) or store_mappings(other.pid)), "flags 2 unmerges")
    assert one.intact()
    assert other.intact()


# -- page_hash_size, rmap_hash_size, sha1_hash_size ----------------------------------------------


def test_page_hash_size_rmap_hash_size_and_sha1_hash_size(open_daemons, puppets):
    """A full table skips pages and counts them, and never grows past its size."""
    daemon = open_daemons(
        tables={"page_hash_size": 1024, "rmap_hash_size": 2048, "sha1_hash_size": 1024}
    )
    puppet = puppets(daemon.socket, pages=4000)
    puppet.register()
    for _ in range(3):
        refusals = puppet.share()["refusals"]
        assert refusals["table-full"] > 0
        status = daemon.status()
        assert 512 < status["pages_unshared"] <= 1024
    assert status["metadata_bytes"] < 4000 * 64
    assert puppet.intact()


# -- jhash bucket -> candidate; rmap oldindex -> re-hash -----------------------------------------


def test_rmap_oldindex_a_changed_page_is_volatile_and_placed_anew(daemon, puppets):
    """As with the rmap's oldindex: what changed since the last scan waits until it stands still."""
    puppet = puppets(daemon.socket, pages=40)
    puppet.register()
    scanner = puppet.raw.call("CreateScan")["scan"]

    def round_() -> int:
        puppet.raw.call("Scan", scan=scanner, pages_to_scan=40)
        return int(daemon.status()["pages_unshared"])

    assert [round_(), round_()] == [0, 40]
    puppet.ask("write 0 10")
    assert round_() == 30
    assert round_() == 40


# -- HMAC-SHA1 over the page heads; memcmp of the rest -------------------------------------------


def test_hmac_sha1_and_memcmp_pages_that_differ_in_their_last_bytes_are_never_merged(
    daemon, puppets
):
    """Equal heads make equal digests: only what is equal to the last byte is one page."""
    one, other = puppets(daemon.socket, pages=64), puppets(daemon.socket, pages=64)
    heads = [page[:-8] for page in contents(one)]
    for number, puppet in enumerate((one, other)):
        tails = [(7 if at % 4 == 0 else at + 1000 * number + 9).to_bytes(8) for at in range(64)]
        whole = b"".join(head + tail for head, tail in zip(heads, tails, strict=True))
        with Path(f"/proc/{puppet.pid}/mem").open("r+b", buffering=0) as mem:
            mem.seek(puppet.address)
            assert mem.write(whole) == len(whole)
        puppet.register()
        puppet.share()
        assert b"".join(contents(puppet)) == whole
    assert np.flatnonzero(frames(one) == frames(other)).tolist() == list(range(0, 64, 4))


# -- PageKsm: file-like, write-protected, unswappable --------------------------------------------


def test_pageksm_a_store_page_is_file_like_write_protected_and_unswappable(daemon, puppets):
    one, other = puppets(daemon.socket, pages=128), puppets(daemon.socket, pages=128)
    for puppet in (one, other):
        puppet.register()
        puppet.share()
    for puppet in (one, other):
        # one mapping, or one for each window that it took: a slow machine may need two
        merged = [entry for entry in mappings(puppet.pid) if "/memfd:ksmd" in entry[3]]
        assert sum(end - start for start, end, *_ in merged) == 128 * PAGE
        assert {perms for _, _, perms, _ in merged} == {"rw-p"}
        with PageMap(puppet.pid) as pagemap:
            entries = pagemap.entries(puppet.address // PAGE, 128)
        assert np.all(pageentries.is_file(entries))
        assert not [link for link in fd_links(puppet.pid) if "memfd:ksmd" in link]
    locked = Path(f"/proc/{daemon.pid}/status").read_text().partition("VmLck:")[2].split()[0]
    assert int(locked) >= 128 * 4
    wanted = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL | 0x10  # FUTURE_WRITE
    seals = [seals_of(path) for path in store_fds(daemon.pid)]
    assert seals
    assert all(found & wanted == wanted for found in seals)


def fd_links(pid: int) -> list[str]:
    return [os.fspath(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir()]


def store_fds(pid: int) -> list[Path]:
    found = Path(f"/proc/{pid}/fd").iterdir()
    return [fd for fd in found if "memfd:ksmd" in os.fspath(fd.readlink())]


def seals_of(path: Path) -> int:
    fd = os.open(path, os.O_RDONLY)
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    finally:
        os.close(fd)


# -- page_wrprotect -> compare -> replace_page; the O_DIRECT check -------------------------------


_PINNED = """
import mmap, random, sys, time, ctypes, json
from ksmd.client import SharedMemoryArea
from ksmd.kernel.iouring import PinRing
m = mmap.mmap(-1, 64 * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
m[:] = random.Random(1).randbytes(len(m))
at = ctypes.addressof(ctypes.c_char.from_buffer(m))
ring = PinRing()
ring.pin(at, len(m))
with SharedMemoryArea(sys.argv[1]) as area:
    area.register(m)
    print(json.dumps([at, area.share()]), flush=True)
    sys.stdin.read()
"""


def test_replace_page_refuses_pages_with_input_or_output_under_way(daemon, puppets):
    """A pinned page is written to behind the page table: the patch's check of the page count."""
    twin = puppets(daemon.socket, uid=0)
    twin.register()
    twin.share()
    pinned = subprocess.Popen(
        [sys.executable, "-c", _PINNED, str(daemon.socket)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert pinned.stdout is not None
        _address, done = json.loads(pinned.stdout.readline())
        assert done["merged"] == 0
        assert not store_mappings(pinned.pid)
        (line,) = [line for line in daemon.status()["targets"] if line["pid"] == pinned.pid]
        assert line["refused"] == "pinned-process"
        assert twin.intact()
    finally:
        pinned.communicate()


def test_page_wrprotect_and_replace_page_lose_no_write_of_a_busy_program(daemon, root, victims):
    """Quarantine, compare, map: a target that writes all the time keeps every word it wrote."""
    pair = [victims("write", layout="mixed", pages=512, seed=5) for _ in range(2)]
    sma = register_all(root, *pair)
    begun = time.monotonic()
    for round_ in range(4):
        root.call("Share", sma=sma)
        root.call("RemoveMemoryRegion", sma=sma, wait=True)
        assert all(victim.check() for victim in pair), round_
        register_all(root, *pair, sma=sma)
    print(time.monotonic() - begun)


def test_rules_and_registrations_are_scanned_by_one_thread(open_daemons, puppets, victims):
    """What rules select and what programs register share one domain where both say so."""
    victim = victims("idle", layout="runs:long", pages=256, seed=8)
    daemon = open_daemons(targets=[target(victim)])
    other = victims("idle", layout="runs:long", pages=256, seed=8)
    root = Raw.connect(daemon.socket)
    register_all(root, other)
    separate = distinct(victim, other)
    daemon.scan()
    assert distinct(victim, other) < separate
    root.close()
    until(lambda: not store_mappings(other.pid), "given back")
    assert store_mappings(victim.pid)
    assert victim.check()
    assert other.check()
