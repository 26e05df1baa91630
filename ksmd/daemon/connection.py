"""One caller of the control socket: its calls in, its replies out, never blocking.

Varlink answers calls in the order in which they came, so one call of a connection is worked on at
a time; what follows it waits undecoded, and when enough of it waits, unread. A caller that does not
read its replies, or never finishes a message, costs a bounded buffer until the server drops it.
"""

from __future__ import annotations

import logging
import select
import selectors
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ksmd.daemon.protocol import (
    INTERFACE,
    CallMessage,
    Decoder,
    ProtocolError,
    ReplyMessage,
    encode_reply,
    parse_call,
)
from ksmd.daemon.quiet import Quiet
from ksmd.kernel import peer

log = logging.getLogger(__name__)

#: Bytes asked for in one recv.
_CHUNK = 64 << 10
#: Bytes of unread replies after which a caller is dropped, instead of being given one more.
MAX_OUTPUT = 4 << 20
#: Bytes of unread replies after which no further call of the caller is begun.
_HIGH_WATER = 1 << 20


class CallError(Exception):
    """A named error reply. A name without a dot belongs to org.ksmd.Control."""

    def __init__(self, name: str, **parameters: Any) -> None:
        super().__init__(name)
        self.name = name
        self.parameters = parameters


@dataclass(frozen=True, slots=True)
class Peer:
    """Who called, as the kernel says (SO_PEERCRED): the ids when it connected."""

    pid: int
    uid: int
    gid: int


class Call:
    """One call, to be answered once, now or later. Answering a caller who left does nothing."""

    def __init__(self, connection: Connection, message: CallMessage) -> None:
        self._connection = connection
        self._answered = False
        self.method = message.method
        self.parameters = message.parameters
        self.more = message.more
        self.oneway = message.oneway
        self.peer = connection.peer
        #: Unique per connection: what a caller registered is released when this closes.
        self.connection_id = connection.id

    @property
    def closed(self) -> bool:
        """Whether nobody waits for an answer any more: answered, or the caller left."""
        return self._answered or self._connection.closed

    def open_peer(self) -> int:
        """Open a pidfd of the process that connected, whatever has its pid now."""
        return self._connection.open_peer()

    def in_group(self, gid: int) -> bool:
        """Whether the process that connected was of that group."""
        return gid == self.peer.gid or gid in self._connection.groups()

    def reply(self, parameters: dict[str, Any] | None = None, continues: bool = False) -> None:
        """Answer. With *continues* another reply follows; dropped for who did not ask for more."""
        if continues and not self.more:
            return
        self._answer(ReplyMessage(parameters or {}, continues=continues))

    def error(self, name: str, **parameters: Any) -> None:
        """Answer with the error *name*; without a dot it belongs to org.ksmd.Control."""
        full = name if "." in name else f"{INTERFACE}.{name}"
        self._answer(ReplyMessage(parameters, error=full))

    def _answer(self, reply: ReplyMessage) -> None:
        if self.closed:
            return
        try:
            data = encode_reply(reply)
        except ProtocolError:
            log.exception("the reply to %s cannot be sent", self.method)
            reply = ReplyMessage(
                {"message": "the reply is too large or malformed", "hint": "see the log of ksmd"},
                error=f"{INTERFACE}.Internal",
            )
            data = encode_reply(reply)
        self._answered = not reply.continues
        self._connection.answer(b"" if self.oneway else data, done=self._answered)


