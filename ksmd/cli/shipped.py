"""What comes with ksmd besides its code: units, manual pages, completions.

The units stand at the top of the source tree, where people look for them; a wheel carries them as
data under share/ksmd. Both are found here.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import ksmd
from ksmd.model.errors import KsmdError

RESOURCES = Path(ksmd.__file__).parent / "resources"
_UNITS = "share/ksmd/systemd"


def resource(name: str) -> str:
    """Read a file of ksmd/resources."""
    return (RESOURCES / name).read_text(encoding="utf-8")


def unit(name: str) -> str:
    """Read a file of systemd/. KsmdError when this installation has none."""
    beside = Path(ksmd.__file__).parents[1] / "systemd" / name
    if beside.is_file():
        return beside.read_text(encoding="utf-8")
    try:
        files = metadata.files("ksmd") or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if str(file).endswith(f"{_UNITS}/{name}"):
            return Path(str(file.locate())).read_text(encoding="utf-8")
    raise KsmdError(f"{name} does not belong to this installation", "install ksmd with pip, anew")
