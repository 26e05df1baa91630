"""The control socket: who may call, how many, and what becomes of a call.

The server lives in the daemon's own selector and never blocks, so no caller, however slow or
broken, can hold up a scan or a stop window. What a method means is decided by ``dispatch``; this
module checks it against the interface description first, so that ``dispatch`` sees known methods
with parameters of the right types only.

A daemon loop uses it so::

    server = ControlServer(path, dispatch)
    server.register(selector)
    while running:
        for key, mask in selector.select(timeout):
            key.data(key, mask)              # key.data is server.handle
        server.expire()                      # about once a second is enough
    server.close()
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import selectors
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ksmd
from ksmd.daemon import access, interface
from ksmd.daemon.connection import Call, CallError, Connection, Peer, peer_of
from ksmd.daemon.listening import close_socket, listen, permit
from ksmd.daemon.protocol import (
    INTERFACE,
    SERVICE,
    ReplyMessage,
    encode_reply,
    split_method,
)
from ksmd.daemon.quiet import Quiet
from ksmd.model.errors import KsmdError, TargetGoneError

__all__ = ["Call", "CallError", "ControlServer", "Dispatch", "Peer"]

log = logging.getLogger(__name__)

#: Method name without the interface, checked parameters (null ones left out), the call. The result
#: is the reply; None means that the call is answered later, through ``Call.reply``/``Call.error``.
#: CallError and KsmdError become error replies.
Dispatch = Callable[[str, dict[str, Any], Call], dict[str, Any] | None]

MAX_CONNECTIONS = 256
#: Connections of one user who is not root, and what all users together leave to root.
MAX_PER_USER = 32
KEPT_FOR_ROOT = 64
#: Seconds for which a caller may owe the rest of a message or leave replies unread.
STALL_SECONDS = 10.0
_ACCEPTS_PER_TURN = 16
#: Seconds for which a shortage that was told of is not told of again.
_SHORTAGE_SECONDS = 60.0

_SERVICE_TEXT = """\
# The Varlink service interface (https://varlink.org/Service).
interface org.varlink.service

method GetInfo() -> (
  vendor: string, product: string, version: string, url: string, interfaces: []string
)
method GetInterfaceDescription(interface: string) -> (description: string)