class Connection:
    """One accepted socket. ``begin`` is called with each call, in order, one at a time.

    ``on_change`` is called when ``interest`` may be another, ``on_close`` once, before the end.
    An answer never begins the next call by itself: that waits for the next ``handle``, so that
    ``begin`` is not entered from within whoever answers.
    """

    def __init__(
        self,
        number: int,
        sock: socket.socket,
        begin: Callable[[Call], None],
        on_change: Callable[[Connection], None],
        on_close: Callable[[Connection], None],
        clock: Callable[[], float],
        quiet: Quiet,
    ) -> None:
        self.id = number
        self.peer = peer_of(sock)
        self.closed = False
        self._socket = sock
        self._begin = begin
        self._on_change = on_change
        self._on_close = on_close
        self._clock = clock
        self._quiet = quiet
        self._decoder = Decoder()
        self._output = bytearray()
        self._current: Call | None = None
        self._ended = False  # the caller sends nothing more
        self._backlog = False  # a complete message may still wait in the decoder
        self._in_turn = False
        self._since = clock()

    def fileno(self) -> int:
        """Give the socket's file descriptor, -1 when it is closed."""
        return self._socket.fileno()

    @property
    def interest(self) -> int:
        """The selector events that would help now; 0 while only the daemon can go on."""
        mask = 0
        full = len(self._decoder) > _CHUNK and (self._current is not None or self._backlog)
        if not self._ended and not full and len(self._output) < _HIGH_WATER:
            mask |= selectors.EVENT_READ
        if self._output or (self._backlog and self._current is None):
            mask |= selectors.EVENT_WRITE
        return mask

    def handle(self, mask: int) -> None:
        """Do what can be done without blocking."""
        if mask & selectors.EVENT_READ and self.interest & selectors.EVENT_READ:
            self._read()
        self._turn()

    def stalled(self, limit: float) -> bool:
        """Tell whether the caller has owed us something for *limit* seconds, or has left unseen.

        It owes the rest of a message, or to read its replies. Idle callers owe nothing.
        """
        if self.interest == 0 and _hung_up(self._socket):
            return True
        owes = bool(self._output) or (len(self._decoder) > 0 and self._current is None)
        return owes and self._clock() - self._since > limit

    def answer(self, data: bytes, done: bool) -> None:
        """Queue *data*; *done* ends the current call."""
        if not self._output:
            self._since = self._clock()
        full = len(self._output) > MAX_OUTPUT
        if not full:
            self._output += data
        if done:
            self._current = None
        if full:
            why = "dropping pid %d: it does not read its replies"
            self._quiet.info("does not read", self.peer.uid, why, self.peer.pid)
            self.close()
        elif not self._in_turn:
            self._settle()

    def stop(self, **parameters: Any) -> None:
        """Answer the call that waits with Failed, send what can be sent at once, close."""
        if self._current is not None:
            self._current.error("Failed", **parameters)
        if not self.closed:
            self._write()
        self.close()

    def open_peer(self) -> int:
        """Open a pidfd of the process at the other end."""
        return peer.open_pidfd(self._socket)

    def groups(self) -> frozenset[int]:
        """Give the supplementary groups of the process at the other end."""
        return peer.groups(self._socket)

    def close(self) -> None:
        """Drop the caller. Safe to call twice."""
        if self.closed:
            return
        self.closed = True
        self._on_close(self)
        self._socket.close()

    def _read(self) -> None:
        try:
            data = self._socket.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        if data:
            if not len(self._decoder):
                self._since = self._clock()
            self._decoder.feed(data)
            self._backlog = True
            return
        self._ended = True
        if _hung_up(self._socket):
            self.close()

    def _turn(self) -> None:
        """Begin the next call, if it may begin, send what can be sent, leave when all is done.

        One call each time: whoever sends thousands at once, over as many connections as he may,
        must not hold up scans, merges and what is to be given back.
        """
        self._in_turn = True
        try:
            self._next_call()
        except ProtocolError as error:
            uid, pid = self.peer.uid, self.peer.pid
            self._quiet.info("protocol", uid, "dropping pid %d: %s", pid, error)
            self.close()
        finally:
            self._in_turn = False
        self._settle()

    def _settle(self) -> None:
        if not self.closed:
            self._write()
        if self._ended and not (self._output or self._backlog or self._current):
            self.close()
        if not self.closed:
            self._on_change(self)

    def _next_call(self) -> None:
        if self.closed or self._current is not None or len(self._output) >= _HIGH_WATER:
            return
        message = self._decoder.next()
        if message is None:
            self._backlog = False
            return
        self._since = self._clock()
        self._current = Call(self, parse_call(message))
        self._begin(self._current)

    def _write(self) -> None:
        while self._output:
            try:
                sent = self._socket.send(self._output, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return
            except OSError:
                self.close()
                return
            self._since = self._clock()
            del self._output[:sent]


def peer_of(sock: socket.socket) -> Peer:
    """Ask the kernel who is at the other end of a connected Unix socket (unix(7), SO_PEERCRED)."""
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return Peer(*struct.unpack("=iII", data))


def _hung_up(sock: socket.socket) -> bool:
    """Tell a caller who closed its socket from one who only ended its sending side."""
    poll = select.poll()
    poll.register(sock, 0)  # POLLHUP and POLLERR are always reported
    return any(events & (select.POLLHUP | select.POLLERR) for _, events in poll.poll(0))
