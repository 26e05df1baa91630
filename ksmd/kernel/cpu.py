"""What suits numpy on this machine, to be said before it is imported: it decides then, for good."""

from __future__ import annotations

import contextlib
from collections.abc import MutableMapping
from importlib.util import find_spec
from pathlib import Path
from typing import Final

FEATURES: Final = "NPY_DISABLE_CPU_FEATURES"
HUGE_PAGES: Final = "NUMPY_MADVISE_HUGEPAGE"
_ZEN_3_AND_4: Final = "25"


def suit_numpy(environ: MutableMapping[str, str], cpuinfo: str | None = None) -> None:
    """Set numpy's variables for a daemon; those that are set already stay.

    No huge pages: the large arrays here live for milliseconds, and where the host takes free memory
    back, a huge page costs as much as hundreds of small ones, which have just been used.

    And no AVX-512 sorts on Zen 4, where they take two to five times as long: they compress
    registers straight to memory, which that processor does in microcode. *cpuinfo*: the text of
    /proc/cpuinfo, read when None.
    """
    environ.setdefault(HUGE_PAGES, "0")
    if FEATURES in environ:
        return
    if cpuinfo is None:
        cpuinfo = ""
        with contextlib.suppress(OSError):
            cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    first = cpuinfo.partition("\n\n")[0]
    fields = {key.strip(): value.strip() for key, _, value in map(_split, first.splitlines())}
    if (fields.get("vendor_id"), fields.get("cpu family")) != ("AuthenticAMD", _ZEN_3_AND_4):
        return
    if "avx512f" in fields.get("flags", "").split():
        environ[FEATURES] = _names()


def _split(line: str) -> tuple[str, str, str]:
    return line.partition(":")


def _names() -> str:
    """Give numpy's names of what is not to be used; 2.4 has named them anew."""
    spec = find_spec("numpy")
    beside = Path(spec.origin).parents[1] if spec is not None and spec.origin else Path()
    version = (2, 4)
    # importlib.metadata would do, and take a megabyte for it: email, zipfile
    for found in beside.glob("numpy-*.dist-info"):
        with contextlib.suppress(ValueError):
            major, minor = map(int, found.name.split("-")[1].split(".")[:2])
            version = major, minor
    return "X86_V4 AVX512_ICL" if version >= (2, 4) else "AVX512_SKX AVX512_ICL"
