"""The settings as a JSON Schema, for editors that complete and check YAML while it is typed.

Made from the models, then mended where a file means something else than pydantic's own account of
them: a key without a value is refused, a pid may stand alone, and ``match`` needs a key. What a
schema cannot say (conflicts between targets, a regular expression that does not compile) is left to
``ksmctl check-config``, so a file that the schema accepts may still be wrong; never the other way.
"""

from __future__ import annotations

from typing import Any

from ksmd.settings.kinds import PID_MAX_LIMIT, SUN_PATH_MAX
from ksmd.settings.models import Settings

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def json_schema() -> dict[str, Any]:
    """Make the schema of a settings file, and of a file in conf.d beside it."""
    schema: dict[str, Any] = {"$schema": _DIALECT, **_mended(Settings.model_json_schema())}
    schema["title"] = "Settings of ksmd"
    schema["description"] = "/etc/ksmd/ksmd.yaml, see ksmd.yaml(5)"
    schema["properties"]["version"]["const"] = 1
    schema["properties"]["socket"] |= {"pattern": "^/", "maxLength": SUN_PATH_MAX}
    match = schema["$defs"]["Match"]
    match["minProperties"] = 1
    match["properties"]["pid"] = _one_or_many(match["properties"]["pid"])
    start = schema["$defs"]["Region"]["properties"]["start"]
    start["multipleOf"] = 4096
    return schema


def _one_or_many(pids: dict[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {
        key: pids.pop(key) for key in ("description", "examples", "title") if key in pids
    }
    one = {"type": "integer", "minimum": 1, "maximum": PID_MAX_LIMIT}
    return {**kept, "anyOf": [one, {"type": "array", "items": one, "minItems": 1}]}


def _mended(value: Any) -> Any:
    """Take out null, which no file may say, and titles, which repeat the key."""
    if isinstance(value, list):
        return [_mended(item) for item in value]
    if not isinstance(value, dict):
        return value
    content = {key: _mended(item) for key, item in value.items()}
    if isinstance(content.get("title"), str):
        del content["title"]
    if content.get("default", 0) is None:
        del content["default"]
    choices = content.get("anyOf")
    if isinstance(choices, list) and {"type": "null"} in choices:
        choices.remove({"type": "null"})
        if len(choices) == 1:
            content |= content.pop("anyOf")[0]
    return content
