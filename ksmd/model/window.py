"""What the daemon asks of the tracer and what it answers: one stop window of one target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from typing import TYPE_CHECKING

from ksmd.model.process import TargetId
from ksmd.model.refusal import Reason

if TYPE_CHECKING:  # the tracer, which knows no columns, imports this module too
    import numpy as np
    from numpy.typing import NDArray


class Op(IntEnum):
    """What the stub does with one record."""

    MERGE = 0
    ZERO = 1
    UNMERGE = 2
    REMERGE = 3


class Advice(IntFlag):
    """What a program has said of its memory by madvise(2), and new memory must be told again."""

    NONE = 0
    DONTFORK = 2
    DONTDUMP = 4
    WIPEONFORK = 8
    HUGEPAGE = 64
    NOHUGEPAGE = 128


@dataclass(frozen=True, slots=True)
class Record:
    """One run: ``start``, ``length`` in bytes of the target; ``offset`` in bytes of the extent.

    ``advice`` is what has to be said of the new mapping: about huge pages always, all else by
    UNMERGE. (That a range is locked the stub finds out.)
    """

    op: Op
    start: int
    length: int
    offset: int = 0
    advice: Advice = Advice.NONE


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a record.

    ``result`` is 0 when it was carried out, 1 when the bytes differed, else a negative errno;
    ``stage`` is the last step reached (100 is added when it was undone, 200 when the undo failed);
    ``reason`` names it for the ledger, None when it was carried out.
    """

    record: Record
    result: int
    stage: int
    reason: Reason | None


@dataclass(frozen=True, slots=True)
class WindowRequest:
    """One stop window. ``extent_inode`` tells our own mappings; 0 when no extent is concerned.

    ``records``: dtype RECORD (:mod:`ksmd.model.tables`).
    """

    target: TargetId
    records: NDArray[np.void]
    extent_inode: int = 0
    deadline_ms: float = 10.0
    accept_seccomp_risk: bool = False


@dataclass(frozen=True, slots=True)
class WindowResult:
    """What became of a window.

    ``refused`` is set when the target was let go without a change. ``done`` (bool) tells for each
    of the ``records`` whether it was carried out, ``results`` (dtype RESULT) how it ended, and
    ``reasons`` why not, by index. ``lost``: the tracer ended in the window, so its stub may be at
    work yet.
    """

    target: TargetId
    records: NDArray[np.void]
    results: NDArray[np.void] | None = None
    done: NDArray[np.bool_] | None = None
    reasons: Mapping[int, Reason] = field(default_factory=dict)
    refused: Reason | None = None
    detail: str = ""
    lost: bool = False
    threads: int = 0
    stop_us: float = 0.0
    total_us: float = 0.0
    timings: dict[str, float] = field(default_factory=dict)

    @property
    def at_work_us(self) -> float:
        """Microseconds that the stub was at work; the rest of ``total_us`` is the stop's own."""
        return self.timings.get("stub", 0.0)

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        """Every record by itself; none where the target was let go."""
        if self.results is None:
            return ()
        return tuple(
            Outcome(
                Record(Op(op), start, length, offset, Advice(advice)),
                result, stage, self.reasons.get(index),
            )
            for index, ((op, start, length, offset, advice), (result, stage)) in enumerate(
                zip(self.records.tolist(), self.results.tolist(), strict=True)
            )
        )  # fmt: skip
