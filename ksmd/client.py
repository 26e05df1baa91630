"""Talk to a running ksmd.

The client blocks, needs no other part of ksmd to be running in the caller's process, and turns
every failure into a KsmdError whose hint says what to do::

    with Client() as ksmd:
        print(ksmd.call("Status")["general_profit"])
        for progress in ksmd.stream("Scan", wait=True, until_settled=True):
            print(progress["merged"])

What a connection registers belongs to it: the daemon releases it when the client is closed. A
program that wants its own memory shared needs no privilege, only a socket that lets it in::

    with SharedMemoryArea() as sma:
        sma.register(weights)        # a numpy array, an mmap, a bytearray, ...
        sma.share()                  # now; or leave it to the daemon's own scans
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from ksmd.daemon.protocol import (
    DEFAULT_SOCKET,
    INTERFACE,
    MAX_REPLY,
    SERVICE,
    CallMessage,
    Decoder,
    ProtocolError,
    ReplyMessage,
    encode_call,
    parse_reply,
)
from ksmd.model.errors import (
    Exit,
    KernelFeatureError,
    KsmdError,
    PrivilegeError,
    TargetGoneError,
    UsageError,
)
from ksmd.model.units import PAGE_SIZE

_CHUNK = 64 << 10

_ERRORS: dict[int, type[KsmdError]] = {
    Exit.USAGE: UsageError,
    Exit.PRIVILEGE: PrivilegeError,
    Exit.KERNEL: KernelFeatureError,
}


class DaemonUnavailableError(KsmdError):
    """Nobody answers behind the socket, or no longer."""


class RemoteError(KsmdError):
    """The daemon answered with an error. ``name`` is its full name, ``parameters`` what it said."""

    def __init__(self, message: str, hint: str, name: str, parameters: dict[str, Any]) -> None:
        super().__init__(message, hint)
        self.name = name
        self.parameters = parameters


class Client:
    """One connection to the daemon at *path*.

    *timeout* is in seconds, for each wait (None: for ever). Not for use by several threads at once.
    Raise DaemonUnavailableError when no daemon answers, PrivilegeError when we may not connect.
    """

    def __init__(self, path: Path | str = DEFAULT_SOCKET, timeout: float | None = None) -> None:
        self.path = Path(path)
        self.timeout = timeout
        self._decoder = Decoder(MAX_REPLY)
        self._busy = False
        self._socket = self._connect()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def fileno(self) -> int:
        """Give the socket's file descriptor, -1 when it is closed."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the connection; the daemon forgets a call that is still waiting."""
        self._socket.close()

    def call(self, method: str, /, **parameters: Any) -> dict[str, Any]:
        """Call *method* ("Status", or with its interface) and give the reply's parameters.

        Parameters that are None are left out. Errors of the daemon raise: TargetGoneError,
        PrivilegeError, UsageError, KernelFeatureError or RemoteError.
        """
        *_, last = self._replies(method, parameters, more=False)
        return last

    def stream(self, method: str, /, **parameters: Any) -> Iterator[dict[str, Any]]:
        """Call *method* and give every reply as it comes; the last one is the result.

        Leave the iterator early only to close the client: what is under way cannot be taken back.
        """
        return self._replies(method, parameters, more=True)

    def _replies(
        self, method: str, parameters: dict[str, Any], more: bool
    ) -> Iterator[dict[str, Any]]:
        if self._busy:
            raise RuntimeError("an earlier call of this client has not been answered in full")
        given = {name: value for name, value in parameters.items() if value is not None}
        full = method if "." in method else f"{INTERFACE}.{method}"
        self._busy = True
        self._send(encode_call(CallMessage(full, given, more=more)))
        while True:
            reply = self._receive()
            self._busy = reply.continues
            if reply.error:
                raise _translated(reply)
            yield reply.parameters
            if not reply.continues:
                return

    def _connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            if self.timeout is not None:
                # a non-blocking connect fails at once when the daemon's queue is full; this waits
                seconds, rest = divmod(max(self.timeout, 1e-3), 1)
                wait = struct.pack("@ll", int(seconds), int(rest * 1e6))
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, wait)
            sock.connect(os.fspath(self.path))
            sock.settimeout(self.timeout)
        except BaseException as error:
            sock.close()
            if isinstance(error, OSError):
                raise self._refused(error) from error
            raise
        return sock

    def _refused(self, error: OSError) -> KsmdError:
        if isinstance(error, PermissionError):
            return PrivilegeError(f"{self.path}: {error.strerror}", "run this command as root")
        if isinstance(error, FileNotFoundError | ConnectionRefusedError):
            return DaemonUnavailableError(
                f"ksmd is not running: nobody answers at {self.path}",
                "start it with `systemctl start ksmd` or `ksmd run`,"
                " or say where it listens with --socket PATH",
            )
        if isinstance(error, TimeoutError | BlockingIOError):
            return self._silent()
        why = error.strerror or str(error)
        return DaemonUnavailableError(
            f"cannot connect to {self.path}: {why}", "check --socket PATH"
        )

    def _silent(self) -> KsmdError:
        return DaemonUnavailableError(
            f"ksmd did not answer at {self.path} within {self.timeout:g} s"
            if self.timeout is not None
            else f"ksmd does not take calls at {self.path} now",
            "it may be busy or stopped: look at `journalctl -u ksmd` and at its state in `ps`",
        )

    def _send(self, data: bytes) -> None:
        try:
            self._socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            # turned away: the reason was sent before the connection was closed, and is read next
            return
        except TimeoutError as error:
            raise self._silent() from error

    def _receive(self) -> ReplyMessage:
        try:
            while (message := self._decoder.next()) is None:
                data = b""
                with contextlib.suppress(ConnectionResetError):
                    data = self._socket.recv(_CHUNK)
                if not data:
                    raise DaemonUnavailableError(
                        "ksmd closed the connection before it answered",
                        "it may have been stopped: look at `journalctl -u ksmd`",
                    )
                self._decoder.feed(data)
            return parse_reply(message)
        except TimeoutError as error:
            raise self._silent() from error
        except ProtocolError as error:
            raise DaemonUnavailableError(
                f"what answers at {self.path} is no ksmd: {error}", "check --socket PATH"
            ) from error


