"""The interface description as the one source of what a caller may say.

The methods and the types of their parameters are read from ``org.ksmd.Control.varlink``, so that
what ``GetInterfaceDescription`` tells and what the daemon checks cannot drift apart. The parser
knows the whole Varlink type language (https://varlink.org/Interface-Definition).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ksmd.daemon.protocol import INTERFACE

_TOKEN = re.compile(r"\s+|#[^\n]*|->|\[\]|\[string\]|[A-Za-z][\w.-]*|[():,?]")
_PLAIN: dict[str, type | tuple[type, ...]] = {
    "bool": bool,
    "int": int,
    "float": (int, float),
    "string": str,
    "object": object,
}


@dataclass(frozen=True, slots=True)
class Kind:
    """A type: ``what`` is a plain name, "array", "dict", "struct", "enum" or "named"."""

    what: str
    name: str = ""
    nullable: bool = False
    inner: Kind | None = None
    fields: Mapping[str, Kind] = field(default_factory=dict)
    values: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Method:
    """One method: the struct it takes and the struct it answers with."""

    name: str
    takes: Kind
    gives: Kind


@dataclass(frozen=True, slots=True)
class Interface:
    """A parsed description; ``text`` is what it was parsed from."""

    name: str
    text: str
    types: Mapping[str, Kind]
    methods: Mapping[str, Method]
    errors: Mapping[str, Kind]

    def takes(self, method: str, parameters: object) -> str | None:
        """Name the first parameter that *method* does not take so, None when all are right."""
        return self.mismatch(parameters, self.methods[method].takes)

    def gives(self, method: str, parameters: object) -> str | None:
        """Name the first parameter of a reply that is not as described, None when all are right."""
        return self.mismatch(parameters, self.methods[method].gives)

    def mismatch(self, value: object, kind: Kind, where: str = "") -> str | None:
        """Name the first place where *value* is not of *kind*, None when it is."""
        if kind.nullable and value is None:
            return None
        if kind.what == "named":
            return self.mismatch(value, self.types[kind.name], where)
        if kind.what == "struct":
            return self._struct_mismatch(value, kind, where)
        if kind.what == "enum":
            return None if value in kind.values else where
        if kind.what in {"array", "dict"}:
            return self._container_mismatch(value, kind, where)
        right = isinstance(value, _PLAIN[kind.what])
        if isinstance(value, bool) and kind.what in {"int", "float"}:
            right = False
        return None if right else where

    def _struct_mismatch(self, value: object, kind: Kind, where: str) -> str | None:
        if not isinstance(value, dict):
            return where
        prefix = f"{where}." if where else ""
        for name in value:
            if name not in kind.fields:
                return prefix + str(name)
        for name, inner in kind.fields.items():
            if name not in value and not inner.nullable:
                return prefix + name
            bad = self.mismatch(value.get(name), inner, prefix + name)
            if bad is not None:
                return bad
        return None

    def _container_mismatch(self, value: object, kind: Kind, where: str) -> str | None:
        items: list[tuple[object, object]]
        if kind.what == "array" and isinstance(value, list):
            items = list(enumerate(value))
        elif kind.what == "dict" and isinstance(value, dict):
            items = list(value.items())
        else:
            return where
        assert kind.inner is not None
        for key, item in items:
            bad = self.mismatch(item, kind.inner, f"{where}[{key}]")
            if bad is not None:
                return bad
        return None


class _Parser:
    def __init__(self, text: str) -> None:
        self._tokens: list[str] = []
        at = 0
        while at < len(text):
            found = _TOKEN.match(text, at)
            if found is None:
                raise ValueError(f"unexpected {text[at : at + 20]!r}")
            if not found[0].isspace() and not found[0].startswith("#"):
                self._tokens.append(found[0])
            at = found.end()
        self._tokens.reverse()

    def _take(self, expected: str = "") -> str:
        token = self._tokens.pop() if self._tokens else ""
        if not token or (expected and token != expected):
            raise ValueError(f"expected {expected or 'more'}, found {token or 'the end'}")
        return token

    def _accept(self, token: str) -> bool:
        if self._tokens and self._tokens[-1] == token:
            self._tokens.pop()
            return True
        return False

    def kind(self) -> Kind:
        nullable = self._accept("?")
        if self._accept("[]"):
            return Kind("array", nullable=nullable, inner=self.kind())
        if self._accept("[string]"):
            return Kind("dict", nullable=nullable, inner=self.kind())
        if self._tokens and self._tokens[-1] == "(":
            return self.struct(nullable)
        name = self._take()
        if name in _PLAIN:
            return Kind(name, nullable=nullable)
        return Kind("named", name=name, nullable=nullable)

    def struct(self, nullable: bool = False) -> Kind:
        self._take("(")
        fields: dict[str, Kind] = {}
        values: list[str] = []
        while not self._accept(")"):
            name = self._take()
            if self._accept(":"):
                fields[name] = self.kind()
            else:
                values.append(name)
            if not self._accept(","):
                self._take(")")
                break
        if values and fields:
            raise ValueError("an enum has no types, a struct has one for each field")
        what = "enum" if values else "struct"
        return Kind(what, nullable=nullable, fields=fields, values=tuple(values))

    def interface(self, text: str) -> Interface:
        self._take("interface")
        name = self._take()
        types: dict[str, Kind] = {}
        methods: dict[str, Method] = {}
        errors: dict[str, Kind] = {}
        while self._tokens:
            keyword, member = self._take(), self._take()
            if keyword == "type":
                types[member] = self.struct()
            elif keyword == "error":
                errors[member] = self.struct()
            elif keyword == "method":
                takes = self.struct()
                self._take("->")
                methods[member] = Method(member, takes, self.struct())
            else:
                raise ValueError(f"expected type, method or error, found {keyword}")
        return Interface(name, text, types, methods, errors)


def parse(text: str) -> Interface:
    """Parse a Varlink interface description; ValueError says what is wrong with it."""
    return _Parser(text).interface(text)


def load() -> Interface:
    """Read ksmd's own description from the package."""
    return parse(Path(__file__).with_name(f"{INTERFACE}.varlink").read_text(encoding="utf-8"))
