"""Settings: what an operator may say, read from YAML with every mistake placed by line and column.

``load`` and ``loads`` read (``read`` also tells where each value stands), ``defaults`` is an empty
file's meaning, ``explain``, ``render_default_config`` and ``json_schema`` tell what there is,
``effective``, ``dump`` and ``changed`` show values.
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
from ksmd.settings.load import Loaded, Problem, SettingsError, load, loads, read
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
from ksmd.settings.schema import json_schema

__all__ = [
    "Explained",
    "Limits",
    "Loaded",
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
    "json_schema",
    "load",
    "loads",
    "read",
    "render_default_config",
]
