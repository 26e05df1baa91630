"""The stub's bytes and the layout of what it reads: header and records, as in stub.c.

``stub.bin`` is what :mod:`ksmd.remap.build` makes of ``stub.c``.
"""

from __future__ import annotations

import functools
import struct
from pathlib import Path
from typing import Final

MODE_WINDOW: Final = 0
MODE_SETUP: Final = 1
STAGE_DONE: Final = 7
UNDONE: Final = 100
#: A result below the negative of it: the mapping has flags (Advice), which are the rest.
FLAGGED: Final = 1000
STUCK: Final = 200

_FIELDS: Final = (
    "mode records nrecords socket alive_fd track guard store pagemap device phase marker gadget"
    " frame scratch scratch_len aside_len fresh_len store_offset store_len wake_start wake_len"
    " nfds trials ntrials pid tid error done keep aside fresh store_map alive_map rlimit_soft"
    " rlimit_hard rlimit_raised fail_step fail_errno fail_record spare"
).split()
_INDEX: Final = {name: number for number, name in enumerate(_FIELDS)}
_HEADER: Final = struct.Struct(f"={len(_FIELDS)}q")
_FIELD: Final = struct.Struct("=q")
_MSGHDR_AT: Final = _HEADER.size
_IOVEC_AT: Final = _MSGHDR_AT + 64
_CONTROL_AT: Final = _IOVEC_AT + 16
_BYTE_AT: Final = _CONTROL_AT + 64
HEADER_SIZE: Final = _BYTE_AT + 16
RECORD_SIZE: Final = 56

#: System calls the stub makes, and rt_sigreturn on its way out: what a seccomp filter must allow.
SYSTEM_CALLS: Final = (3, 9, 10, 11, 15, 16, 17, 25, 27, 28, 41, 47, 234, 302)


@functools.cache
def code() -> bytes:
    """Give the stub's machine code."""
    return Path(__file__).with_name("stub.bin").read_bytes()


def pack_header(address: int, **fields: int) -> bytes:
    """Give struct header for *address*, where it will lie in the target; other fields are 0."""
    values = [0] * len(_FIELDS)
    for name, value in fields.items():
        values[_INDEX[name]] = value - (1 << 64) if value >> 63 == 1 else value
    message = struct.pack("=8Q", 0, 0, address + _IOVEC_AT, 1, address + _CONTROL_AT, 64, 0, 0)
    iovec = struct.pack("=QQ", address + _BYTE_AT, 1)
    return (_HEADER.pack(*values) + message + iovec).ljust(HEADER_SIZE, b"\0")


def field_of(data: bytes, name: str) -> int:
    """Give one field of a header, signed."""
    return int(_FIELD.unpack_from(data, field_offset(name))[0])


def field_offset(name: str) -> int:
    """Offset of a header field in bytes."""
    return _INDEX[name] * 8
