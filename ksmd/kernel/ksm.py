"""The kernel's own KSM, read through /sys/kernel/mm/ksm.

ksmd reads it, to say in ``features`` and ``status`` whether both are at work, and never sets it.
Setting is for benches and tests that compare the two, and then what was there comes back.
Files: Documentation/admin-guide/mm/ksm.rst.
"""

from __future__ import annotations

from pathlib import Path

from ksmd.kernel.sysfs import Settings

SYSFS = Path("/sys/kernel/mm/ksm")


def read(folder: Path = SYSFS) -> dict[str, int | str] | None:
    """Read every file that may be read: numbers as int, else the text; None without KSM."""
    if not folder.is_dir():
        return None
    values: dict[str, int | str] = {}
    for file in sorted(folder.iterdir()):
        try:
            text = file.read_text().strip()
        except OSError:
            continue
        try:
            values[file.name] = int(text)
        except ValueError:
            values[file.name] = text
    return values


class KernelKsm(Settings):
    """Set values of KSM for the length of a with block: ``with KernelKsm(run=1, ...) as ksm:``.

    ``run`` is set last and restored first, so that the thread never works under half of the
    settings.
    """

    def __init__(self, folder: Path = SYSFS, **values: int | str) -> None:
        ordered = sorted(values.items(), key=lambda item: item[0] == "run")
        super().__init__(folder, {name: str(value) for name, value in ordered})

    def read(self) -> dict[str, int | str]:
        """Read all values now."""
        return read(self.folder) or {}
