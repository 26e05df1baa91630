"""The texts of /proc: pure functions that turn them into values.

Any text can be thrown at them: they return values or raise ValueError naming the line, nothing
else. What reads the texts is :mod:`ksmd.kernel.procfs`. Everything here is the standard library:
the tracer imports it.
Formats: proc_pid_stat(5), proc_pid_status(5), proc_pid_maps(5), proc_pid_smaps(5), cgroups(7).
"""

from __future__ import annotations

import functools
import os
import re
from dataclasses import dataclass
from operator import le

from ksmd.model.vma import Vma


@dataclass(frozen=True, slots=True)
class TaskStat:
    """The fields of /proc/PID/task/TID/stat that ksmd uses.

    ``state`` is one letter; ``flags`` are the kernel's PF_*; ``start_time`` is in clock ticks since
    boot; ``vsize`` is in bytes.
    """

    comm: str
    state: str
    ppid: int
    flags: int
    num_threads: int
    start_time: int
    vsize: int


def parse_stat(data: bytes) -> TaskStat:
    """Parse a stat line. ``comm`` may hold spaces and parentheses: the last one closes it."""
    opening, closing = data.find(b"("), data.rfind(b")")
    fields = data[closing + 1 :].split()
    if not 0 < opening < closing or len(fields) < 22:
        raise ValueError("stat: not a line of /proc/PID/stat")
    try:
        return TaskStat(
            comm=os.fsdecode(data[opening + 1 : closing]),
            state=fields[0].decode("ascii"),
            ppid=int(fields[1]),
            flags=int(fields[6]),
            num_threads=int(fields[17]),
            start_time=int(fields[19]),
            vsize=int(fields[20]),
        )
    except ValueError as error:  # UnicodeDecodeError is one
        raise ValueError(f"stat: {error}") from None


_SPACE = " \t\r\v\f"  # not what else Unicode has: a process may have it in its name


def parse_fields(data: bytes) -> dict[str, str]:
    """Parse "Key: value" lines (status, fdinfo, meminfo). Lines without a colon are skipped."""
    fields = {}
    for line in os.fsdecode(data).split("\n"):
        key, colon, value = line.partition(":")
        if colon:
            fields[key] = value.strip(_SPACE)
    return fields


@dataclass(frozen=True, slots=True)
class Status:
    """A text of status, of which single fields are wanted: without parsing all of it."""

    data: bytes

    def _value(self, name: str) -> bytes | None:
        _, found, rest = self.data.partition(b"\n%s:" % name.encode())
        return rest.partition(b"\n")[0] if found else None

    def masks(self, *names: str) -> list[int]:
        """Give signal masks ("SigPnd") and the like."""
        masks = []
        for name in names:
            value = self._value(name)
            if value is None:
                raise ValueError(f"status: it has no {name}")
            masks.append(int(value, 16))
        return masks

    def own(self, name: str, outside: int) -> int:
        """Give a number ("NSpid") as the task's own pid namespace has it.

        Where the kernel has no such namespaces, that is *outside*, the number that we know.
        """
        value = self._value(name)
        if value is None:
            return outside
        numbers = value.split()
        if not numbers:
            raise ValueError(f"status: its {name} is empty")
        return int(numbers[-1])


def parse_cgroup(data: bytes) -> str:
    """Give the path that says most in /proc/PID/cgroup, "" when there is none.

    That is the v2 path; where v2 is not mounted or says "/" only (a hybrid host), the path of the
    v1 hierarchy name=systemd, else the first v1 path below the root.
    """
    paths: dict[str, str] = {}
    for line in data.split(b"\n"):
        parts = line.split(b":", 2)
        if len(parts) == 3:
            paths.setdefault(os.fsdecode(parts[1]), os.fsdecode(parts[2]))
    ranked = [paths.get("", ""), paths.get("name=systemd", ""), *paths.values()]
    return next((path for path in ranked if path not in ("", "/")), ranked[0] or ranked[1])


def unit_of(cgroup: str) -> str:
    """Give the systemd unit in a cgroup path: its last *.service or *.scope component, or ""."""
    for part in reversed(cgroup.split("/")):
        if part.endswith((".service", ".scope")):
            return part
    return ""


_MAPS_LINE = re.compile(
    rb"([0-9a-f]{1,16})-([0-9a-f]{1,16}) ([r-][w-][x-][ps]) ([0-9a-f]{1,16})"
    rb" ([0-9a-f]{1,8}):([0-9a-f]{1,8}) ([0-9]{1,20})(?: +(.*))?",
    re.DOTALL,
)
# The same for a whole text at once: programs may have tens of thousands of mappings. Its end counts
# as the end of a line: a line that is tried without it is tried anew for each space in it.
_MAPS_TEXT = re.compile(
    rb"^([0-9a-f]{1,16})-([0-9a-f]{1,16}) ([r-][w-][x-][ps]) ([0-9a-f]{1,16})"
    rb" ([0-9a-f]{1,8}:[0-9a-f]{1,8}) ([0-9]{1,20})(?: +(.*))?(?:\n|\Z)",
    re.MULTILINE,
)
_SMAPS_FIELD = re.compile(rb"(?![0-9a-f])[A-Za-z0-9_]{1,64}:")
_HEX_DIGITS = b"0123456789abcdef"
_NO_FLAGS: frozenset[str] = frozenset()


