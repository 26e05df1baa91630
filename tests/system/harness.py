"""A real ``ksmd run`` and a real ``ksmctl``, used from outside as an operator would.

Nothing here looks into the daemon: what it did is read from ``ksmctl --json`` and, since a daemon's
word about itself proves little, from /proc of the victims: frames, maps, descriptors, memory.

Every process is started and ended by its pid, and ``Daemon.close`` (the fixture calls it) leaves
none behind: neither the daemon nor its two helpers.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sysconfig
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import yaml
from numpy.typing import NDArray

from ksmd.client import Client, DaemonUnavailableError
from ksmd.kernel import pageentries, procfs
from ksmd.kernel.pagemap import PageMap
from ksmd.kernel.thp import LargeFolios

PAGE = 4096
SCRIPTS = Path(sysconfig.get_path("scripts"))
KSMD, KSMCTL = str(SCRIPTS / "ksmd"), str(SCRIPTS / "ksmctl")

#: Bounds for waits that end bad tests, never for judging how fast something is.
PATIENCE = 60.0

PR_SET_PDEATHSIG = 1  # linux/prctl.h

Frames = NDArray[np.uint64]


class Arena(Protocol):
    """What the helpers need of a victim."""

    pid: int

    @property
    def region(self) -> tuple[int, int]:
        """Address and pages."""


def target(victim: Arena, name: str = "", **keys: Any) -> dict[str, Any]:
    """Settings that select exactly the arena of *victim*; *keys* add or replace, None takes out."""
    start, npages = victim.region
    whole = {
        "name": name or f"p{victim.pid}",
        "match": {"pid": victim.pid},
        "domain": "d",
        "regions": [{"start": start, "npages": npages}],
    } | keys
    return {key: value for key, value in whole.items() if value is not None}


#: For targets that keep more threads busy than there are processors: a thread stops when it runs
#: the next time, and two dozen of them on two processors do not all run within the default's 10 ms.
CROWDED = {"window": {"deadline_ms": 1000}}


def settings_for(*victims: Arena, **keys: Any) -> dict[str, Any]:
    """Whole settings for some victims' arenas, all in one domain."""
    return {"version": 1, "targets": [target(victim) for victim in victims]} | keys


def until(condition: Callable[[], Any], what: str, patience: float = PATIENCE) -> Any:
    """Wait until *condition* gives something true, and give that."""
    deadline = time.monotonic() + patience
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited in vain for: {what}"
        time.sleep(0.02)
    return found


_libc = ctypes.CDLL(None)


def _die_with_the_tests() -> None:
    """Have this process told to stop when the one that started it ends, however that comes."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


class Held:
    """A process that we may signal safely: a pidfd cannot name another process by mistake."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._fd = os.pidfd_open(pid)

    def send(self, number: int) -> None:
        """Send a signal; a process that has ended takes none."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._fd, number)

    def gone(self, patience: float = 0.0) -> bool:
        """Tell whether it has ended, waiting up to *patience* seconds for it."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        return bool(poll.poll(patience * 1000))

    def end(self) -> None:
        """Kill it, if it still runs."""
        self.send(signal.SIGKILL)
        assert self.gone(PATIENCE), f"process {self.pid} does not end"
        os.close(self._fd)


