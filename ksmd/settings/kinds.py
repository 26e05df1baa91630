"""The types of single settings: bounds, forms, and what a value must be beyond its Python type.

Defaults and help are not here but with the keys, in :mod:`ksmd.settings.models`.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from ksmd.model.units import PAGE_SIZE

UINT_MAX = 2**32 - 1
ADDRESS_LIMIT = 1 << 47  # TASK_SIZE of x86-64 with four-level page tables, rounded up to a page
PID_MAX_LIMIT = 1 << 22  # include/linux/threads.h
SUN_PATH_MAX = 107  # sockaddr_un.sun_path without its final NUL, unix(7)


@dataclass(frozen=True, slots=True)
class Kind:
    """How the type of a key is called in help texts, where its Python type says too little."""

    text: str


def _to_path(value: object) -> object:
    return Path(value) if isinstance(value, str) else value


def _socket_path(path: Path) -> Path:
    if not path.is_absolute():
        raise PydanticCustomError("socket", "must be an absolute path")
    if len(str(path).encode(errors="surrogateescape")) > SUN_PATH_MAX:
        raise PydanticCustomError(
            "socket", "is too long for a socket: at most {most} bytes", {"most": SUN_PATH_MAX}
        )
    return path


def _regular_expression(pattern: str) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of future changes of re, at no place in the file
            re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise PydanticCustomError(
            "regular_expression", "is not a regular expression: {why}", {"why": why}
        ) from None
    return pattern


def _page_aligned(address: int) -> int:
    if address % PAGE_SIZE:
        raise PydanticCustomError(
            "alignment",
            "must be a multiple of the page size, {size}; the page begins at {start}",
            {"size": hex(PAGE_SIZE), "start": hex(address - address % PAGE_SIZE)},
        )
    return address


def list_to_tuple(value: object) -> object:
    """Make a list a tuple, so that frozen models hold nothing that can change."""
    return tuple(value) if isinstance(value, list) else value


def _one_or_many(value: object) -> object:
    if isinstance(value, int) and not isinstance(value, bool):
        return (value,)
    if not isinstance(value, list | tuple):
        raise PydanticCustomError("pids", "must be an integer or a list of integers")
    return tuple(value)


Count = Annotated[int, Field(ge=1, le=UINT_MAX)]
TableSize = Annotated[int, Field(ge=0, le=UINT_MAX)]
Secs = Annotated[int, Field(ge=0, le=10 * 365 * 86400)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$"), Kind("text of A-Z a-z 0-9 _ . -")]
Glob = Annotated[str, Field(min_length=1), Kind("glob")]
Regex = Annotated[
    str, Field(min_length=1), AfterValidator(_regular_expression), Kind("regular expression")
]
SocketPath = Annotated[
    Path, BeforeValidator(_to_path), AfterValidator(_socket_path), Kind("absolute path")
]
FileMode = Annotated[str, Field(pattern=r"^0[0-7]{3}$"), Kind("permissions in octal, quoted")]
Pid = Annotated[int, Field(ge=1, le=PID_MAX_LIMIT)]
Pids = Annotated[
    tuple[Pid, ...],
    Field(min_length=1),
    BeforeValidator(_one_or_many),
    Kind(f"integer or list of integers, 1..{PID_MAX_LIMIT}"),
]
Address = Annotated[
    int, Field(ge=0, lt=ADDRESS_LIMIT), AfterValidator(_page_aligned), Kind("address")
]
