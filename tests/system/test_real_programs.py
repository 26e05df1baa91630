"""Real programs that check themselves, while everything of theirs is merged as fast as possible.

Each has an oracle of its own (a checksum, a verifying mode, a consistency checker), and a number of
pages that must have been merged at least, since a test that merges nothing proves nothing. What
they need is installed by tests/programs, which also runs the long round.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from crowd import SECONDS, SHORT_SECONDS, Crowd, need
from guest import guest_memory

pytestmark = [pytest.mark.root, pytest.mark.slow]

VICTIMS = Path(__file__).parents[1] / "victims"
LIBRARIES = Path("/usr/lib/x86_64-linux-gnu")


@pytest.fixture
def crowd(daemons) -> Callable[..., Crowd]:
    return lambda least, **options: Crowd(daemons, least, **options)


# -- programs made to test memory ------------------------------------------------------------------

STRESS = {
    "vm": "--vm 2 --vm-bytes 32m --vm-method all --vm-keep",
    "malloc": "--malloc 2 --malloc-bytes 32m --malloc-touch --bigheap 1 --bigheap-growth 16k",
    "mmap": "--mmap 2 --mmap-bytes 32m --munmap 1 --mprotect 1 --brk 1 --stack 1",
    "sort": "--qsort 1 --mergesort 1 --heapsort 1 --tree 1 --matrix 1 --memcpy 1",
    "children": "--fork 1 --fork-vm --vfork 1 --vfork-max 16 --clone 1 --clone-max 16"
    " --exec 1 --exec-max 4",
    "madvise": "--madvise 2 --mmapaddr 1 --mlock 1 --memfd 1 --remap 1 --vm-rw 1",
    "io": "--aio 1 --aiol 1 --io-uring 1 --vm-splice 1 --sigsegv 1",
    "memrate": "--memthrash 1 --memrate 1 --memrate-bytes 32m --shm 1 --ptrace 1",
}
if SECONDS > SHORT_SECONDS:
    # as many processes as there is memory for: it takes them longer to end than a short round lasts
    STRESS["vforkmany"] = "--vforkmany 1"


@pytest.mark.parametrize("name", STRESS)
def test_stress_ng_verifies_what_it_does(crowd, tmp_path, name):
    need("stress-ng")
    with crowd(100, breaths=True) as it:
        # a dozen busy processes leave the daemon little of two processors: it is to go first
        command = ["nice", "stress-ng", *STRESS[name].split(), "--verify", "--oomable"]
        stress = it.start(*command, "--timeout", "1h", cwd=tmp_path)
        it.work()
        said = it.interrupt(stress)
        assert "fail:" not in said, said
        assert "passed" in said or "successful run completed" in said, said


def test_a_program_that_handles_page_faults_itself_is_left_to_it(crowd, tmp_path):
    """Nor is it held by SIGSTOP: any stop takes a fault back, which stress-ng calls a failure."""
    need("stress-ng")
    with crowd(0) as it:
        stress = it.start(
            "stress-ng", "--userfaultfd", "2", "--verify", "--timeout", "1h", cwd=tmp_path
        )
        it.work()
        it.settle()
        said = it.interrupt(stress)
        assert "fail:" not in said, said
        assert it.stirrer.figures.scans >= 2, it.stirrer.figures


def test_memtester_finds_no_fault(crowd):
    need("memtester", "prlimit")
    with crowd(500, breaths=True) as it:
        for _ in it.rounds():
            # locked memory is never merged: as nobody, without a limit to lock in, it goes on
            pair = [
                it.start("prlimit", "--memlock=0", "memtester", "12M", "1",
                         user="nobody", group="nogroup", extra_groups=[])
                for _ in range(2)
            ]  # fmt: skip
            for tester in pair:
                said, _ = tester.communicate(timeout=600)
                assert tester.returncode == 0, said
                assert "FAILURE" not in said, said


# -- data stores -----------------------------------------------------------------------------------


def test_two_redis_with_one_data_set_keep_its_digest(crowd, tmp_path):
    need("redis-server")
    with crowd(2000) as it:
        places = [tmp_path / "a.sock", tmp_path / "b.sock"]

        def ask(place: Path, *command: str) -> str:
            done = subprocess.run(
                ["redis-cli", "-s", place, *command],
                capture_output=True, text=True, timeout=120, check=True,
            )  # fmt: skip
            return done.stdout.strip()

        servers = []
        for place in places:
            (tmp_path / place.stem).mkdir()
            servers.append(
                it.start(
                    "redis-server", "--port", "0", "--unixsocket", str(place), "--save", "",
                    "--enable-debug-command", "local", "--dir", str(tmp_path / place.stem),
                    stdout=subprocess.DEVNULL,
                )
            )  # fmt: skip
        for place in places:
            while not place.exists():
                time.sleep(0.05)
            assert ask(place, "debug", "populate", "60000", "key", "120") == "OK"
        digests = {ask(place, "debug", "digest") for place in places}
        assert len(digests) == 1
        it.settle()
        for _ in it.rounds():
            load = [
                subprocess.Popen(
                    ["redis-benchmark", "-s", place, "-n", "20000", "-r", "5000", "-q",
                     "--dbnum", "9", "-t", "set,get,lpush,lpop,hset,spop,zadd"],
                    stdout=subprocess.DEVNULL,
                )
                for place in places
            ]  # fmt: skip
            for place in places:
                ask(place, "bgsave")
            assert [one.wait(300) for one in load] == [0, 0]
            for place in places:
                ask(place, "-n", "9", "flushdb")
                assert {ask(place, "debug", "digest")} == digests
                while "rdb_bgsave_in_progress:1" in ask(place, "info", "persistence"):
                    time.sleep(0.05)
                assert "rdb_last_bgsave_status:ok" in ask(place, "info", "persistence")
        for place in places:
            assert ask(place, "debug", "reload") == "OK"
            assert {ask(place, "debug", "digest")} == digests
        assert [it.end(server) for server in servers] == [0, 0]


def free_port() -> str:
    """Give a port of the loopback interface that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def test_memcached_returns_what_was_stored(crowd):
    need("memcached", "memcaslap")
    with crowd(20) as it:
        ports = [free_port() for _ in range(2)]
        room = max(64, int(8 * SECONDS))  # MiB: what it evicts is missing, and would be a miss
        for port in ports:
            it.start("memcached", "-u", "nobody", "-l", "127.0.0.1", "-p", port, "-U", "0",
                     "-m", str(room))  # fmt: skip
        time.sleep(0.5)
        hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
        said = it.run(
            "memcaslap", "-s", hosts, "-t", f"{max(3, SECONDS):.0f}s", "-v", "0.5", "-c", "8",
            "-T", "2", "-X", "1024",
        )  # fmt: skip
        assert "verify_failed: 0" in said, said
        assert "verify_misses: 0" in said, said
        it.settle()
        for port in ports:
            it.run("memccapable", "-h", "127.0.0.1", "-p", port, "-a")


