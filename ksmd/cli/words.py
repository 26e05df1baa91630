"""Figures and foreign text as people read them: sizes, counts, sentences.

Names of processes and mappings come from other programs, so they go through :func:`safe` before
they reach a terminal.
"""

from __future__ import annotations

from ksmd.model.refusal import SENTENCES, Reason
from ksmd.model.units import PAGE_SIZE

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def size(nbytes: int) -> str:
    """Write a number of bytes with three figures or so: "1.21 GiB", "-64 KiB", "0 B"."""
    value, unit = float(abs(nbytes)), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value /= 1024
        unit += 1
    figures = 0 if unit == 0 or value >= 100 else 1 if value >= 10 else 2
    return f"{'-' if nbytes < 0 else ''}{value:.{figures}f} {_UNITS[unit]}"


def pages_size(npages: int) -> str:
    """Write a number of pages as a size."""
    return size(npages * PAGE_SIZE)


def count(number: int, noun: str = "") -> str:
    """Write a count, grouped, with its noun: "1,204 pages", "1 page"."""
    text = f"{number:,}"
    return text if not noun else f"{text} {noun if number == 1 else noun + 's'}"


def short(number: int) -> str:
    """Write a count for a narrow column: exact up to five digits, then "1.23M", "45.6G"."""
    if abs(number) < 100_000:
        return f"{number:,}"
    value, unit = float(number), 0
    while abs(value) >= 1000 and unit < 4:
        value, unit = value / 1000, unit + 1
    figures = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{figures}f}{' kMGT'[unit]}"


def safe(text: str, limit: int = 200) -> str:
    """Make text of other programs harmless for a terminal: no control characters, no end of it."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in text)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def sentence(reason: str) -> str:
    """Give the sentence of a refusal, its name where this version does not know it."""
    try:
        return SENTENCES[Reason(reason)]
    except ValueError:
        return f"({safe(reason)})"
