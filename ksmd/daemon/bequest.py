"""What a daemon leaves with the pager for the next one: labels on targets and on extents.

Only what the kernel cannot be asked. Which pages are merged is not among it: maps tell that.
The labels go through JSON; a label that cannot be read raises KsmdError.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Self

from ksmd.core.integrity import ContentDigest
from ksmd.core.selection import Selected
from ksmd.model.errors import KsmdError
from ksmd.model.process import TargetId
from ksmd.remap.store import Extent

#: Pages that are digested at a time where something else may go on in between.
STEP_PAGES = 4096


class _Label:
    def as_json(self) -> dict[str, Any]:
        """Give what the pager keeps."""
        return asdict(self)  # type: ignore[call-overload,no-any-return]  # labels are dataclasses

    @classmethod
    def read(cls, label: dict[str, Any]) -> Self:
        """Understand what an earlier daemon left."""
        try:
            return cls(**label)
        except TypeError as error:
            raise KsmdError(f"an earlier daemon left a label that says {label}") from error


@dataclass(frozen=True, slots=True)
class TargetLabel(_Label):
    """A target: which process it is, and how it had been selected."""

    pid: int
    start_time: int
    name: str
    domain: str
    accept_seccomp_risk: bool

    @classmethod
    def of(cls, selected: Selected) -> TargetLabel:
        """Describe a target."""
        process = selected.process.id
        return cls(
            process.pid,
            process.start_time,
            selected.name,
            selected.domain,
            selected.accept_seccomp_risk,
        )

    @property
    def process(self) -> TargetId:
        """The process."""
        return TargetId(self.pid, self.start_time)


@dataclass(frozen=True, slots=True)
class ExtentLabel(_Label):
    """An extent: its place in the store, its pins (ring, slot), and the digest of its content."""

    domain: str
    number: int
    npages: int
    pins: list[tuple[int, int]]
    digest: str = ""

    def begin_digest(self, key: bytes) -> ContentDigest:
        """Begin the digest that an extent of this label must have under *key*."""
        about = self.as_json()
        del about["digest"]
        return ContentDigest(key, about)

    @classmethod
    def of(
        cls, domain: str, extent: Extent, pins: list[tuple[int, int]], key: bytes
    ) -> ExtentLabel:
        """Describe an extent, reading all of it for the digest."""
        place = (domain, extent.number, extent.npages, pins)
        digest = cls(*place).begin_digest(key)
        for first in range(0, extent.npages, STEP_PAGES):
            digest.update(extent.view(first, min(STEP_PAGES, extent.npages - first)))
        return cls(*place, digest.value())
