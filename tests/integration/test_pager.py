"""The pager against the kernel: real processes with guarded memory, which check what they read."""

from __future__ import annotations

import json
import os
import re
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ksmd.guard import door, shadow
from ksmd.guard.client import Pager
from ksmd.guard.line import PagerGoneError, PagerRefusedError
from ksmd.guard.selftest import run as selftest
from ksmd.kernel import channel, iouring, libc, memfd, priority, userfaultfd
from ksmd.model.units import PAGE_SIZE

pytestmark = pytest.mark.root

PAGES = 1024
CAP_SYS_NICE = 1 << 23
CAP_SYS_RESOURCE = 1 << 24
#: Seconds; generous, as it only ends tests that would hang.
PATIENCE = 60.0


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("gcc") or shutil.which("cc")
    assert compiler, "these tests need a C compiler"
    source = Path(__file__).parent.parent / "victims" / "guarded.c"
    target = tmp_path_factory.mktemp("guarded") / "guarded"
    subprocess.run([compiler, "-O2", "-Wall", "-pthread", "-o", target, source], check=True)
    return target


@pytest.fixture(scope="module")
def store() -> Iterator[memfd.ExtentMap]:
    """An extent as in life: filled, sealed, locked and pinned."""
    extent = memfd.create_extent("ksmd-test-pager", PAGES)
    content = libc.view(extent.address, extent.length)
    for page in range(PAGES):
        word = (0xA5A5_0000_0000_0000 | page).to_bytes(8, "little")
        content[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = word * (PAGE_SIZE // 8)
    memfd.lock(extent)
    with iouring.PinRing() as pins:
        pins.pin(extent.address, extent.length)
        yield extent
    content.release()
    memfd.release(extent)


@pytest.fixture
def pager() -> Iterator[Pager]:
    pager = Pager()
    pager.start()
    yield pager
    pager.close(force=True)


class Guarded:
    """A process with guarded memory. ``context``: its guard context, ours to close."""

    def __init__(
        self, program: Path, store: memfd.ExtentMap, mode: str, pages: int, arg: int
    ) -> None:
        mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        mine.settimeout(PATIENCE)
        with its:
            self.process = subprocess.Popen(
                [program, mode, *map(str, (store.fd_ro, its.fileno(), pages, arg))],
                pass_fds=(store.fd_ro, its.fileno()),
                stdout=subprocess.PIPE,
                text=True,
            )
        self.line = mine
        data, fds, _, _ = socket.recv_fds(mine, 1, 1)
        assert data == b"g"
        self.context = fds[0]
        base = int.from_bytes(mine.recv(8, socket.MSG_WAITALL), "little")
        self.range = (base, base + pages * PAGE_SIZE)

    @property
    def pid(self) -> int:
        return self.process.pid

    def tell(self) -> None:
        self.line.sendall(b"!")

    def hear(self, expected: str) -> None:
        assert self.line.recv(1).decode() == expected

    def result(self) -> dict[str, Any]:
        out, _ = self.process.communicate(timeout=PATIENCE)
        assert self.process.returncode == 0, self.process.returncode
        result: dict[str, Any] = json.loads(out)
        return result

    def end(self) -> None:
        """Kill it; once more is no error."""
        if self.context < 0:
            return
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.line.close()
        os.close(self.context)
        self.context = -1


Start = Callable[..., Guarded]


@pytest.fixture
def start(program: Path, store: memfd.ExtentMap, pager: Pager) -> Iterator[Start]:
    """Start a process, guard it (settled or not), let it merge and run to its mode."""
    started: list[Guarded] = []

    def begin(
        mode: str, arg: int = 1, pages: int = 256, settle: bool = True, replace: bool = False
    ) -> Guarded:
        target = Guarded(program, store, mode, pages, arg)
        started.append(target)
        pager.guard(target.pid, target.context)
        pager.extend({target.pid: [target.range]})
        target.tell()
        target.hear("m")
        if replace:
            pager.restart()
        if settle:
            pager.settle({target.pid: [target.range]})
        target.tell()
        return target

    yield begin
    for target in started:
        target.end()


SETTLED = pytest.mark.parametrize("settle", [True, False], ids=["settled", "owed"])


def figures(request: pytest.FixtureRequest, **values: Any) -> None:
    print(f"\n  {request.node.name}: {values}")


def test_no_reader_ever_sees_store_content_after_a_drop(
    start: Start, pager: Pager, request: pytest.FixtureRequest
) -> None:
    result = start("hammer", arg=4, pages=PAGES).result()
    stats = pager.stats()
    figures(request, **result, stats=stats)
    assert result["bad"] == 0
    assert result["reads"] > 0
    assert stats["removes"] == result["drops"]


def test_a_dropped_range_is_answered_in_bulk(
    start: Start, pager: Pager, request: pytest.FixtureRequest
) -> None:
    result = start("latency", arg=300).result()
    stats = pager.stats()
    figures(request, **result, stats=stats)
    assert result["bad"] == 0
    assert stats["zeroed"] == 300 * 64
    assert stats["faults"] < 300 * 8


@SETTLED
def test_children_read_what_their_parent_had(
    start: Start, pager: Pager, request: pytest.FixtureRequest, settle: bool
) -> None:
    result = start("forks", arg=100, settle=settle).result()
    figures(request, **result, stats=pager.stats())
    assert result["bad"] == 0


@SETTLED
def test_a_child_that_drops_everything_at_once_reads_zeros(
    start: Start, pager: Pager, request: pytest.FixtureRequest, settle: bool
) -> None:
    result = start("dropall", arg=50, settle=settle).result()
    figures(request, **result, stats=pager.stats())
    assert result["bad"] == 0


@SETTLED
def test_grandchildren_inherit_content_drops_and_guard(
    start: Start, pager: Pager, request: pytest.FixtureRequest, settle: bool
) -> None:
    result = start("nest", arg=20, settle=settle).result()
    stats = pager.stats()
    figures(request, **result, stats=stats)
    assert result["bad"] == 0
    assert stats["forks"] == 60


@SETTLED
def test_moved_memory_stays_guarded_and_what_it_left_or_gained_is_zero(
    start: Start, pager: Pager, request: pytest.FixtureRequest, settle: bool
) -> None:
    result = start("remap", settle=settle).result()
    stats = pager.stats()
    figures(request, **result, stats=stats)
    assert result["bad"] == 0
    assert stats["remaps"] >= 2


@SETTLED
def test_partial_drops_leave_their_neighbours_alone(
    start: Start, pager: Pager, request: pytest.FixtureRequest, settle: bool
) -> None:
    result = start("partial", settle=settle).result()
    figures(request, **result, stats=pager.stats())
    assert result["bad"] == 0


@pytest.mark.parametrize(
    ("settle", "continued"),
    [(True, True), (False, True), (True, False)],
    ids=["settled", "owed", "settled, and left out by fork"],
)
def test_guard_pages_hold_and_come_back_as_zeros_in_children_too(
    start: Start,
    pager: Pager,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    settle: bool,
    continued: bool,
) -> None:
    """Installing a guard page has fork copy the page table from then on, whatever it did before."""
    if not continued:
        monkeypatch.setenv("GUARDED_NO_CONTINUE", "1")
    result = start("guards", arg=20, pages=PAGES, settle=settle).result()
    figures(request, **result, stats=pager.stats())
    assert result["bad"] == 0


@pytest.mark.parametrize("replace", [False, True], ids=["same pager", "replaced pager"])
@pytest.mark.parametrize(("mode", "arg"), [("forks", 20), ("dropall", 50), ("nest", 20)])
def test_a_child_whose_page_table_fork_left_out_is_filled_from_the_store(
    start: Start,
    pager: Pager,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    arg: int,
    replace: bool,
) -> None:
    monkeypatch.setenv("GUARDED_NO_CONTINUE", "1")
    result = start(mode, arg=arg, pages=PAGES, settle=False, replace=replace).result()
    stats = pager.stats()
    figures(request, **result, stats=stats)
    assert result["bad"] == 0
    if mode == "dropall":
        # what a child drops before the pager has come to fill it is owed no more
        assert stats["zeroed"] == arg * PAGES
    else:
        assert stats["filled"] > 0


def test_a_storm_of_drops_from_four_threads_is_answered_rightly(
    start: Start, pager: Pager, request: pytest.FixtureRequest
) -> None:
    result = start("storm", arg=1000).result()
    stats = pager.stats()
    figures(request, **result, stats=stats)
    assert result["bad"] == 0
    assert stats["removes"] == result["drops"]


def test_five_hundred_forks_leave_no_descriptor_behind(
    start: Start, pager: Pager, request: pytest.FixtureRequest
) -> None:
    before = _contexts_of(os.getpid())
    target = start("forks", arg=500)
    result = target.result()
    kept = pager.stats()["fds"]
    assert pager.children(target.pid) == 0
    pager.drop(target.pid)
    pager.pump()
    stats = pager.stats()
    figures(request, **result, kept_before_sweep=kept, stats=stats, ours=_contexts_of(os.getpid()))
    assert result["bad"] == 0
    assert stats["forks"] == 500
    assert stats["reaped"] == 500
    assert stats["contexts"] == stats["children"] == 0
    assert _contexts_of(pager.pid) == 0
    # the process's own context is still in the test's hands
    assert _contexts_of(os.getpid()) == before + 1


def _contexts_of(pid: int) -> int:
    count = 0
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            count += str(entry.readlink()) == "anon_inode:[userfaultfd]"
        except FileNotFoundError:
            continue
    return count


def test_living_children_are_counted_and_dead_ones_are_not(start: Start, pager: Pager) -> None:
    target = start("families", arg=30)
    target.hear("d")
    assert pager.children(target.pid) == 30
    assert pager.children(target.pid + 1) == 0
    target.tell()
    target.hear("e")
    assert pager.children(target.pid) == 0
    target.tell()
    assert target.result()["bad"] == 0


def test_a_target_waits_for_a_dead_pager_and_goes_on_with_the_next(
    start: Start, pager: Pager
) -> None:
    target = start("waits")
    target.hear("d")
    os.kill(pager.pid, signal.SIGKILL)
    _until(lambda: not pager.alive())
    target.tell()
    _until(lambda: _blocked(target.pid))
    assert not pager.pump()
    with pytest.raises(PagerGoneError):
        pager.stats()
    old = pager.pid
    pager.restart()
    assert pager.pid != old
    assert target.result()["bad"] == 0


def test_a_fault_that_the_dead_pager_had_read_is_answered_by_the_next(
    start: Start, pager: Pager
) -> None:
    target = start("threads")
    target.hear("d")
    os.kill(pager.pid, signal.SIGSTOP)
    target.tell()
    taken: list[userfaultfd.Message] = []
    _until(lambda: bool(taken.extend(userfaultfd.read_messages(target.context))) or len(taken) >= 4)
    assert {message.event for message in taken} == {userfaultfd.EVENT_PAGEFAULT}
    pager.restart()
    assert target.result()["bad"] == 0


def test_children_that_were_told_stay_guarded_when_the_pager_is_replaced(
    start: Start, pager: Pager
) -> None:
    target = start("families", arg=30)
    target.hear("d")
    assert pager.stats()["forks"] == 30  # its answer comes after the news
    os.kill(pager.pid, signal.SIGKILL)
    _until(lambda: not pager.alive())
    # what they drop meanwhile waits; what was dropped before the old one died stays dropped
    target.tell()
    pager.restart()
    told = pager.stats()
    assert told["children"] + told["reaped"] >= 30  # the first have ended by now
    target.hear("e")
    assert pager.children(target.pid) == 0
    target.tell()
    assert target.result()["bad"] == 0


def test_a_child_of_whom_the_dying_pager_told_nobody_stays_guarded(
    start: Start, pager: Pager, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("MORTAL_FORK", "5")
        mortal = [sys.executable, "-P", str(Path(__file__).with_name("mortal_pager.py"))]
        patch.setattr(door, "command", lambda *words: [*mortal, *map(str, words)])
        pager.restart()
    target = start("families", arg=10)
    _until(lambda: not pager.alive())
    assert len(pager._holds.children) < 5
    pager.restart()
    target.hear("d")
    assert pager.stats()["children"] == 10
    target.tell()
    target.hear("e")
    target.tell()
    assert target.result()["bad"] == 0


def test_the_shadow_runs_what_its_source_says(tmp_path: Path) -> None:
    source = Path(shadow.__file__).with_name("shadow.S")
    built, image = tmp_path / "shadow.o", tmp_path / "shadow.bin"
    subprocess.run(["as", source, "-o", built], check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", built, image], check=True)
    assert image.read_bytes() == source.with_suffix(".bin").read_bytes()


def test_the_shadow_of_a_pager_ends_with_it_or_soon_after(pager: Pager) -> None:
    def shadows(pid: int) -> list[int]:
        return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    (first,) = shadows(pager.pid)
    watch = os.pidfd_open(first)
    assert Path(f"/proc/{first}/comm").read_text() == "ksmd-shadow\n"
    assert Path(f"/proc/{pager.pid}/comm").read_text() == "ksmd-pager\n"
    os.kill(pager.pid, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(PagerGoneError):  # at once, although its end of the channel is open
        pager.stats()
    assert time.monotonic() - began < 5
    assert select.select([watch], [], [], PATIENCE)[0], "it stays"
    os.close(watch)
    pager.restart()
    (second,) = shadows(pager.pid)
    watch = os.pidfd_open(second)
    assert pager.close()
    assert select.select([watch], [], [], 1)[0], "a pager that leaves leaves it behind"
    os.close(watch)


def test_a_child_that_is_born_while_a_pager_is_replaced_is_held_once(
    start: Start, pager: Pager, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = start("families", arg=300)
    target.process.send_signal(signal.SIGSTOP)
    assert pager.stats()["forks"] < 300, "it was too fast"
    tell = pager._tell

    def tell_and_wait(*arguments: Any) -> None:
        tell(*arguments)
        target.process.send_signal(signal.SIGCONT)
        _until(lambda: pager.stats()["forks"] > 0)

    monkeypatch.setattr(pager, "_tell", tell_and_wait)
    pager.restart()
    target.hear("d")
    assert pager.stats()["children"] == len(pager._holds.children) == 300
    target.tell()
    target.hear("e")
    target.tell()
    assert target.result()["bad"] == 0


def test_a_pager_that_dies_before_it_has_heard_everything_is_replaced_too(
    start: Start, pager: Pager, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = start("families", arg=10)
    target.hear("d")
    assert pager.stats()["forks"] == 10
    os.kill(pager.pid, signal.SIGKILL)
    target.tell()
    commands = iter([["false"], ["sleep", "0"]])
    command = door.command
    monkeypatch.setattr(door, "command", lambda *words: next(commands, command(*words)))
    pager.restart()
    assert next(commands, None) is None
    target.hear("e")
    target.tell()
    assert target.result()["bad"] == 0


def test_what_ends_while_the_pager_is_dead_is_not_told_to_the_next(
    start: Start, pager: Pager
) -> None:
    target, other = start("waits"), start("waits")
    for one in (target, other):
        one.hear("d")
    pager.extend({target.pid: [(0x1000, 0x2000)]})
    os.kill(pager.pid, signal.SIGKILL)
    _until(lambda: not pager.alive())
    pager.settle_all(target.pid)
    pager.drop(other.pid)
    pager.release(1)
    assert pager.unsettled == []
    with pytest.raises(PagerGoneError):  # but nothing new begins without it
        pager.extend({target.pid: [(0x1000, 0x2000)]})
    pager.settle_all(target.pid)
    pager.restart()
    assert pager.ids == [target.pid]
    assert pager.stats()["contexts"] == 1
    target.tell()
    assert target.result()["bad"] == 0
    other.end()


def test_the_pager_outlives_the_daemon_and_leaves_after_the_last_target(
    start: Start, pager: Pager
) -> None:
    target = start("waits")
    target.hear("d")
    pid = pager.pid
    watch = os.pidfd_open(pid)
    assert not pager.close()
    os.kill(pid, 0)
    target.tell()
    assert target.result()["bad"] == 0
    target.end()
    ready, _, _ = select.select([watch], [], [], PATIENCE)
    os.close(watch)
    assert ready, "the pager stays although nobody is left"


def test_a_pager_is_handed_over_to_another_owner(start: Start, pager: Pager) -> None:
    target = start("families", arg=10)
    target.hear("d")
    end = door.knock(pager.pid)
    assert end is not None
    assert not pager.close()
    heir = Pager.adopt(end, pager.pid)
    try:
        assert heir.ids == [target.pid]
        assert heir.children(target.pid) == 10
        # it holds all that a new pager needs
        heir.restart()
        target.tell()
        target.hear("e")
        target.tell()
        assert target.result()["bad"] == 0
        heir.drop(target.pid)
        assert heir.children(target.pid) == 0
    finally:
        heir.close(force=True)


def test_the_pager_quits_only_when_it_holds_nothing(start: Start, pager: Pager) -> None:
    target = start("waits")
    target.hear("d")
    with pytest.raises(PagerRefusedError, match="1 contexts are held"):
        pager._ask({"do": "quit"})
    target.tell()
    assert target.result()["bad"] == 0
    pager.drop(target.pid)
    assert pager.close()
    assert not pager.alive()


def test_a_fork_without_a_free_descriptor_waits_and_the_pager_says_so(
    capfd: pytest.CaptureFixture[str], start: Start, pager: Pager
) -> None:
    pager.restart()  # the one of the fixture has its stderr from before the capture
    _, hard = resource.prlimit(pager.pid, resource.RLIMIT_NOFILE)
    room = pager.stats()["fds"] + 12
    resource.prlimit(pager.pid, resource.RLIMIT_NOFILE, (room, hard))
    target = start("families", arg=30)
    _until(lambda: pager.stats()["starved"] > 0)
    assert 0 < pager.stats()["children"] < 30
    time.sleep(0.2)  # some tries more
    assert pager.stats()["starved"] == 1
    resource.prlimit(pager.pid, resource.RLIMIT_NOFILE, (hard, hard))
    target.hear("d")
    assert pager.children(target.pid) == 30
    target.tell()
    target.hear("e")
    target.tell()
    assert target.result()["bad"] == 0
    said = capfd.readouterr().err
    assert said.count("a target's fork waits: Too many open files") == 1


def test_signals_do_not_end_the_pager_and_its_name_is_not_the_kernel_threads(
    pager: Pager,
) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        os.kill(pager.pid, number)
    assert pager.stats()["contexts"] == 0
    status = Path(f"/proc/{pager.pid}/status").read_text()
    capabilities = re.search(r"^CapEff:\s+(\w+)$", status, re.M)
    assert capabilities
    if int(capabilities[1], 16) & CAP_SYS_RESOURCE:
        assert pager.failed == []
        assert Path(f"/proc/{pager.pid}/oom_score_adj").read_text().strip() == "-900"
    else:
        (sentence,) = (one for one in pager.failed if "processor" not in one)
        assert sentence.startswith("cannot protect itself from the OOM killer: ")
    if int(capabilities[1], 16) & CAP_SYS_NICE:
        assert os.getpriority(os.PRIO_PROCESS, pager.pid) == priority.NICE
    else:
        assert pager.failed[-1].startswith("cannot go before others that want a processor: ")
    assert re.search(r"^Name:\tksmd-pager$", status, re.M)
    locked = re.search(r"^VmLck:\s+(\d+) kB$", status, re.M)
    assert locked
    assert int(locked[1]) > 1024
    soft, hard = resource.prlimit(pager.pid, resource.RLIMIT_NOFILE)
    assert soft == hard
    assert os.getsid(pager.pid) == pager.pid
    print(f"\n  locked: {locked[1]} kB, {re.search('VmRSS.*', status)}")


def test_the_pager_imports_nothing_big(pager: Pager) -> None:
    maps = Path(f"/proc/{pager.pid}/maps").read_text()
    assert "libpython" in maps or "python" in maps
    for name in ("numpy", "pydantic", "psutil", "xxhash", "lzma"):
        assert name not in maps


def test_malformed_messages_are_answered_with_an_error_and_harm_nobody(
    start: Start, pager: Pager
) -> None:
    target = start("waits")
    target.hear("d")
    base, end = target.range
    for header in (
        {},
        {"do": "dance"},
        {"do": "guard", "id": 5},
        {"do": "guard"},
        {"do": "extend", "id": 5, "ranges": []},
        {"do": "extend", "id": target.pid, "ranges": [[base + 1, end]]},
        {"do": "extend", "id": target.pid, "ranges": [[end, base]]},
        {"do": "extend", "id": target.pid, "ranges": [base, end]},
        {"do": "extend", "id": target.pid, "ranges": [["a", "b"]]},
        {"do": "settle", "id": [1]},
        {"do": "hand-over"},
        {"do": ["stats"]},
    ):
        with pytest.raises(PagerRefusedError):
            pager._ask({"do": None, **header})
    assert pager._line.end is not None
    for raw in (b"x", b"\xff\xff\xff\xff", b"\x02\0\0\0[]", b"\x01\0\0\0{"):
        pager._line.end.send(raw)
        header, _, _ = channel.receive(pager._line.end)
        assert not header["ok"], raw
    with pytest.raises(PagerRefusedError, match="guarded already"):
        pager._ask({"do": "guard", "id": target.pid}, target.context)
    target.tell()
    assert target.result()["bad"] == 0


def test_what_is_no_guard_context_is_refused_and_closed(pager: Pager) -> None:
    before = pager.stats()["fds"]
    reader, writer = os.pipe()
    device = userfaultfd.open_device()
    raw = userfaultfd.create(device)  # without its handshake
    for fd in (reader, device, raw):
        with pytest.raises(PagerRefusedError):
            pager.guard(1, fd)
    for fd in (reader, writer, device, raw):
        os.close(fd)
    assert pager.ids == []
    assert pager.stats()["fds"] == before


def test_what_a_context_s_end_looks_like(program: Path, store: memfd.ExtentMap) -> None:
    target = Guarded(program, store, "waits", 16, 1)
    assert not userfaultfd.is_dead(target.context)
    target.process.kill()
    target.process.wait()
    assert userfaultfd.is_dead(target.context)
    target.end()


def test_the_self_test_passes_on_this_kernel() -> None:
    began = time.monotonic()
    feature = selftest()
    print(f"\n  {feature.detail}; {time.monotonic() - began:.2f} s in all")
    assert feature.present, feature.detail
    assert feature.needed


def test_the_self_test_names_the_step_that_nobody_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # a pager that is never told of the context
    monkeypatch.setattr(Pager, "guard", lambda *_: None)
    feature = selftest(deadline=2.0)
    assert not feature.present
    assert feature.detail.startswith("MADV_DONTNEED on merged memory: ")


def test_the_self_test_says_so_when_there_is_no_pager(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Pager) -> None:
        raise PagerGoneError("it does not start")

    monkeypatch.setattr(Pager, "start", fail)
    feature = selftest()
    assert not feature.present
    assert "it does not start" in feature.detail


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


def _blocked(pid: int) -> bool:
    """A process that waits for the answer to a fault, or for its event to be read."""
    wchan = Path(f"/proc/{pid}/wchan").read_text()
    return "userfault" in wchan
