"""Logging: to the journal with priorities and fields where stderr leads there, else plain lines.

A record may carry fields that an operator searches by (``journalctl KSMD_TARGET_PID=4711``)::

    log.info("pid %d refused: %s", pid, reason, extra=fields(target_pid=pid, domain="web"))

They go out by the journal's own protocol (systemd.journal-fields(7), "Native Journal Protocol"),
which is one datagram for each record. Where that fails, the line goes to stderr with a priority
prefix (sd-daemon(3)); nothing is lost.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
import sys
from collections.abc import Mapping
from typing import TextIO

JOURNAL = "/run/systemd/journal/socket"
PLAIN = "%(levelname)s %(name)s: %(message)s"
#: A longer message would not fit into one datagram with the usual limits.
_MAX_BYTES = 32 << 10
_SEND_SECONDS = 1.0
_FIELDS = "ksmd_fields"

Value = str | int | float


def fields(**values: Value) -> dict[str, dict[str, Value]]:
    """Make the *extra* of a log call: ``target_pid=5`` becomes the field KSMD_TARGET_PID."""
    return {_FIELDS: values}


def priority(level: int) -> int:
    """Give the syslog priority of a logging level: errors 3, warnings 4, infos 6, the rest 7."""
    for least, number in ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4)):
        if level >= least:
            return number
    return 6 if level >= logging.INFO else 7


def leads_to_journal(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """Tell whether *stream* is the one that the service manager connected to the journal."""
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


class JournalHandler(logging.Handler):
    """Sends records to the journal at *address*; lines with a priority prefix to *stream* else."""

    def __init__(
        self, address: str = JOURNAL, stream: TextIO | None = None, identifier: str = "ksmd-main"
    ) -> None:
        super().__init__()
        self._identifier = identifier
        self._address = address
        self._stream = stream or sys.stderr

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record."""
        message = self.format(record)
        content = {
            "MESSAGE": message[:_MAX_BYTES],
            "PRIORITY": priority(record.levelno),
            "SYSLOG_IDENTIFIER": self._identifier,
            "CODE_FILE": record.pathname,
            "CODE_LINE": record.lineno,
            "CODE_FUNC": record.funcName,
            "KSMD_MODULE": record.name,
        }
        given: Mapping[str, Value] = getattr(record, _FIELDS, {})
        content |= {f"KSMD_{name.upper()}": value for name, value in given.items()}
        data = b"".join(_encoded(name, str(value)) for name, value in content.items())
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as end:
                end.settimeout(_SEND_SECONDS)
                end.connect(self._address)
                end.send(data)
        except OSError:
            self._fall_back(priority(record.levelno), message)

    def _fall_back(self, number: int, message: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            for line in message.splitlines():
                self._stream.write(f"<{number}>{line}\n")
            self._stream.flush()


def _encoded(name: str, value: str) -> bytes:
    data = value.encode(errors="replace")
    if b"\n" not in data:
        return name.encode() + b"=" + data + b"\n"
    return name.encode() + b"\n" + struct.pack("<Q", len(data)) + data + b"\n"


def configure(
    *, verbose: bool, stream: TextIO, environ: Mapping[str, str], identifier: str = "ksmd-main"
) -> None:
    """Send everything that is logged from now on to the journal or, as plain lines, to *stream*."""
    handler: logging.Handler
    if leads_to_journal(stream, environ):
        handler = JournalHandler(stream=stream, identifier=identifier)
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler(stream)
        handler.setFormatter(logging.Formatter(PLAIN))
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[handler])
