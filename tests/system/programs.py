"""Programs that use the control socket as any user may: they are who calls, and whose memory it is.

``Example`` runs what the package ships as an example, in C or in Python, without privileges.
``Puppet`` is a process that connects, and whose connection the test holds too: the kernel says that
the puppet calls, and the test decides what.
"""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from harness import PAGE, PATIENCE, Daemon
from victims import fields

import ksmd
from ksmd.daemon import interface
from ksmd.daemon.protocol import INTERFACE, CallMessage, Decoder, encode_call

NOBODY = 65534
RESOURCES = Path(ksmd.__file__).parent / "resources"
CONTROL = interface.load()


class CallFailedError(Exception):
    """An error reply: ``name`` without its interface, and its parameters."""

    def __init__(self, name: str, parameters: dict[str, Any]) -> None:
        super().__init__(f"{name} {parameters}")
        self.name = name.rpartition(".")[2]
        self.parameters = parameters


class Raw:
    """One connection, message by message. What comes must be what the description promises."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self._method = ""
        self._decoder = Decoder()
        sock.settimeout(PATIENCE)

    @classmethod
    def connect(cls, path: Path) -> Raw:
        """Connect as ourselves."""
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(PATIENCE)
        sock.connect(str(path))
        return cls(sock)

    def send(self, method: str, *, more: bool = False, **parameters: Any) -> None:
        """Send a call."""
        full = method if "." in method else f"{INTERFACE}.{method}"
        self._method = method
        self.socket.sendall(encode_call(CallMessage(full, parameters, more=more)))

    def receive(self) -> dict[str, Any]:
        """Receive a reply; its parameters."""
        while (message := self._decoder.next()) is None:
            data = self.socket.recv(1 << 16)
            if not data:
                raise ConnectionResetError("the daemon closed the connection")
            self._decoder.feed(data)
        found: dict[str, Any] = message["parameters"]
        if "error" in message:
            where, _, name = message["error"].rpartition(".")
            if where == INTERFACE:
                wrong = CONTROL.mismatch(found, CONTROL.errors[name])
                assert wrong is None, (self._method, message, wrong)
            raise CallFailedError(message["error"], found)
        if self._method in CONTROL.methods:
            wrong = CONTROL.gives(self._method, found)
            assert wrong is None, (self._method, message, wrong)
        return found

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call, and give the reply's parameters."""
        self.send(method, **parameters)
        return self.receive()

    def failure(self, method: str, **parameters: Any) -> CallFailedError:
        """Call what must fail."""
        try:
            answer = self.call(method, **parameters)
        except CallFailedError as error:
            return error
        raise AssertionError(f"{method} {parameters} did not fail: {answer}")

    def close(self) -> None:
        """Close our end; whoever else holds the connection keeps it."""
        self.socket.close()

    def hang_up(self) -> None:
        """End the connection, whoever else holds it."""
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


_PUPPET = """
import hashlib, mmap, os, random, signal, socket, sys
fd, path, uid, pages, seed = int(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:])
import ctypes
os.setgroups([]); os.setresgid(uid, uid, uid); os.setresuid(uid, uid, uid)
m = mmap.mmap(-1, pages * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
m.madvise(15)
numbers = random.Random(seed)
for at in range(0, len(m), 1 << 20):
    end = min(at + (1 << 20), len(m))
    m[at:end] = numbers.randbytes(end - at)
before = hashlib.sha256(m).digest()
address = ctypes.addressof(ctypes.c_char.from_buffer(m))
if fd >= 0:
    sock = socket.socket(fileno=fd)
    sock.connect(path)
print(f"address={address} pages={pages}", flush=True)
for line in sys.stdin:
    word, *rest = line.split()
    if word == "check":
        print(f"bad={int(hashlib.sha256(m).digest() != before)}", flush=True)
    elif word == "write":
        for page in range(int(rest[0]), int(rest[1])):
            m[page * 4096 : (page + 1) * 4096] = os.urandom(4096)
        print("bad=0", flush=True)
    elif word == "fork":
        child = os.fork()
        if child == 0:
            signal.pause()
        print(f"child={child}", flush=True)
    elif word == "exec":
        os.set_inheritable(fd, True)
        print("bad=0", flush=True)
        os.execv(rest[0], rest)
"""


