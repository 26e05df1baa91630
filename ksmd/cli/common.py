"""What every verb shares: how errors are told, and where output goes.

Results go to stdout, everything about them (errors, hints, progress) to stderr, so that output can
be piped. An expected failure is one line, with a second one that says what to do; a traceback is
left for mistakes of ours.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Any

from ksmd.daemon.protocol import DEFAULT_SOCKET
from ksmd.model.errors import KsmdError

if TYPE_CHECKING:
    from rich.console import Console

#: Output never gets wider than this, whatever the terminal.
WIDTH = 100
#: Seconds that a daemon has for an answer that it need not work for.
TIMEOUT = 30.0
INTERRUPTED = 130  # 128 + SIGINT, as a shell would say
BROKEN_PIPE = 141  # 128 + SIGPIPE


def console(file: IO[str] | None = None) -> Console:
    """Make the console for *file* (stdout): at most 100 columns, coloured on a terminal only."""
    from ksmd.cli.terminal import Terminal  # noqa: PLC0415 - the daemon has no use for rich

    made = Terminal(file=file or sys.stdout, highlight=False, markup=False, emoji=False)
    made.width = min(made.width, WIDTH) if made.is_terminal else WIDTH
    return made


def print_json(value: Any) -> None:
    """Print *value* for a program to read: one JSON document, in full."""
    print(json.dumps(value, indent=2))


def complain(prog: str, message: str, hint: str = "") -> None:
    """Print one line of what is wrong and, where there is one, a line of what to do."""
    print(f"{prog}: {message}", file=sys.stderr)
    if hint:
        print(f"{' ' * len(prog)}  {hint}", file=sys.stderr)


def guarded(prog: str, work: Callable[[], int]) -> int:
    """Do *work* and give its exit code; expected failures become messages and their exit codes."""
    try:
        code = work()
        sys.stdout.flush()
    except KsmdError as error:
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.flush()
        complain(prog, str(error), error.hint)
        return int(error.exit_code)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # the interpreter flushes stdout once more at its end, and would complain then
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    return code


def global_options(*, socket: bool = True) -> argparse.ArgumentParser:
    """Make the options that stand before or after the verb, as a parent parser.

    Their defaults are suppressed, else the verb's parser would undo what stood before the verb;
    :func:`fill_in` supplies them afterwards.
    """
    parser = argparse.ArgumentParser(add_help=False)
    if socket:
        parser.add_argument(
            "--socket",
            metavar="PATH",
            default=argparse.SUPPRESS,
            help=f"where ksmd listens (default {DEFAULT_SOCKET})",
        )
    parser.add_argument(
        "--json",
        action="store_true",
        default=argparse.SUPPRESS,
        help="print one JSON document for programs to read",
    )
    return parser


def fill_in(args: argparse.Namespace) -> argparse.Namespace:
    """Supply the defaults of the global options."""
    args.socket = getattr(args, "socket", DEFAULT_SOCKET)
    args.json = getattr(args, "json", False)
    return args


def whole_number(text: str) -> int:
    """Parse a number as argparse wants it: decimal, or hexadecimal with 0x; not negative."""
    try:
        number = int(text, 0)
    except ValueError:
        number = -1
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return number


def process_id(text: str) -> int:
    """Parse a process id."""
    if not text.isdecimal() or not 0 < int(text) <= 1 << 22:  # PID_MAX_LIMIT
        raise argparse.ArgumentTypeError(f"{text!r} is not a process id")
    return int(text)
