"""Settings: what an operator may say, read from YAML with every mistake placed by line and column.

``load`` and ``loads`` read, ``defaults`` is an empty file's meaning, ``explain`` and
``render_default_config`` tell what there is, ``effective``, ``dump`` and ``changed`` show values.
Imports pydantic: the tracer and the pager, which stay small, must not import this room.
"""

from ksmd.settings.describe import (
    Explained,
    changed,
    dump,
    effective,
    explain,
    render_default_config,
)
from ksmd.settings.load import Problem, SettingsError, load, loads
from ksmd.settings.models import (
    Limits,
    Match,
    Region,
    Scan,
    Settings,
    Tables,
    TableSizes,
    Target,
    Window,
    defaults,
)

__all__ = [
    "Explained",
    "Limits",
    "Match",
    "Problem",
    "Region",
    "Scan",
    "Settings",
    "SettingsError",
    "TableSizes",
    "Tables",
    "Target",
    "Window",
    "changed",
    "defaults",
    "dump",
    "effective",
    "explain",
    "load",
    "loads",
    "render_default_config",
]
