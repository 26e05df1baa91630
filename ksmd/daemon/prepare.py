"""Once per target, before its first window: may it be touched at all, and its two contexts."""

from __future__ import annotations

import logging
import os
import time

from ksmd.core import seccomp
from ksmd.daemon.bequest import TargetLabel
from ksmd.daemon.journal import fields
from ksmd.daemon.state import Target
from ksmd.guard.client import Pager
from ksmd.kernel import procfs, risks
from ksmd.model.errors import KsmdError, TargetGoneError
from ksmd.model.refusal import Reason
from ksmd.remap.engine import Engine, RefusedTargetError
from ksmd.remap.stub import SYSTEM_CALLS

log = logging.getLogger(__name__)

#: Bit 2 of coredump_filter: file-backed private mappings, as which merged memory counts.
_DUMP_FILE_PRIVATE = 4


def refuse(target: Target, reason: Reason, detail: str) -> None:
    """Leave the target alone from now on, and say so in the log."""
    log.info(
        "pid %d refused: %s %s",
        target.pid,
        reason,
        detail,
        extra=fields(
            target_pid=target.pid,
            domain=target.selected.domain,
            reason=str(reason),
        ),
    )
    target.refuse(reason, detail, time.monotonic())


def prepare(target: Target, engine: Engine, pager: Pager, deadline_ms: float) -> None:
    """Give the target its contexts, or a refusal. Raises TargetGoneError."""
    try:
        refuse_early(target, engine, deadline_ms)
        contexts = engine.setup(target.id, deadline_ms)
    except RefusedTargetError as error:
        if error.reason is Reason.GONE:
            raise TargetGoneError(f"process {target.pid} is gone") from None
        refuse(target, error.reason, error.detail)
        return
    try:
        label = TargetLabel.of(target.selected).as_json()
        pager.guard(target.slot, contexts.guard, track=contexts.track, about=label)
        bits = risks.coredump_filter(target.pid)
        risks.set_coredump_filter(target.pid, bits | _DUMP_FILE_PRIVATE)
    except KsmdError as error:
        pager.drop(target.slot)
        os.close(contexts.guard)
        os.close(contexts.track)
        if isinstance(error, TargetGoneError):
            raise
        target.refuse(Reason.NO_GUARD, str(error), time.monotonic())
        return
    target.contexts = contexts
    target.accepted()


def refuse_early(target: Target, engine: Engine, deadline_ms: float) -> None:
    """Raise RefusedTargetError for what can be known before anything is changed."""
    pid = target.pid
    if not risks.is_x86_64_elf(pid):
        raise RefusedTargetError(Reason.ARCHITECTURE)
    status = procfs.status_fields(pid)
    if "shstk" in status.get("x86_Thread_features", ""):
        raise RefusedTargetError(Reason.SHADOW_STACK)
    if status.get("TracerPid", "0") != "0":
        raise RefusedTargetError(Reason.TRACED, f"tracer {status['TracerPid']}")
    if risks.frozen(pid):
        raise RefusedTargetError(Reason.FROZEN)
    # the stop would find that out, too; but what follows looks at every process of the host
    if status.get("State", "").startswith("D"):
        raise RefusedTargetError(Reason.UNSTOPPABLE, "it is in state D")
    if (other := risks.shares_memory(pid)) is not None:
        raise RefusedTargetError(Reason.SHARED_MM, f"pid {other}")
    if found := risks.pin_risks(pid):
        raise RefusedTargetError(Reason.PINNED_PROCESS, "; ".join(found))
    if not target.selected.accept_seccomp_risk:
        _refuse_seccomp(target, engine, deadline_ms)


def _refuse_seccomp(target: Target, engine: Engine, deadline_ms: float) -> None:
    """Refuse a target whose filters would kill or fail a call of the stub.

    While the tracer lives the filters are suspended, but a stub that outlives it meets them.
    """
    modes = {
        procfs.status_fields(target.pid, tid).get("Seccomp", "0")
        for tid in procfs.tasks(target.pid)
    }
    if "1" in modes:
        raise RefusedTargetError(Reason.SECCOMP, "strict mode")
    if "2" not in modes:
        return
    for programs in engine.seccomp_filters(target.id, deadline_ms):
        if calls := seccomp.blocked(programs, SYSTEM_CALLS):
            names = ", ".join(map(str, calls))
            raise RefusedTargetError(Reason.SECCOMP, f"system calls {names}")