def _bytes(text: str | bytes) -> bytes:
    return os.fsencode(text) if isinstance(text, str) else text


def _vma(line: bytes, number: int) -> Vma:
    found = _MAPS_LINE.fullmatch(line)
    if found is None:
        raise ValueError(f"maps: line {number} is not a mapping")
    start, end, perms, offset, major, minor, inode, path = found.groups()
    vma = Vma(
        start=int(start, 16),
        end=int(end, 16),
        perms=perms.decode(),
        offset=int(offset, 16),
        device=(int(major, 16), int(minor, 16)),
        inode=int(inode),
        path=os.fsdecode(path or b"").rstrip(" "),
    )
    if vma.start >= vma.end:
        raise ValueError(f"maps: line {number} ends before it starts")
    return vma


def _rows(text: bytes) -> list[Vma] | None:
    """Parse maps where it is as the kernel writes it; None where there is anything else."""
    vmas: list[Vma] = []
    new = tuple.__new__  # as Vma() does, at half the cost
    at = 0
    for found in _MAPS_TEXT.finditer(text):
        before, at = at, found.end()
        low, high, perms, offset, device, inode, path = found.groups(b"")
        start, end = int(low, 16), int(high, 16)
        if found.start() != before or start >= end:
            return None
        columns = (
            start, end, _text(perms), int(offset, 16), _device(device), int(inode), _text(path),
            _NO_FLAGS,
        )  # fmt: skip
        vmas.append(new(Vma, columns))
    return vmas if at == len(text) else None


@functools.lru_cache(maxsize=1024)
def _text(words: bytes) -> str:
    return os.fsdecode(words).rstrip(" ")


@functools.lru_cache(maxsize=256)
def _device(numbers: bytes) -> tuple[int, int]:
    major, minor = numbers.split(b":")
    return int(major, 16), int(minor, 16)


def parse_maps(text: str | bytes) -> list[Vma]:
    r"""Parse /proc/PID/maps. Empty lines are skipped; any other line that is no mapping raises.

    Lone surrogates in a str must be those of os.fsdecode(); others raise ValueError as well.
    Paths keep the kernel's escapes (``\012`` for a newline) and its " (deleted)".
    """
    text = _bytes(text)
    vmas = _rows(text)
    if vmas is not None:
        return vmas
    return [_vma(line, number) for number, line in enumerate(text.split(b"\n"), 1) if line]


def parse_smaps(text: str | bytes) -> list[Vma]:
    """Parse /proc/PID/smaps: the mappings with their VmFlags; other fields are skipped.

    A line that is neither mapping nor field, or a field before the first mapping, raises
    ValueError with its number. A mapping without a VmFlags line has no flags.
    """
    vmas: list[Vma] = []
    for number, line in enumerate(_bytes(text).split(b"\n"), 1):
        # mappings begin with a lower-case digit, fields with a capital: a path may hold ": "
        if line[:1] in _HEX_DIGITS:
            if line:
                vmas.append(_vma(line, number))
        elif not vmas or not is_smaps_field(line):
            raise ValueError(f"smaps: line {number} is not a mapping and not a field of one")
        elif line.startswith(b"VmFlags:"):
            vmas[-1] = vmas[-1]._replace(flags=flags(line[8:]))
    return vmas


def is_smaps_field(line: bytes) -> bool:
    """Tell whether a line of smaps is a field of a mapping."""
    return _SMAPS_FIELD.match(line) is not None


@functools.lru_cache(maxsize=256)  # a host knows a few dozen sets of flags
def flags(words: bytes) -> frozenset[str]:
    """Read what follows "VmFlags:"."""
    return frozenset(os.fsdecode(word) for word in words.split())


def disjoint(vmas: list[Vma]) -> list[Vma]:
    """Cut what was said before off mappings that begin before the end of the one above them.

    The kernel writes the file in pieces and lets the process run in between: a mapping that has
    grown down, or together with its neighbour, comes a second time, as a whole.
    """
    ends, starts = [vma.end for vma in vmas], [vma.start for vma in vmas]
    if all(map(le, ends[:-1], starts[1:])):
        return vmas
    found: list[Vma] = []
    end = 0
    for vma in vmas:
        if vma.end > end:
            ahead = max(0, end - vma.start)
            offset = vma.offset + ahead if vma.inode else vma.offset
            found.append(vma._replace(start=vma.start + ahead, offset=offset))
            end = vma.end
    return found
