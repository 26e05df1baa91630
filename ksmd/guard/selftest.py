"""Proof, on the running kernel, that a fault on merged memory can be answered as it is.

The guard rests on what the kernel does in a dozen corners: which faults a private mapping of a
memfd raises, what fork copies, what a pin forbids. A version number says nothing about them, so the
daemon merges nothing before this has passed. The pager is a real one, the target a throw-away
process of ours (``rehearsal``).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys

from ksmd.guard.client import Pager
from ksmd.guard.line import PagerGoneError, PagerRefusedError
from ksmd.kernel import channel, priority
from ksmd.kernel.patience import Patience
from ksmd.model.features import Feature

NAME = "guard self-test"
WITHOUT = "nothing is merged: memory that a program drops could show it wrong content"
#: Seconds for all steps, of the two processes' own. They take a few milliseconds, starting the two
#: most of the time.
DEADLINE = 10.0
_TARGET = 1


def run(deadline: float = DEADLINE) -> Feature:
    """Rehearse; ``detail`` of the result says what was proved, or which step failed and how."""
    pager = Pager()
    mine, its = channel.pair()
    rehearsal = None
    try:
        rehearsal = subprocess.Popen(
            [sys.executable, "-P", "-m", "ksmd.guard.rehearsal", str(its.fileno())],
            pass_fds=(its.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        its.close()
        with contextlib.suppress(OSError):
            priority.go_before_others(rehearsal.pid)
        pager.start()
        present, detail = _watch(mine, pager, Patience(deadline, rehearsal.pid, pager.pid))
    except (OSError, PagerGoneError) as error:
        present, detail = False, f"cannot rehearse: {error}"
    finally:
        if rehearsal is not None:
            _end(rehearsal)
        mine.close()
        its.close()
        pager.close(force=True)  # whom it served is dead
    return Feature(NAME, present=present, needed=True, detail=detail, without=WITHOUT)


def _watch(end: socket.socket, pager: Pager, patience: Patience) -> tuple[bool, str]:
    """Serve the rehearsal until it says how it went."""
    step = "start"
    while True:
        try:
            header, _, fds = patience.receive(end)
        except TimeoutError:
            return False, f"{step}: no end; a fault is not answered"
        except channel.PeerGoneError:
            return False, f"{step}: the process died"
        if "done" in header:
            notes = "".join(f"; {note}" for note in header["notes"])
            return True, f"all steps in {header['done'] * 1000:.0f} ms{notes}"
        if "failed" in header:
            return False, str(header["failed"])
        if "ask" in header:
            try:
                _serve(pager, header["ask"], [(s, e) for s, e in header["ranges"]], fds)
            except PagerRefusedError as error:
                return False, f"{step}: {error}"
            channel.send(end, {"ok": True})
        else:
            step = header["step"]


def _serve(pager: Pager, verb: str, ranges: list[tuple[int, int]], fds: list[int]) -> None:
    if verb == "guard":
        pager.guard(_TARGET, fds[0], ranges)
    else:
        pager.settle({_TARGET: ranges})
    for fd in fds:
        os.close(fd)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and what it forked."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