class Puppet:
    """A process of user *uid* with an arena of *pages* pages; equal seeds, equal pages.

    ``raw`` is its connection to the daemon at *path* (None: it makes none).
    """

    def __init__(
        self, path: Path | None, uid: int = NOBODY, pages: int = 64, seed: int = 1
    ) -> None:
        sock = socket.socket(socket.AF_UNIX)
        numbers = [sock.fileno() if path is not None else -1, path or "-", uid, pages, seed]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PUPPET, *map(str, numbers)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=[sock.fileno()],
        )
        self.pid = self._process.pid
        self.children: list[int] = []
        assert self._process.stdout is not None
        found = fields(self._process.stdout.readline())
        if not found:
            self.raw = Raw(sock)
            self.close()
            raise PermissionError(f"user {uid} cannot connect to {path}")
        self.address, self.pages = found["address"], found["pages"]
        self.raw = Raw(sock)
        self.sma = 0

    @property
    def region(self) -> tuple[int, int]:
        """Address and pages."""
        return self.address, self.pages

    def ask(self, command: str) -> dict[str, int]:
        """Have it do something."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        answer = fields(self._process.stdout.readline())
        if "child" in answer:
            self.children.append(answer["child"])
        return answer

    def intact(self) -> bool:
        """Whether its arena holds what it held at first, as it sees it itself."""
        return self.ask("check")["bad"] == 0

    def register(self, first: int = 0, pages: int | None = None, **more: Any) -> dict[str, Any]:
        """Register pages of its arena, in one SMA for all calls."""
        self.sma = self.sma or self.raw.call("CreateSharedMemoryArea")["sma"]
        npages = self.pages - first if pages is None else pages
        addr = self.address + first * PAGE
        return self.raw.call("RegisterMemoryRegion", sma=self.sma, addr=addr, npages=npages, **more)

    def share(self) -> dict[str, Any]:
        """Share what it has registered."""
        return self.raw.call("Share", sma=self.sma)

    def kill(self, *, reap: bool = True) -> None:
        """End it, by SIGKILL; the test's end of its connection goes too, a child's does not.

        Without *reap* it stays a zombie until it is closed.
        """
        self.raw.close()
        self._process.kill()
        if reap:
            self._process.wait()

    def close(self) -> None:
        """End it and its children."""
        self.kill()
        for pid in self.children:
            os.kill(pid, signal.SIGKILL)
        self.children.clear()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()


_UNPRIVILEGED = """
import hashlib, os, sys, zlib
import numpy, ksmd.client
source, sys.argv = sys.argv[1], sys.argv[1:]
code = compile(open(source).read(), source, "exec")
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
exec(code, {"__name__": "__main__"})
"""


@cache
def compiled() -> Path:
    """Build the C example as its head says, where everybody may run it."""
    directory = Path(tempfile.mkdtemp(prefix="ksmd-examples-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    directory.chmod(0o755)
    result = directory / "share"
    warnings = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"]
    source = RESOURCES / "examples" / "share.c"
    command = ["gcc", "-std=c99", "-O2", *warnings, f"-I{RESOURCES}", source, "-o", result]
    subprocess.run(command, check=True)
    return result


class Example:
    """One of the shipped examples, run as nobody; *language* is "c" or "python"."""

    def __init__(self, language: str, path: Path, mib: int = 2) -> None:
        identity: dict[str, Any] = {}
        if language == "c":
            command = [str(compiled())]
            identity = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
        else:
            script = str(RESOURCES / "examples" / "share.py")
            command = [sys.executable, "-c", _UNPRIVILEGED, script]
        self._process = subprocess.Popen(
            [*command, str(path), str(mib)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            **identity,
        )
        self.pid = self._process.pid
        self.told = self._line()
        first = -(-self.told["address"] // PAGE) * PAGE  # an array starts where malloc put it
        self.region = first, self.told["pages"]

    def _line(self) -> dict[str, int]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the example ended with code {self._process.wait()}"
        return fields(line)

    def again(self) -> dict[str, int]:
        """Have it share once more."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._line()

    def end(self) -> int:
        """Let it end by itself: its exit code, which is 0 when all it holds is right."""
        self._process.communicate(timeout=PATIENCE)
        return self._process.returncode

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()


def open_directory() -> Path:
    """Make a directory in which everybody may reach a socket."""
    directory = Path(tempfile.mkdtemp(prefix="ksmd-open-"))
    directory.chmod(0o755)
    return directory


def everybody(**keys: Any) -> dict[str, Any]:
    """Give settings that let everybody in."""
    return {"version": 1, "socket_mode": "0666"} | keys


def lines_of(daemon: Daemon, puppet: Puppet) -> list[dict[str, Any]]:
    """Give what the status says of a process: a line, or none."""
    return [line for line in daemon.status()["targets"] if line["pid"] == puppet.pid]
