"""A real systemd as PID 1, in namespaces of its own: boot, run commands in it, power off.

The network and user namespaces are the host's; pids, mounts, cgroups, hostname and ipc are its own.
So its services can see and touch nothing but the processes inside, and its kernel is the real one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PATIENCE = 30.0
_POWEROFF = signal.SIGRTMIN + 4  # systemd(1): starts poweroff.target
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def until(condition: Callable[[], Any], what: str, patience: float = PATIENCE) -> Any:
    """Wait until *condition* gives something true, and give that."""
    deadline = time.monotonic() + patience
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited in vain for: {what}"
        time.sleep(0.05)
    return found


class Machine:
    """One booted system. *tree* is laid over the host's root before the boot."""

    def __init__(self, tree: Path) -> None:
        self._work = Path(tempfile.mkdtemp(prefix="ksmd-systemd-"))
        for name in ("layers", "root", "shared"):
            (self._work / name).mkdir()
        #: A directory that host and machine share; it is /run/test inside.
        self.shared = self._work / "shared"
        self._console = self._work / "console.log"
        self._cgroup = _cgroup()
        self._outer = self._start(tree)
        try:
            self.pid = until(self._child, "PID 1")
            until(self._is_up, "the boot")
        except BaseException:
            self.close()
            raise

    def _start(self, tree: Path) -> subprocess.Popen[bytes]:
        members = self._cgroup / "cgroup.procs"
        command = [
            *("setpriv", "--pdeathsig", "KILL"),  # it must not outlive the tests
            *("unshare", "--mount", "--pid", "--fork", "--cgroup", "--uts", "--ipc"),
            *("--kill-child=SIGKILL", "--", "bash", str(HERE / "init.sh")),
            *(str(self._work), str(tree), sys.base_prefix, sysconfig.get_path("purelib")),
        ]
        # the shell joins the cgroup first, for the cgroup namespace begins where we are
        join = f'echo $$ >"{members}"; exec "$@"'
        with self._console.open("wb") as console:
            return subprocess.Popen(
                ["bash", "-c", join, "bash", *command],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                start_new_session=True,
            )

    def _child(self) -> int:
        assert self._outer.poll() is None, "it ended while booting"
        outer = self._outer.pid
        if Path(f"/proc/{outer}/comm").read_text().strip() != "unshare":
            return 0
        children = Path(f"/proc/{outer}/task/{outer}/children").read_text().split()
        return int(children[0]) if children else 0

    def _is_up(self) -> bool:
        assert self._outer.poll() is None, "it ended while booting"
        return self.run("systemctl", "is-system-running", check=False) in ("running", "degraded")

    def command(self, *arguments: object) -> list[str]:
        """Give the command line that runs *arguments* inside."""
        enter = ["nsenter", "-t", str(self.pid), "-m", "-p", "-C", "-u", "-i", "--"]
        return [*enter, "env", "-i", f"PATH={_PATH}", "LANG=C.UTF-8", *map(str, arguments)]

    def run(self, *arguments: object, check: bool = True) -> str:
        """Run a command inside: its output, without the last newline."""
        done = subprocess.run(
            self.command(*arguments),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        told = f"{arguments}: {done.returncode}\n{done.stdout}{done.stderr}"
        assert not check or done.returncode == 0, told
        return done.stdout.rstrip("\n")

    def code(self, *arguments: object) -> int:
        """Run a command inside: its exit code."""
        command = self.command(*arguments)
        return subprocess.run(command, capture_output=True, check=False, timeout=120).returncode

    def start(self, arguments: Sequence[object], **options: Any) -> subprocess.Popen[str]:
        """Start a command inside, outside of every unit."""
        return subprocess.Popen(self.command(*arguments), text=True, **options)

    def show(self, unit: str, name: str) -> str:
        """Give a property of a unit."""
        return self.run("systemctl", "show", "--property", name, "--value", unit)

    @property
    def running(self) -> bool:
        """Whether it has not been powered off."""
        return self._outer.poll() is None

    def poweroff(self) -> int:
        """Power off as an operator would; the exit code of PID 1."""
        os.kill(self.pid, _POWEROFF)
        return self._outer.wait(PATIENCE)

    def close(self) -> None:
        """End it in any case, and take away what it needed."""
        print(self._console.read_text(errors="replace"))
        if self._outer.poll() is None:
            with contextlib.suppress(AssertionError, ProcessLookupError, FileNotFoundError):
                os.kill(self._child(), signal.SIGKILL)  # of a pid namespace: all in it go too
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._outer.wait(5)
            self._outer.kill()
            self._outer.wait()
        for folder in sorted(self._cgroup.rglob("*"), reverse=True):
            if folder.is_dir():
                with contextlib.suppress(OSError):
                    folder.rmdir()
        with contextlib.suppress(OSError):
            self._cgroup.rmdir()
        shutil.rmtree(self._work, ignore_errors=True)


def _cgroup() -> Path:
    """Make a cgroup of version 2 to be the root of the machine's hierarchy."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    tops = [Path(fields[1]) for fields in mounts if fields[2] == "cgroup2"]
    assert tops, "no cgroup2 hierarchy is mounted"
    return Path(tempfile.mkdtemp(prefix="ksmd-test-", dir=tops[0]))
