"""``ksmd exporter``: the counters of a running ksmd for Prometheus, over HTTP.

A process of its own, which reads the control socket and needs no privilege beyond access to it.
Under a socket unit it serves the socket that it is handed, and --listen is not used.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

from ksmd.daemon import journal
from ksmd.daemon.notify import Manager
from ksmd.daemon.protocol import DEFAULT_SOCKET

HELP = "serve the counters of a running ksmd to Prometheus"
DEFAULT_LISTEN = "127.0.0.1:9929"

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of exporter."""
    parser.add_argument(
        "--listen",
        metavar="ADDRESS:PORT",
        default=DEFAULT_LISTEN,
        help=f"where to serve HTTP, port 0 for a free one (default {DEFAULT_LISTEN})",
    )
    parser.add_argument(
        "--socket",
        type=Path,
        metavar="PATH",
        default=Path(DEFAULT_SOCKET),
        help=f"where ksmd listens (default {DEFAULT_SOCKET})",
    )


def run(args: argparse.Namespace) -> int:
    """Serve until told to stop."""
    journal.configure(
        verbose=False, stream=sys.stderr, environ=os.environ, identifier="ksmd-exporter"
    )
    manager = Manager.take(os.environ)
    # an HTTP server and a metrics library, which no other verb needs
    from ksmd.exporter import server  # noqa: PLC0415

    listener = server.inherited(manager.inherited)
    if listener is None:
        listener = server.bind(*server.address(args.listen))
    served = server.serve(listener, args.socket)
    signal.signal(signal.SIGTERM, _leave)
    host = listener.getsockname()
    log.info("metrics at http://%s:%d/metrics", host[0], host[1])
    manager.ready()
    try:
        served.serve_forever()
    except (KeyboardInterrupt, SystemExit):
        return 0
    finally:
        served.server_close()
    return 0


def _leave(_number: int, _frame: object) -> NoReturn:
    raise SystemExit(0)
