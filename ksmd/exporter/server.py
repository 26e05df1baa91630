"""The HTTP server of the exporter: prometheus_client's application behind a plain WSGI server.

It answers on the socket that a socket unit hands over, so that the service needs no network of its
own and can reach nothing but the control socket, or on an address of the loopback interface.
"""

from __future__ import annotations

import logging
import socket
from pathlib import Path
from socketserver import BaseServer, ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

from ksmd.client import Client
from ksmd.exporter.metrics import StatusCollector
from ksmd.kernel.sdnotify import Inherited
from ksmd.model.errors import KsmdError, PrivilegeError, UsageError

log = logging.getLogger(__name__)

#: Seconds that ksmd may take to answer one scrape; Prometheus itself waits ten by default.
ANSWER_SECONDS = 8.0
#: Seconds that a caller may take to say what it wants.
CALLER_SECONDS = 10.0


class _Handler(WSGIRequestHandler):
    timeout = CALLER_SECONDS

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  (the base's name)
        log.debug(format, *args)


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def __init__(self, listener: socket.socket) -> None:
        # TCPServer would first make a socket of its own, of a kind that the sandbox forbids
        BaseServer.__init__(self, listener.getsockname(), _Handler)
        self.socket = listener
        self.server_name, self.server_port = "ksmd-exporter", 0
        self.setup_environ()

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = self.socket.accept()
        connection.settimeout(CALLER_SECONDS)
        return connection, address


def address(text: str) -> tuple[str, int]:
    """Parse HOST:PORT or [HOST]:PORT. UsageError where it is neither."""
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isdecimal() or not 0 <= int(port) < 1 << 16:
        raise UsageError(f"{text!r} is no address", "write HOST:PORT, as 127.0.0.1:9929")
    return host, int(port)


def bind(host: str, port: int) -> socket.socket:
    """Listen at an address; port 0 takes a free one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, reuse_port=False)
    except PermissionError as error:
        raise PrivilegeError(f"cannot listen at {host}:{port}: {error.strerror}") from error
    except OSError as error:
        why = error.strerror or str(error)
        raise KsmdError(f"cannot listen at {host}:{port}: {why}", "choose --listen") from error


def inherited(descriptors: tuple[Inherited, ...]) -> socket.socket | None:
    """Take the socket that a socket unit made, if there is one."""
    if not descriptors:
        return None
    if len(descriptors) > 1:
        raise UsageError(f"one socket is served, and {len(descriptors)} were handed over")
    try:
        made = socket.socket(fileno=descriptors[0].fd)
        listening = made.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise UsageError(f"what was handed over is no socket: {error.strerror}") from error
    if not listening or made.type != socket.SOCK_STREAM:
        raise UsageError("what was handed over is no listening stream socket")
    return made


def serve(listener: socket.socket, control: Path) -> WSGIServer:
    """Make the server on *listener*, asking the daemon at *control*. ``serve_forever`` runs it."""

    def ask() -> dict[str, Any]:
        try:
            with Client(control, ANSWER_SECONDS) as ksmd:
                return ksmd.call("Status")
        except KsmdError as error:
            log.warning("%s", error)
            raise

    registry = CollectorRegistry(auto_describe=False)
    registry.register(StatusCollector(ask))
    server = _Server(listener)
    server.set_app(make_wsgi_app(registry))
    return server
