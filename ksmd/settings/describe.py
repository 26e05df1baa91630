"""Settings as text for people: the list of keys, the shipped file, effective values, differences.

All of it is made from the models, so that help, manual page, shipped file and behaviour cannot
drift apart. Write config/ksmd.yaml anew after a change of the models with::

    python -c 'from ksmd.settings import render_default_config as r; print(r(), end="")'
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import yaml
from annotated_types import Ge, Le
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ksmd.settings.kinds import Kind
from ksmd.settings.models import Region, Settings, Target
from ksmd.settings.reading import model_of

_WIDTH = 96
_HEAD = """\
Settings of ksmd: every key, what it means, and its default.

`ksmctl check-config FILE` says what is wrong with a file, and where. As shipped, no process is
selected, and so none is touched. SIGHUP makes the daemon read its file again; a file with a
mistake is refused as a whole, and the settings in force stay.

Anchors, aliases, merge keys and tags of YAML are not used; an unknown or repeated key is an error.
"""
_EXAMPLE = """\
An example of targets, with every key a target may have. Remove the first # of its lines, and
`targets: []` above, to use it. Every key of match that is given must hold; give those that are
needed.
"""


class Explained(NamedTuple):
    """One key: ``targets[].match.exe``, its type, its default in YAML, its help."""

    path: str
    type: str
    default: str
    help: str


def explain() -> list[Explained]:
    """Every key of a settings file, in the order of the shipped one."""
    return list(_explain(Settings, ""))


def effective(settings: Settings) -> dict[str, Any]:
    """All settings with their defaults filled in, as plain values that YAML and JSON can hold.

    A key that is not set (``domain``, unused keys of ``match``) is left out.
    """
    return settings.model_dump(mode="json", exclude_none=True)


def dump(settings: Settings) -> str:
    """Write settings as YAML text from which ``loads`` makes equal settings."""
    return yaml.dump(effective(settings), Dumper=_Dumper, sort_keys=False)


def render_default_config() -> str:
    """Make the text of config/ksmd.yaml: defaults, each key explained, and an example target."""
    lines = _comment(_HEAD)
    for name, info in Settings.model_fields.items():
        lines += ["", *_key(name, info, "", _default_lines)]
    lines += ["", *_comment(_EXAMPLE), "#"]
    lines += [f"#{line}".rstrip() for line in ["targets:", *_example_target()]]
    return "\n".join(lines) + "\n"


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002  (PyYAML's interface)
        return True  # anchors and aliases are refused when the text is read again


def _explain(model: type[BaseModel], prefix: str) -> Iterator[Explained]:
    for name, info in model.model_fields.items():
        path = prefix + name
        inner = model_of(info.annotation)
        yield Explained(path, _type(info), _default(info), info.description or "")
        if inner is not None:
            yield from _explain(inner, path + ("." if inner is info.annotation else "[]."))


def _parts(info: FieldInfo) -> tuple[Any, list[Any]]:
    """Annotation without None, and all metadata, wherever pydantic left it."""
    annotation, metadata = info.annotation, list(info.metadata)
    choices = [part for part in get_args(annotation) if part is not type(None)]
    if type(None) in get_args(annotation) and len(choices) == 1:
        annotation = choices[0]
    if get_origin(annotation) is Annotated:
        annotation, *more = get_args(annotation)
        metadata += more
    return annotation, metadata


def _type(info: FieldInfo) -> str:
    annotation, metadata = _parts(info)
    named = next((part.text for part in metadata if isinstance(part, Kind)), None)
    if named is not None:
        return str(named)
    if get_origin(annotation) is Literal:
        return " | ".join(map(str, get_args(annotation)))
    if annotation is bool:
        return "true | false"
    if annotation is int:
        low = next(part.ge for part in metadata if isinstance(part, Ge))
        high = next(part.le for part in metadata if isinstance(part, Le))
        return f"integer, {low}..{high}"
    return "mapping"


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    value = info.default
    if value is None:
        return "not set"
    if isinstance(value, BaseModel):
        return ""
    return _scalar(list(value) if isinstance(value, tuple) else value)


def _scalar(value: Any) -> str:
    """One value in YAML, on one line."""
    if isinstance(value, bool | int | list):
        return str(value).lower()
    text = str(value)
    plain = yaml.safe_load(text) == text and not set(text) & set("*|[]{}&#!%@`")
    quoted = text.replace("'", "''")
    return text if plain or text.startswith("0x") else f"'{quoted}'"


def _comment(text: str, indent: str = "") -> list[str]:
    """Wrap paragraphs into comment lines; a no-break space keeps its neighbours on one line."""
    lines: list[str] = []
    for paragraph in text.rstrip("\n").split("\n\n"):
        words = textwrap.wrap(
            paragraph.replace("\n", " ").replace("\xa0", "\0"),
            _WIDTH - len(indent) - 2,
            break_on_hyphens=False,
        )
        lines += ["", *(line.replace("\0", " ") for line in words)]
    return [f"{indent}# {line}".rstrip() for line in lines[1:]]


def _key(name: str, info: FieldInfo, indent: str, value: Any) -> list[str]:
    """Help of one key as a comment, then the key with what ``value(info, indent)`` gives it."""
    notes = [_type(info)] if _type(info) != "mapping" else []
    notes += ["required"] if info.is_required() else []
    note = f" ({'; '.join(notes)})".replace(" ", "\xa0").replace("\xa0", " ", 1) if notes else ""
    first, *rest = value(info, indent)
    return [*_comment(f"{info.description}{note}", indent), f"{indent}{name}:{first}", *rest]


def _default_lines(info: FieldInfo, indent: str) -> list[str]:
    inner = info.annotation
    if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
        given = info.examples[0] if info.is_required() and info.examples else None
        return [f" {_default(info) if given is None else _scalar(given)}"]
    lines = [""]
    for name, field in inner.model_fields.items():
        lines += _key(name, field, indent + "  ", _default_lines)
    return lines


def _example_lines(info: FieldInfo, indent: str) -> list[str]:
    if info.examples:
        return [f" {_scalar(info.examples[0])}"]
    inner = model_of(info.annotation)
    assert inner is not None
    lines = [""]
    for name, field in inner.model_fields.items():
        lines += _key(name, field, indent + "  ", _example_lines)
    return lines


def _example_target() -> list[str]:
    lines: list[str] = []
    for name, info in Target.model_fields.items():
        lines += _key(name, info, "    ", _example_lines)
        if name == "regions":
            lines += ["    # or, as a list:", "    # regions:", *_example_region()]
    return _as_item(lines, "    ")


def _example_region() -> list[str]:
    lines: list[str] = []
    for name, info in Region.model_fields.items():
        lines += _key(name, info, "    ", _example_lines)
    return ["    # " + line for line in _as_item(lines, "    ")]


def _as_item(lines: list[str], indent: str) -> list[str]:
    """Put the dash of a list item before the first line that is not a comment."""
    first = next(at for at, line in enumerate(lines) if not line.lstrip().startswith("#"))
    dashed = indent[:-2] + "- " + lines[first].removeprefix(indent)
    return [*lines[:first], dashed, *lines[first + 1 :]]