class SharedMemoryArea:
    """Memory of this process that may be shared, page by page, with equal memory of others.

    Nothing changes for the program: a page that it writes to becomes its own again. When the area
    is closed, or the process ends, all of it is. Buffers are kept alive, and from being resized,
    until then. The area belongs to the process that made it; a child made by fork has none.

    *path* and *timeout* (seconds, for each wait) are those of :class:`Client`. *domain* is for
    root: the trust domain, instead of one for each user.
    """

    def __init__(
        self,
        path: Path | str = DEFAULT_SOCKET,
        timeout: float | None = None,
        domain: str | None = None,
    ) -> None:
        self._pid = os.getpid()
        self._domain = domain
        self._views: list[memoryview] = []
        self._client = Client(path, timeout)
        try:
            self._sma = self._client.call("CreateSharedMemoryArea")["sma"]
        except BaseException:
            self._client.close()
            raise

    def __enter__(self) -> SharedMemoryArea:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def register(self, buffer: Any) -> int:
        """Register the whole pages inside *buffer*; their number.

        *buffer* is anything with contiguous memory of its own: a numpy array, a bytearray, a
        private mmap. ValueError when there is no whole page in it; RemoteError with the name
        InvalidRegion when it is memory of a kind that cannot be shared (a MAP_SHARED mmap is shared
        already, say).
        """
        view = memoryview(buffer)
        start, npages = _pages_inside(view)
        self.register_range(start, npages)
        self._views.append(view)
        return npages

    def register_range(self, address: int, npages: int) -> None:
        """Register *npages* pages from *address* on, which must stay mapped."""
        self._call("RegisterMemoryRegion", addr=address, npages=npages, domain=self._domain)

    def share(self) -> dict[str, Any]:
        """Merge what can be merged now, and wait for it.

        The answer says how many pages were ``scanned`` and ``merged``, and why others were not
        (``refusals``). Memory that is equal to no other now may be merged later, by the daemon's
        own scans or when another process shares its own.
        """
        return self._call("Share")

    def remove(self) -> None:
        """Forget all that was registered, and wait until all of it is this process's own again."""
        self._call("RemoveMemoryRegion", wait=True)
        self._release()

    def close(self) -> None:
        """End the area. Its memory becomes this process's own again, within moments."""
        self._client.close()
        self._release()

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        if os.getpid() != self._pid:
            raise RuntimeError("this area belongs to the process that made it, not to its child")
        return self._client.call(method, sma=self._sma, **parameters)

    def _release(self) -> None:
        while self._views:
            self._views.pop().release()


class _PyBuffer(ctypes.Structure):
    """Py_buffer, Include/cpython/object.h (Include/pybuffer.h): the start of it matters here."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("rest", ctypes.c_void_p * 16),
    )


def _pages_inside(view: memoryview) -> tuple[int, int]:
    """Give (address, pages) of the whole pages in *view*."""
    if not view.contiguous:
        raise ValueError("the buffer is not contiguous: register the array that it is a part of")
    found = _PyBuffer()
    # flags 0x98: PyBUF_ANY_CONTIGUOUS; read-only buffers have an address, too
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(view), ctypes.byref(found), 0x98)
    address, length = int(found.buf or 0), int(found.len)
    ctypes.pythonapi.PyBuffer_Release(ctypes.byref(found))
    start, end = -(-address // PAGE_SIZE) * PAGE_SIZE, (address + length) // PAGE_SIZE * PAGE_SIZE
    if start >= end:
        raise ValueError(f"there is no whole page in a buffer of {length} bytes at {address:#x}")
    return start, (end - start) // PAGE_SIZE


def _translated(reply: ReplyMessage) -> KsmdError:
    """Make the error that the caller would have met inside the daemon."""
    name, parameters = reply.error, reply.parameters
    message = str(parameters.get("message") or _described(reply))
    hint = str(parameters.get("hint", ""))
    if name in {f"{INTERFACE}.PermissionDenied", f"{SERVICE}.PermissionDenied"}:
        return PrivilegeError(message, hint)
    if name == f"{INTERFACE}.TargetGone":
        return TargetGoneError(message, hint)
    if name.startswith(f"{SERVICE}."):
        hint = hint or "ksmctl and the running ksmd may be of different versions: restart ksmd"
    kind = _ERRORS.get(parameters.get("exit_code", 0))
    return kind(message, hint) if kind else RemoteError(message, hint, name, parameters)


def _described(reply: ReplyMessage) -> str:
    if reply.error == f"{INTERFACE}.NotRegistered":
        return f"process {reply.parameters.get('pid', '?')} is no target of ksmd"
    short = reply.error.rpartition(".")[2]
    details = ", ".join(f"{key}: {value}" for key, value in reply.parameters.items())
    return f"ksmd answered {short}" + (f" ({details})" if details else "")
