"""The control protocol: JSON objects, each ended by a NUL, on a Unix stream socket (Varlink).

Varlink framing was chosen because it is the smallest that other tools speak already (``varlinkctl``
of systemd calls ksmd without knowing it) and because a stray byte can never be taken for a length.
This module is pure: bytes in, messages out. Whatever the bytes are, a :class:`Decoder` either gives
a message, asks for more, or raises :class:`ProtocolError`, in time linear in the bytes fed and
within its limit of memory for what it keeps.

    call   {"method": "org.ksmd.Control.Status", "parameters": {...}, "more": bool, "oneway": bool}
    reply  {"parameters": {...}, "continues": bool}
    error  {"error": "org.ksmd.Control.NotRegistered", "parameters": {...}}
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any, NoReturn

#: The interface's name. All its methods and errors are described in org.ksmd.Control.varlink.
INTERFACE = "org.ksmd.Control"
#: The interface that every Varlink service has (https://varlink.org/Service).
SERVICE = "org.varlink.service"
#: Where ``ksmd`` listens and ``ksmctl`` calls, unless told otherwise.
DEFAULT_SOCKET = "/run/ksmd/ksmd.sock"

#: The longest message in bytes, without its NUL.
MAX_MESSAGE = 1 << 20
#: The longest reply: the status of some ten thousand targets. Only to root, and to members of the
#: socket's group, ksmd says so much at once.
MAX_REPLY = 16 << 20
#: The deepest nesting of arrays and objects.
MAX_DEPTH = 32

# Strings are swallowed whole, so that only brackets of the structure are left. Both repetitions
# are possessive and the closing quote is optional: the search never goes back.
_STRUCTURE = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|([\[{])|([\]}])', re.DOTALL)


class ProtocolError(Exception):
    """The peer does not speak the protocol. Nothing after this point can be understood."""


@dataclass(frozen=True, slots=True)
class CallMessage:
    """One call. ``more``: the caller takes several replies; ``oneway``: it wants none."""

    method: str
    parameters: dict[str, Any] = field(default_factory=dict)
    more: bool = False
    oneway: bool = False


@dataclass(frozen=True, slots=True)
class ReplyMessage:
    """One reply; ``error`` is "" for a good one. ``continues``: others follow for this call."""

    parameters: dict[str, Any] = field(default_factory=dict)
    continues: bool = False
    error: str = ""


def encode(message: dict[str, Any], limit: int = MAX_MESSAGE) -> bytes:
    """Frame *message*. ProtocolError: longer than *limit* bytes, or no JSON (NaN, bytes, ...)."""
    try:
        data = json.dumps(message, separators=(",", ":"), allow_nan=False).encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        raise ProtocolError(f"not a JSON message: {error}") from error
    if len(data) > limit:
        raise ProtocolError(f"message of {len(data)} bytes, the limit is {limit}")
    return data + b"\0"


def encode_call(call: CallMessage) -> bytes:
    """Frame a call; flags that are false are left out."""
    message: dict[str, Any] = {"method": call.method, "parameters": call.parameters}
    if call.more:
        message["more"] = True
    if call.oneway:
        message["oneway"] = True
    return encode(message)


def encode_reply(reply: ReplyMessage) -> bytes:
    """Frame a reply or an error."""
    message: dict[str, Any] = {"parameters": reply.parameters}
    if reply.error:
        message["error"] = reply.error
    elif reply.continues:
        message["continues"] = True
    return encode(message, MAX_REPLY)


class Decoder:
    """Cuts a stream into messages. ``feed`` what arrived, then ask ``next`` until it gives None.

    Messages are decoded only when asked for, so a caller may leave them where they are (and stop
    reading) while it still works on an earlier one. After a ProtocolError the decoder stays broken.
    """

    def __init__(self, max_message: int = MAX_MESSAGE, max_depth: int = MAX_DEPTH) -> None:
        self._buffer = bytearray()
        self._searched = 0
        self._max_message = max_message
        self._max_depth = max_depth
        self._broken = ""

    def __len__(self) -> int:
        """Bytes that were fed and not given back as messages yet."""
        return len(self._buffer)

    def feed(self, data: bytes) -> None:
        """Append what arrived. Nothing is looked at before ``next``."""
        if self._broken:
            raise ProtocolError(self._broken)
        self._buffer += data

    def next(self) -> dict[str, Any] | None:
        """Give the next message, None when it is not complete yet."""
        if self._broken:
            raise ProtocolError(self._broken)
        end = self._buffer.find(b"\0", self._searched)
        if (end if end >= 0 else len(self._buffer)) > self._max_message:
            self._fail(f"message longer than {self._max_message} bytes")
        if end < 0:
            self._searched = len(self._buffer)
            return None
        data = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        self._searched = 0
        return self._parse(data)

    def _parse(self, data: bytes) -> dict[str, Any]:
        if self._depth(data) > self._max_depth:
            self._fail(f"nested deeper than {self._max_depth}")
        try:
            message = json.loads(
                data.decode("utf-8"), object_pairs_hook=_object, parse_constant=_no_constant
            )
        except ValueError as error:
            self._fail(f"not JSON: {error}")
        if not isinstance(message, dict):
            self._fail("a message is a JSON object")
        return message

    def _depth(self, data: bytes) -> int:
        depth = deepest = 0
        for found in _STRUCTURE.finditer(data):
            if found[1]:
                depth += 1
                deepest = max(deepest, depth)
            elif found[2]:
                depth -= 1
        return deepest

    def _fail(self, why: str) -> NoReturn:
        self._broken = why
        self._buffer.clear()
        raise ProtocolError(why)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name occurs twice in one object")
    return made


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _fields(message: dict[str, Any], kinds: dict[str, type]) -> None:
    for name, value in message.items():
        if name not in kinds:
            raise ProtocolError(f"unknown field {name!r}")
        if not isinstance(value, kinds[name]):
            raise ProtocolError(f"field {name!r} has the wrong type")


def parse_call(message: dict[str, Any]) -> CallMessage:
    """Understand a call, or raise ProtocolError. Unknown fields are refused.

    Some clients send every field that Varlink has, with null or false for what they do not mean.
    """
    message = {name: value for name, value in message.items() if value is not None}
    if message.get("upgrade") is False:
        del message["upgrade"]
    _fields(message, {"method": str, "parameters": dict, "more": bool, "oneway": bool})
    if "method" not in message:
        raise ProtocolError("a call has a method")
    return CallMessage(
        message["method"],
        message.get("parameters", {}),
        message.get("more", False),
        message.get("oneway", False),
    )


def parse_reply(message: dict[str, Any]) -> ReplyMessage:
    """Understand a reply or an error, or raise ProtocolError."""
    _fields(message, {"parameters": dict, "continues": bool, "error": str})
    return ReplyMessage(
        message.get("parameters", {}), message.get("continues", False), message.get("error", "")
    )


def split_method(method: str) -> tuple[str, str]:
    """Split "org.ksmd.Control.Status" into its interface and its method ("" where missing)."""
    interface, _, name = method.rpartition(".")
    return interface, name
