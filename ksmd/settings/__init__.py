"""Settings: what an operator may say, read from YAML with every mistake placed by line and column.

``load`` and ``loads`` read (``read`` also tells where each value stands), ``defaults`` is an empty
file's meaning, ``explain``, ``render_default_config`` and ``json_schema`` tell what there is,
``effective``, ``dump`` and ``changed`` show values.

Most of it imports pydantic, so each name comes when it is asked for: the tracer and the pager stay
small, and the daemon, which has its settings read by another process (:mod:`ksmd.settings.apart`)
and holds plain :mod:`ksmd.settings.values`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ksmd.settings.describe import (
        Explained,
        dump,
        effective,
        explain,
        render_default_config,
    )
    from ksmd.settings.differences import changed
    from ksmd.settings.models import (
        Limits,
        Match,
        Region,
        Scan,
        Settings,
        Tables,
        Target,
        Window,
        defaults,
    )
    from ksmd.settings.problems import Problem, SettingsError
    from ksmd.settings.reading import Loaded, load, loads, read
    from ksmd.settings.schema import json_schema
    from ksmd.settings.values import TableSizes

_HOMES = {
    "describe": ("Explained", "dump", "effective", "explain", "render_default_config"),
    "differences": ("changed",),
    "reading": ("Loaded", "load", "loads", "read"),
    "models": (
        "Limits",
        "Match",
        "Region",
        "Scan",
        "Settings",
        "Tables",
        "Target",
        "Window",
        "defaults",
    ),
    "problems": ("Problem", "SettingsError"),
    "schema": ("json_schema",),
    "values": ("TableSizes",),
}

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


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