error InterfaceNotFound (interface: string)
error MethodNotFound (method: string)
error MethodNotImplemented (method: string)
error InvalidParameter (parameter: string)
error PermissionDenied ()
error ExpectedMore ()
"""


class ControlServer:
    """Serves the socket at *path* (made here, and its directory where it is missing).

    Raise KsmdError when a live daemon answers there already; a socket left behind by a dead one is
    replaced. *mode* and *gid* are the socket's (-1: whatever group it gets). *inherited* is a
    listening socket of the service manager, served in its place, with the mode and group that it
    has. Whom the mode lets in may call what :mod:`ksmd.daemon.access` allows; a socket that is
    root's alone serves nobody else, whatever became of its mode. *on_close* is told the
    ``connection_id`` of every connection that ends.
    """

    def __init__(
        self,
        path: Path | str,
        dispatch: Dispatch,
        on_close: Callable[[int], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        inherited: socket.socket | None = None,
        mode: int = 0o600,
        gid: int = -1,
    ) -> None:
        self.path = Path(inherited.getsockname() if inherited is not None else path)
        self._dispatch = dispatch
        self._closed_hook = on_close
        self._clock = clock
        self._interfaces = {INTERFACE: interface.load(), SERVICE: interface.parse(_SERVICE_TEXT)}
        self._listener: socket.socket
        self._identity: tuple[int, int] | None = None
        if inherited is not None:
            self._listener = inherited
        else:
            self._listener, self._identity = listen(self.path)
            self.permit(mode, gid)
        self._serves_others = inherited is not None or bool(mode & 0o066)
        self._quiet = Quiet(log)
        self._reserve: int | None = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        self._connections: dict[int, Connection] = {}
        self._masks: dict[int, int] = {}  # by connection id, what the selector waits for
        self._selector: selectors.BaseSelector | None = None
        self._accepting = False
        self._short_since = -_SHORTAGE_SECONDS
        self._count = 0

    def __len__(self) -> int:
        """Give the number of open connections."""
        return len(self._connections)

    @property
    def gid(self) -> int:
        """Group of the socket."""
        with contextlib.suppress(OSError):
            return self.path.stat().st_gid
        return 0

    def permit(self, mode: int, gid: int) -> None:
        """Give the socket another mode and group; one that was inherited keeps its own."""
        if self._identity is not None:
            permit(self.path, self._identity, mode, gid)
            self._serves_others = bool(mode & 0o066)

    def register(self, selector: selectors.BaseSelector) -> None:
        """Put the listening socket (and later every connection) into *selector*.

        The ``data`` of each key is :meth:`handle`.
        """
        self._selector = selector
        self._accept_on()

    def handle(self, key: selectors.SelectorKey, mask: int) -> None:
        """Do what *key* is ready for."""
        if key.fileobj is self._listener:
            self._accept()
        elif isinstance(key.fileobj, Connection) and not key.fileobj.closed:
            key.fileobj.handle(mask)

    def expire(self) -> None:
        """Drop callers that stall or have left, and accept again after a shortage. Cheap."""
        for connection in list(self._connections.values()):
            if connection.stalled(STALL_SECONDS):
                pid, uid = connection.peer.pid, connection.peer.uid
                self._quiet.info("stalled", uid, "dropping pid %d: it stalled", pid)
                connection.close()
        if self._reserve is None:
            with contextlib.suppress(OSError):
                self._reserve = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        if self._selector is not None and self._reserve is not None:
            self._accept_on()

    def close(self) -> None:
        """Answer who still waits, close everything, remove the socket if it is still ours."""
        for connection in list(self._connections.values()):
            connection.stop(message="ksmd is stopping", hint="", exit_code=1)
        self._accept_off()
        close_socket(self._listener, self.path, self._identity)
        if self._reserve is not None:
            os.close(self._reserve)
            self._reserve = None

    # -- accepting -----------------------------------------------------------------------------

    def _accept_on(self) -> None:
        if not self._accepting and self._selector is not None:
            self._selector.register(self._listener, selectors.EVENT_READ, self.handle)
            self._accepting = True

    def _accept_off(self) -> None:
        if self._accepting and self._selector is not None:
            self._selector.unregister(self._listener)
            self._accepting = False

    def _accept(self) -> None:
        for _ in range(_ACCEPTS_PER_TURN):
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno not in {errno.ECONNABORTED, errno.EINTR}:
                    self._shortage(error)
                    return
                continue
            self._admit(sock)

    def _admit(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        uid = peer_of(sock).uid
        if uid != 0 and not self._serves_others:
            hint = "call as root"
            _turn_away(sock, "PermissionDenied", "only root may control ksmd", hint)
            return
        if self._full(uid):
            self.expire()
        if message := self._full(uid):
            self._quiet.info("too many connections", uid, "turned away: %s", message)
            _turn_away(sock, "TooManyConnections", message, "close some, then try again")
            return
        self._count += 1
        connection = Connection(
            self._count, sock, self._begin, self._watch, self._forget, self._clock, self._quiet
        )
        self._connections[connection.id] = connection
        self._watch(connection)

    def _full(self, uid: int) -> str:
        """Say why there is no room for another connection of *uid*, "" when there is.

        Users cannot take each other's room, nor all of them together root's.
        """
        if len(self._connections) >= MAX_CONNECTIONS:
            return f"ksmd serves {MAX_CONNECTIONS} connections already"
        if uid == 0:
            return ""
        others = [c.peer.uid for c in self._connections.values() if c.peer.uid != 0]
        if others.count(uid) >= MAX_PER_USER:
            return f"ksmd serves {MAX_PER_USER} connections of user {uid} already"
        if len(others) >= MAX_CONNECTIONS - KEPT_FOR_ROOT:
            return "ksmd serves as many connections of users as it can"
        return ""

    def _shortage(self, error: OSError) -> None:
        """Out of file descriptors: spend the one in reserve to turn one caller away.

        A caller left in the queue would wake the loop for ever. Where even that does not help,
        nobody is accepted until ``expire`` finds a descriptor free.
        """
        if self._clock() - self._short_since >= _SHORTAGE_SECONDS:
            self._short_since = self._clock()
            log.warning("cannot accept callers: %s", error.strerror)
        if self._reserve is not None:
            os.close(self._reserve)
            self._reserve = None
            with contextlib.suppress(OSError):
                sock, _ = self._listener.accept()
                sock.setblocking(False)
                _turn_away(
                    sock,
                    "TooManyConnections",
                    "ksmd has no file descriptor left",
                    "raise its LimitNOFILE=, or close other connections",
                )
            with contextlib.suppress(OSError):
                self._reserve = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        if self._reserve is None:
            self._accept_off()

    # -- connections ---------------------------------------------------------------------------

    def _watch(self, connection: Connection) -> None:
        """Make the selector wait for exactly what *connection* can use."""
        known, mask = self._masks.get(connection.id, 0), connection.interest
        if mask == known or self._selector is None:
            return
        if not known:
            self._selector.register(connection, mask, self.handle)
        elif not mask:
            self._selector.unregister(connection)
        else:
            self._selector.modify(connection, mask, self.handle)
        self._masks[connection.id] = mask

    def _forget(self, connection: Connection) -> None:
        if self._masks.pop(connection.id, 0) and self._selector is not None:
            self._selector.unregister(connection)
        del self._connections[connection.id]
        if self._closed_hook is not None:
            self._closed_hook(connection.id)

    # -- calls ---------------------------------------------------------------------------------

    def _begin(self, call: Call) -> None:
        try:
            result = self._answer(call)
        except CallError as error:
            if call.peer.uid != 0:
                # only what is ours is logged: a method's name may be any text of the caller's
                _, method = split_method(call.method)
                kind = f"{method if method in access.METHODS else 'a call'}: {error.name}"
                self._quiet.info(kind, call.peer.uid, "refused pid %d: %s", call.peer.pid, kind)
            call.error(error.name, **error.parameters)
        except TargetGoneError as error:
            call.error("TargetGone", message=str(error), hint=error.hint)
        except KsmdError as error:
            code = int(error.exit_code)
            call.error("Failed", message=str(error), hint=error.hint, exit_code=code)
        except Exception:
            # The last line of defence: a mistake in one method must not end the daemon, whose
            # targets it guards. The log has the traceback, the caller learns that there is one.
            log.exception("%s failed", call.method)
            message = f"{call.method} failed in a way that ksmd did not expect"
            call.error("Internal", message=message, hint="its log has the details")
        else:
            if result is not None:
                call.reply(result)

    def _answer(self, call: Call) -> dict[str, Any] | None:
        name, method = split_method(call.method)
        known = self._interfaces.get(name)
        if known is None:
            raise CallError(f"{SERVICE}.InterfaceNotFound", interface=name)
        if method not in known.methods:
            raise CallError(f"{SERVICE}.MethodNotFound", method=call.method)
        if name == INTERFACE:
            access.check(method, call.peer.uid)
        wrong = known.takes(method, call.parameters)
        if wrong is not None:
            raise CallError(f"{SERVICE}.InvalidParameter", parameter=wrong)
        given = {key: value for key, value in call.parameters.items() if value is not None}
        if name == SERVICE:
            return self._service(method, given)
        return self._dispatch(method, given, call)

    def _service(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        if method == "GetInfo":
            return {
                "vendor": "ksmd",
                "product": "ksmd",
                "version": ksmd.__version__,
                "url": "man:ksmd(8)",
                "interfaces": sorted(self._interfaces),
            }
        known = self._interfaces.get(parameters["interface"])
        if known is None:
            raise CallError(f"{SERVICE}.InterfaceNotFound", interface=parameters["interface"])
        return {"description": known.text}


def _turn_away(sock: socket.socket, name: str, message: str, hint: str) -> None:
    """Say why, and close. The socket is new and non-blocking: the words fit or are lost."""
    parameters = {"message": message, "hint": hint}
    with contextlib.suppress(OSError), sock:
        sock.send(encode_reply(ReplyMessage(parameters, error=f"{INTERFACE}.{name}")))