@pytest.fixture
def postgres() -> Iterator[tuple[Path, Path]]:
    """A place that the user postgres can reach, and the newest server's programs."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not found:
        pytest.skip("needs postgresql: run tests/programs")
    place = subprocess.run(
        ["mktemp", "-d", "/tmp/ksmd-postgres-XXXXXX"], capture_output=True, text=True, check=True
    ).stdout.strip()
    subprocess.run(["chown", "postgres", place], check=True)
    yield Path(place), found[-1]
    subprocess.run(["rm", "-r", place], check=True)


def test_postgres_keeps_its_books_and_its_indexes(crowd, postgres):
    place, programs = postgres
    as_postgres = {"user": "postgres", "group": "postgres", "extra_groups": [], "cwd": place}
    subprocess.run(
        [programs / "initdb", "-k", "-N", "-A", "trust", "-D", place / "data"],
        **as_postgres, check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip

    def ask(program: str, *arguments: str, patience: float = 120) -> str:
        done = subprocess.run(
            [programs / program, "-h", place, *arguments],
            **as_postgres, capture_output=True, text=True, timeout=patience, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    with crowd(20) as it:
        server = it.start(
            programs / "postgres", "-D", str(place / "data"), "-k", str(place), "-c",
            "listen_addresses=", "-c", "fsync=off", "-c", "shared_buffers=32MB",
            stdout=subprocess.DEVNULL, **as_postgres,
        )  # fmt: skip
        while not (place / ".s.PGSQL.5432").exists():
            assert server.poll() is None
            time.sleep(0.05)
        with contextlib.suppress(AssertionError):  # it may still be starting
            ask("pg_isready", "-t", "20")
        ask("pgbench", "-i", "-q", "-s", "3", "postgres")
        ask("psql", "-c", "create extension amcheck", "postgres")
        said = ask("pgbench", "-c", "4", "-T", f"{SECONDS:.0f}", "postgres", patience=SECONDS + 120)
        assert "number of failed transactions: 0 " in said, said
        ask("pg_amcheck", "--heapallindexed", "postgres")
        query = "select (select sum(abalance) from pgbench_accounts) = " \
                "(select sum(tbalance) from pgbench_tellers)"  # fmt: skip
        assert ask("psql", "-At", "-c", query, "postgres").strip() == "t"
        assert it.end(server) == 0


def test_sqlite_finds_its_databases_whole(crowd):
    need("sqlite3")
    fill = """
        create table t(id integer primary key, name text, body blob);
        with recursive n(i) as (select 1 union all select i + 1 from n where i < 60000)
            insert into t select i, 'name ' || i, zeroblob(i % 300) || 'body' from n;
        create index by_name on t(name);
    """
    check = "pragma integrity_check; select count(*), sum(length(body)), min(name) from t;\n"
    with crowd(500) as it:
        pair = [it.start("sqlite3", ":memory:", stdin=subprocess.PIPE) for _ in range(2)]
        for one in pair:
            one.stdin.write(fill)
            one.stdin.flush()
        it.settle()
        for rounds in it.rounds():
            for one in pair:
                one.stdin.write(
                    f"begin; delete from t where id % 7 = {rounds % 7}; rollback; {check}"
                )
                one.stdin.flush()
            it.stirrer.await_scan()
        for one in pair:
            said, _ = one.communicate(timeout=300)
            lines = said.splitlines()
            assert one.returncode == 0
            assert len(lines) == 2 * rounds, said
            assert set(lines[::2]) == {"ok"}, said
            assert len(set(lines[1::2])) == 1, said


# -- language runtimes and allocators --------------------------------------------------------------


def churn(it: Crowd, *command: str | Path, **options) -> None:
    """Two workers that say "ready", work until their stdin ends, and then say "OK"."""
    with it:
        pair = [it.start(*command, stdin=subprocess.PIPE, **options) for _ in range(2)]
        for worker in pair:
            line = worker.stdout.readline()
            assert line == "ready\n", line + worker.stdout.read()
        it.settle()
        it.work()
        for worker in pair:
            said, _ = worker.communicate("\n", timeout=300)
            assert worker.returncode == 0, said
            assert said.splitlines()[-1].startswith("OK "), said


ALLOCATORS = {
    "pymalloc": {},
    "glibc": {"PYTHONMALLOC": "malloc"},
    "jemalloc": {"PYTHONMALLOC": "malloc", "LD_PRELOAD": str(LIBRARIES / "libjemalloc.so.2")},
    "tcmalloc": {"PYTHONMALLOC": "malloc", "LD_PRELOAD": str(LIBRARIES / "libtcmalloc.so.4")},
    "mimalloc": {"PYTHONMALLOC": "malloc", "LD_PRELOAD": str(LIBRARIES / "libmimalloc.so.2.0")},
}


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_python_workers_keep_their_data_on_every_allocator(crowd, allocator):
    environment = ALLOCATORS[allocator]
    if "LD_PRELOAD" in environment:
        need(environment["LD_PRELOAD"])
    churn(crowd(2000), sys.executable, VICTIMS / "churn.py", env=os.environ | environment)


def test_node_workers_keep_their_data(crowd):
    need("node")
    churn(crowd(1000), "node", VICTIMS / "churn.js")


VERIFY = "-XX:+UnlockDiagnosticVMOptions -Xmx96m "
COLLECTORS = {
    "serial": VERIFY + "-XX:+UseSerialGC -XX:+VerifyBeforeGC -XX:+VerifyAfterGC",
    "g1": VERIFY + "-XX:+UseG1GC -XX:+VerifyBeforeGC -XX:+VerifyAfterGC",
    "shenandoah": VERIFY + "-XX:+UseShenandoahGC -XX:+ShenandoahVerify",
    "z": VERIFY + "-XX:+UseZGC -XX:+ZVerifyRoots -XX:+ZVerifyObjects",
}


@pytest.mark.parametrize("collector", COLLECTORS)
def test_java_workers_keep_their_heaps(crowd, tmp_path, collector):
    need("java", "javac")
    subprocess.run(["javac", "-d", tmp_path, VICTIMS / "Churn.java"], check=True)
    options = COLLECTORS[collector].split()
    # Z maps its heap several times over, so it is shared memory: only the rest can be merged
    least = 20 if collector == "z" else 500
    churn(crowd(least), "java", *options, "-cp", str(tmp_path), "Churn")


# -- whole machines, and those who look into processes ---------------------------------------------


def test_guests_find_their_files_whole(crowd, tmp_path):
    kernel = Path(os.environ.get("KSMD_TEST_CACHE", "/var/cache/ksmd-tests")) / "vmlinuz"
    need("qemu-system-x86_64", "/bin/busybox", str(kernel))
    initrd = guest_memory(tmp_path)
    with crowd(4000) as it:
        logs = [tmp_path / f"guest{n}" for n in range(2)]
        guests = [
            it.start(
                "qemu-system-x86_64", "-accel", "tcg,tb-size=16", "-m", "112", "-kernel",
                str(kernel), "-initrd", str(initrd), "-append", "console=ttyS0 quiet nokaslr",
                "-display", "none", "-serial", f"file:{log}", "-no-reboot", "-nic", "none",
            )
            for log in logs
        ]  # fmt: skip

        def rounds(log: Path) -> int:
            said = log.read_text(errors="replace") if log.exists() else ""
            assert "CORRUPT" not in said, said
            assert "panic" not in said, said
            return said.count("OK ")

        def go_on(more: int) -> None:
            goals = {log: rounds(log) + more for log in logs}
            deadline = time.monotonic() + 120
            while any(rounds(log) < goal for log, goal in goals.items()):
                assert all(guest.poll() is None for guest in guests)
                assert time.monotonic() < deadline, "a guest stands still"
                time.sleep(0.1)

        go_on(1)
        it.settle()
        it.work()
        go_on(2)


def test_valgrind_sees_no_error_in_a_merged_program(crowd, tmp_path):
    need("valgrind")
    numbers = tmp_path / "numbers"
    numbers.write_text("\n".join(str(n * 7919 % 200003) for n in range(200_000)))
    command = ["sort", "-n", "-S", "8M", str(numbers)]
    expected = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    with crowd(500) as it:
        for _ in it.rounds():
            pair = [it.start("valgrind", "-q", "--error-exitcode=9", *command) for _ in range(2)]
            for one in pair:
                said, _ = one.communicate(timeout=300)
                assert one.returncode == 0, said[-2000:]
                assert said == expected


def look(it: Crowd, victim, image: Path, core: Path) -> None:
    """Have gdb copy the arena of a live process, and dump the process."""
    address, npages = victim.region
    arena = f"{address} {address + npages * 4096}"
    commands = ["info threads", f"dump binary memory {image} {arena}", f"gcore {core}", "detach"]
    said = ""
    for _ in range(20):
        process = it.start(
            "gdb", "-q", "-batch", "-p", str(victim.pid), *(w for c in commands for w in ("-ex", c))
        )
        said, _ = process.communicate(timeout=120)
        # one tracer at a time: whoever comes in the middle of a stop window has to come again
        if "ptrace: Operation not permitted" not in said:
            break
    assert f"Saved corefile {core}" in said, said
    it.run(
        "gdb", "-q", "-batch", "-c", str(core), "-ex", f"dump binary memory {image}.core {arena}"
    )


def test_gdb_looks_into_a_merged_process_and_dumps_it_whole(crowd, tmp_path, victims):
    need("gdb")
    pair = [victims("writers", pages=2048) for _ in range(2)]
    image, core = tmp_path / "image", tmp_path / "core"
    with crowd(1000) as it:
        it.adopt(*(victim.pid for victim in pair))
        it.settle()
        for _ in it.rounds():
            for victim in pair:
                look(it, victim, image, core)
                assert image.read_bytes() == Path(f"{image}.core").read_bytes()
                assert victim.check(), victim.report()
    for victim in pair:
        assert victim.check(), victim.report()
