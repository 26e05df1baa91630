"""A service manager for the pager: starts it, and keeps the descriptors that it is told to keep."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import select
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

from ksmd.guard import door

PATIENCE = 30.0


class ServiceManager:
    """Starts the pager under one name, and keeps its descriptors, as systemd does."""

    def __init__(self, directory: Path, name: str = "") -> None:
        self.name = name or f"/run/test-{secrets.token_hex(4)}.sock"
        self.kept: dict[str, int] = {}
        self.ready = 0
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        self._end = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._end.bind(str(directory / "notify"))
        self._end.setblocking(False)
        self._lock = threading.Lock()  # of the socket, and of what is kept
        self._closing = False
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def start(self) -> int:
        """Start a pager, with what was kept for the one before, and wait until it serves."""
        with self._lock:
            self._hear()  # what the one before has said, as systemd does before it sees its end
            # away from the numbers at which they are handed over
            given = {name: fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for name, fd in self.kept.items()}
            before = self.ready
        moves = "".join(f"exec {3 + at}<&{fd}; " for at, fd in enumerate(given.values()))
        command = door.command(door.STANDING, self.name)
        script = f'{moves} export LISTEN_PID=$$; exec "$@"'
        environ = os.environ | {
            "NOTIFY_SOCKET": str(self._directory / "notify"),
            "LISTEN_FDS": str(len(given)),
            "LISTEN_FDNAMES": ":".join(given),
        }
        self._process = subprocess.Popen(
            ["bash", "-c", script, "bash", *command], env=environ, pass_fds=tuple(given.values())
        )
        for fd in given.values():
            os.close(fd)
        deadline = time.monotonic() + PATIENCE
        while self.ready == before:
            assert self._process.poll() is None, "the pager ended at once"
            assert time.monotonic() < deadline, "the pager does not serve"
            time.sleep(0.005)
        return self._process.pid

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def reap(self) -> None:
        """Wait for the end of one that somebody else has killed."""
        assert self._process is not None
        self._process.wait(PATIENCE)

    def term(self) -> None:
        assert self._process is not None
        self._process.terminate()

    def runs(self) -> bool:
        assert self._process is not None
        return self._process.poll() is None

    def _listen(self) -> None:
        while not self._closing:
            if select.select([self._end], [], [], 0.05)[0]:
                with self._lock:
                    self._hear()

    def _hear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                text, fds, _, _ = socket.recv_fds(self._end, 4096, 4)
                told = dict(line.split("=", 1) for line in text.decode().split("\n"))
                if "FDSTORE" in told:
                    self._forget(told["FDNAME"])
                    (self.kept[told["FDNAME"]],) = fds
                elif "FDSTOREREMOVE" in told:
                    self._forget(told["FDNAME"])
                self.ready += told.get("READY") == "1"

    def _forget(self, name: str) -> None:
        if name in self.kept:
            os.close(self.kept.pop(name))

    def close(self) -> None:
        for pid in door.pagers(self.name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self._process is not None:
            self._process.wait()
        self._closing = True
        self._thread.join()
        self._end.close()
        for fd in self.kept.values():
            os.close(fd)
