"""Messages between ksmd's own processes: a JSON header, raw bytes, file descriptors.

A SOCK_SEQPACKET pair keeps message borders and tells a peer's death as an empty read. Headers are
small; bulk goes into ``payload``. Both sides are ksmd of the same version, so a malformed message
is a bug and raises.
"""

from __future__ import annotations

import array
import json
import os
import socket
import struct
from typing import Any

_HEAD = struct.Struct("=I")
_MAX_FDS = 64
_BUFFER = 4 << 20
_ONE = bytearray(1)  # what it holds is looked at by nobody
#: As plain numbers: to combine flags of an enum takes longer than some system calls.
_LENGTH_FLAGS = int(socket.MSG_PEEK | socket.MSG_TRUNC)
_CUT_FLAGS = int(socket.MSG_TRUNC | socket.MSG_CTRUNC)
_RECEIVE_FLAGS = int(socket.MSG_CMSG_CLOEXEC)
_CONTROL_SPACE = socket.CMSG_SPACE(4 * _MAX_FDS)


class PeerGoneError(Exception):
    """The other process has exited."""


def pair() -> tuple[socket.socket, socket.socket]:
    """Make two connected ends, close-on-exec, with room for the largest message."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in ends:
        # the FORCE variant ignores net.core.wmem_max, needs CAP_NET_ADMIN; try, else live with less
        for force, plain in ((32, socket.SO_SNDBUF), (33, socket.SO_RCVBUF)):
            try:
                end.setsockopt(socket.SOL_SOCKET, force, _BUFFER)
            except PermissionError:
                end.setsockopt(socket.SOL_SOCKET, plain, _BUFFER)
    return ends


def send(
    end: socket.socket, header: dict[str, Any], payload: bytes = b"", fds: tuple[int, ...] = ()
) -> None:
    """Send one message; blocks while the peer's queue is full."""
    head = json.dumps(header, separators=(",", ":")).encode()
    control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    try:
        end.sendmsg([_HEAD.pack(len(head)), head, payload], control)
    except (BrokenPipeError, ConnectionResetError) as error:
        raise PeerGoneError from error


def receive(end: socket.socket) -> tuple[dict[str, Any], bytes, list[int]]:
    """Receive one message: header, payload, file descriptors (ours to close, close-on-exec)."""
    try:
        # its length first: to make room for the largest takes longer than most messages do
        size = end.recv_into(_ONE, 1, _LENGTH_FLAGS)
        data, control, flags, _ = end.recvmsg(min(size, _BUFFER), _CONTROL_SPACE, _RECEIVE_FLAGS)
    except ConnectionResetError as error:
        raise PeerGoneError from error
    fds: list[int] = []
    for level, kind, content in control:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.extend(array.array("i", content[: len(content) // 4 * 4]))
    if not data:
        raise PeerGoneError
    if flags & _CUT_FLAGS:
        for fd in fds:
            os.close(fd)
        raise ValueError("message too large for the channel")
    (size,) = _HEAD.unpack_from(data)
    body = _HEAD.size + size
    return json.loads(data[_HEAD.size : body]), data[body:], fds