class Daemon:
    """One ``ksmd run`` in *directory*. ``settings``: a mapping, or YAML as it stands, or None.

    ``paused``: the background scan is stopped before it can merge anything, so that all that
    happens is what a test asks for, and counters can be exact.
    """

    def __init__(
        self,
        directory: Path,
        settings: Mapping[str, Any] | str | None,
        *,
        paused: bool = True,
        cwd: Path | None = None,
    ) -> None:
        self.config = directory / "ksmd.yaml"
        self.socket = directory / "ksmd.sock"
        self._log = directory / "ksmd.log"
        if settings is not None:
            self.configure(settings)
        self._helpers: list[Held] = []
        command = [KSMD, "run", *(["--config", str(self.config)] if settings is not None else [])]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--socket", str(self.socket)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=cwd,
                start_new_session=True,
                preexec_fn=_die_with_the_tests,  # noqa: PLW1509 - one system call, no locks
            )
        self.pid = self.process.pid
        self._await_ready()
        self.helpers()
        if paused:
            self.call("Pause")

    def configure(self, settings: Mapping[str, Any] | str) -> None:
        """Write the settings file (the daemon reads it at its start and at SIGHUP)."""
        text = settings if isinstance(settings, str) else yaml.safe_dump(dict(settings))
        self.config.write_text(text)

    def _await_ready(self) -> None:
        def answers() -> bool:
            assert self.process.poll() is None, f"the daemon ended: {self.log()}"
            with contextlib.suppress(DaemonUnavailableError), Client(self.socket, PATIENCE) as ksmd:
                return bool(ksmd.call("GetApiVersion")["version"] == 1)
            return False

        until(answers, "the daemon answers")

    # -- talking to it -------------------------------------------------------------------------

    def run_ctl(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run ``ksmctl --json`` and give what came of it, whatever its exit code."""
        return ksmctl("--socket", self.socket, "--json", *arguments)

    def ctl(self, *arguments: object) -> dict[str, Any]:
        """Run ``ksmctl --json``, which must succeed: its answer."""
        done = self.run_ctl(*arguments)
        assert done.returncode == 0, f"ksmctl {arguments}: {done.stderr}\n{self.log()}"
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method directly, where a test is not about ``ksmctl``."""
        with Client(self.socket, PATIENCE) as ksmd:
            return ksmd.call(method, **parameters)

    def scan(self) -> dict[str, Any]:
        """Scan and merge until nothing more is found."""
        return self.ctl("scan", "--wait", "--until-settled")

    def give_back(self, *arguments: object) -> dict[str, Any]:
        """Unmerge, all or ``"--pid", N``; it must succeed without leaving anything merged."""
        answer = self.ctl("unmerge", "--wait", *arguments)
        assert not answer.get("refused"), answer
        return answer

    def allow_again(self) -> None:
        """Let targets be merged again that were given back by request; paused, as before."""
        self.call("Resume")
        self.call("Pause")

    def status(self) -> dict[str, Any]:
        """Give all counters."""
        return self.ctl("status")

    def status_of(self, victim: Arena) -> dict[str, Any]:
        """Give one target's line of the status."""
        lines = [line for line in self.status()["targets"] if line["pid"] == victim.pid]
        assert len(lines) == 1, f"{victim.pid} is in {lines}"
        return dict(lines[0])

    def send(self, number: int) -> None:
        """Send the daemon a signal."""
        os.kill(self.pid, number)

    def log(self) -> str:
        """Give what it has said so far."""
        return self._log.read_text(errors="replace")

    def await_log(self, text: str) -> None:
        """Wait until the log contains *text*."""
        until(lambda: text in self.log(), f"{text!r} in the log")

    # -- its processes -------------------------------------------------------------------------

    def helpers(self) -> dict[str, int]:
        """Give the pids of its helpers by name: "ksmd-pager", "ksmd-tracer"."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        found = {}
        for pid in children:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found[Path(f"/proc/{pid}/comm").read_text().strip()] = int(pid)
        known = {held.pid for held in self._helpers}
        self._helpers += [Held(pid) for pid in found.values() if pid not in known]
        return found

    def kill_helper(self, name: str) -> int:
        """SIGKILL one helper, when it runs; its pid."""
        pid = until(lambda: self.helpers().get(name), f"{name} runs")
        held = next(held for held in self._helpers if held.pid == pid)
        held.send(signal.SIGKILL)
        assert held.gone(PATIENCE)
        return int(pid)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Have it stop; its exit code."""
        if self.process.poll() is None:
            self.helpers()
            self.send(number)
        return int(self.process.wait(PATIENCE))

    def close(self) -> None:
        """End everything that still runs, by pid."""
        with contextlib.suppress(OSError):
            self.helpers()
        if self.process.poll() is None:
            self.send(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(PATIENCE)
        self.process.kill()
        self.process.wait()
        LargeFolios(self.folios_note).recover()  # had it been killed while that was changed
        for held in self._helpers:
            held.end()
        self._helpers.clear()

    @property
    def folios_note(self) -> Path:
        """Where the daemon notes a setting of huge pages while it has changed it."""
        return self.socket.with_name(f"{self.socket.name}.folios")


def run(*command: object) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and give what came of it."""
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, timeout=300
    )


def ksmctl(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run ``ksmctl`` with these arguments."""
    return run(KSMCTL, *arguments)


def ksmd_run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a daemon that is expected not to start."""
    return run(KSMD, "run", *arguments)


def crowd(*victims: Arena) -> None:
    """Put all threads of some busy victims on one processor, so that others get one too."""
    for victim in victims:
        for task in Path(f"/proc/{victim.pid}/task").iterdir():
            os.sched_setaffinity(int(task.name), {min(os.sched_getaffinity(0))})


# -- what the kernel says of a victim ------------------------------------------------------------


def frames(victim: Arena) -> Frames:
    """Give the frame of every page of the arena, 0 where it has none."""
    start, npages = victim.region
    with PageMap(victim.pid) as pagemap:
        return pageentries.pfn(pagemap.entries(start // PAGE, npages))


def contents(victim: Arena) -> list[bytes]:
    """Read every page of the arena; absent pages are not brought in (they read as zeros)."""
    start, npages = victim.region
    with Path(procfs.task_path(victim.pid, "mem")).open("rb", buffering=0) as mem:
        mem.seek(start)
        whole = mem.read(npages * PAGE)
    return [whole[at : at + PAGE] for at in range(0, len(whole), PAGE)]


class Oracle:
    """What of some victims' arenas is equal, found by looking at every byte.

    Made before a merge, of victims whose arenas stand still. ``duplicates``: pages that could be
    saved because another holds the same; ``zeros``: pages that could because they are zero.
    """

    def __init__(self, *victims: Arena) -> None:
        self._victims = victims
        groups: dict[bytes, list[tuple[int, int]]] = defaultdict(list)
        for number, victim in enumerate(victims):
            for page, content in enumerate(contents(victim)):
                groups[content].append((number, page))
        self._zeros = groups.pop(bytes(PAGE), [])
        self._groups = [group for group in groups.values() if len(group) > 1]
        self.unique = sum(len(group) == 1 for group in groups.values())
        self.zeros = len(self._zeros)
        self.distinct = len(self._groups)
        self.duplicates = sum(len(group) - 1 for group in self._groups)

    @property
    def possible(self) -> int:
        """Pages that a perfect merge saves."""
        return self.duplicates + self.zeros

    def saved(self) -> int:
        """Count, by frames alone, the pages that are saved now."""
        seen = [frames(victim).tolist() for victim in self._victims]
        nothing = {0, pageentries.zero_pfn()}
        total = sum(seen[number][page] in nothing for number, page in self._zeros)
        for group in self._groups:
            total += len(group) - len({seen[number][page] for number, page in group})
        return total

    def share(self) -> float:
        """Give the share of what could be saved that is saved now."""
        return self.saved() / self.possible


def memory(pid: int) -> Counter[str]:
    """Give the fields of smaps_rollup, in pages."""
    found: Counter[str] = Counter()
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, value = line.partition(":")
        found[name] = int(value.split()[0]) // 4
    return found


def private(victims: Sequence[Arena]) -> int:
    """Sum up the pages that nobody but their own process holds."""
    return sum(memory(v.pid)["Private_Dirty"] + memory(v.pid)["Private_Clean"] for v in victims)


def pss(victims: Sequence[Arena]) -> int:
    """Sum up Pss, in pages."""
    return sum(memory(victim.pid)["Pss"] for victim in victims)


def descriptors(pid: int) -> dict[str, str]:
    """Give the whole descriptor table of a process: number to what it is."""
    found = {}
    for fd in Path(procfs.task_path(pid, "fd")).iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since it was listed
            found[fd.name] = os.fspath(fd.readlink())
    return found


def mappings(pid: int) -> list[tuple[int, int, str, str]]:
    """Give (start, end, permissions, path) of every VMA."""
    found = []
    for line in Path(procfs.task_path(pid, "maps")).read_text().splitlines():
        fields = line.split(None, 5)
        start, _, end = fields[0].partition("-")
        found.append((int(start, 16), int(end, 16), fields[1], "".join(fields[5:])))
    return found


def store_mappings(pid: int) -> list[str]:
    """Name every mapping of a store extent."""
    return [path for *_, path in mappings(pid) if "/memfd:ksmd" in path]


def layout(pid: int) -> list[tuple[int, int, str]]:
    """Give the address space as (start, end, permissions), neighbours of one kind as one."""
    found: list[tuple[int, int, str]] = []
    for start, end, perms, _ in mappings(pid):
        if found and found[-1][1] == start and found[-1][2] == perms:
            found[-1] = (found[-1][0], end, perms)
        else:
            found.append((start, end, perms))
    return found


def state(pid: int) -> str:
    """Give the state letter of a process."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def tracer_of(pid: int) -> int:
    """Give the pid of the process that traces *pid*, 0 when none does."""
    return int(Path(f"/proc/{pid}/status").read_text().partition("TracerPid:")[2].split()[0])


def check_but_for_eintr(victims, known: dict[int, int], *, may_grow: bool) -> None:
    """Check all; calls that returned EINTR may have become more only where *may_grow*.

    They may where a tracer was killed: a thread that it had stopped, and not looked at yet, returns
    EINTR from the calls that do so after a bare stop, and nobody is there to mend it.
    """
    for victim in victims:
        errors = victim.errors()
        eintr = errors.pop("eintr", 0)
        assert victim.ask("sum")["bad"] == 0, victim.report()
        assert not errors, victim.report()
        assert may_grow or eintr == known.get(victim.pid, 0), victim.report()
        known[victim.pid] = eintr
