"""From YAML text to plain values that remember their places.

A settings file is read strictly, and means the same to every YAML reader: what the versions of
YAML read differently (octal and base-60 numbers, digits grouped by underscores) is refused, and so
are anchors, aliases, merge keys, tags, duplicate keys and keys without a value. PyYAML's own
constructor is not used: it forgets places, and lets the last of two equal keys win.

Reading is bounded: the size of the text and the depth of nesting have limits, and aliases cannot
multiply content, because there are none.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import yaml
from yaml.events import AliasEvent
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from ksmd.settings.conflicts import Path

MAX_CHARACTERS = 256 << 10
MAX_DEPTH = 16
_MAX_DIGITS = 40
_NUMBER = re.compile(r"[-+]?(0|[1-9][0-9]*)\Z|[-+]?0x[0-9a-fA-F]+\Z")
_FLOAT = re.compile(r"[-+]?[0-9]*\.?[0-9]*([eE][-+]?[0-9]+)?\Z")
_UNUSABLE = re.compile("[\0\ud800-\udfff]")
_TAG = "tag:yaml.org,2002:"


class Mark(NamedTuple):
    """A place in the file, both counted from 1 as editors do."""

    line: int
    column: int


class Fault(NamedTuple):
    """Something wrong that the text itself shows."""

    mark: Mark
    path: Path
    message: str


class UnreadableError(Exception):
    """The text is not YAML that can be read on; ``mark`` is where reading ended."""

    def __init__(self, mark: Mark, message: str) -> None:
        super().__init__(message)
        self.mark = mark


class _Bad:
    """Stands for a value whose fault is reported already; no model accepts it."""


BAD = _Bad()


@dataclass(slots=True)
class Tree:
    """Plain values (dict, list, str, int, float, bool, BAD) and where each one stands.

    ``values`` and ``keys`` map a path to the place of its value and of its key; ``written`` maps
    a scalar's path to the text as it was written; ``bad`` holds the paths of BAD values.
    """

    root: object = None
    empty: bool = False
    values: dict[Path, Mark] = field(default_factory=dict)
    keys: dict[Path, Mark] = field(default_factory=dict)
    written: dict[Path, str] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    bad: set[Path] = field(default_factory=set)

    def mark(self, path: Path, *, key: bool = False) -> Mark:
        """Place of ``path``, or of the nearest mapping or list around it that is in the file."""
        if key and path in self.keys:
            return self.keys[path]
        while path and path not in self.values:
            path = path[:-1]
        return self.values.get(path, Mark(1, 1))


def read(text: str) -> Tree:
    """Read one YAML document; raises UnreadableError where it cannot be read on."""
    if len(text) > MAX_CHARACTERS:
        raise UnreadableError(Mark(1, 1), f"is longer than {MAX_CHARACTERS} characters")
    text = text.removeprefix("\ufeff")
    node, loader = _compose(text)
    if node is None:
        return Tree(empty=True)
    return _Converter(loader).tree(node)


class _Loader(yaml.SafeLoader):
    """Composes nodes, refusing on the way what a settings file has no use for."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.refused: dict[int, str] = {}  # by id of a node whose value is of no use
        self.anchored: dict[int, str] = {}  # by id of a node that is judged all the same
        self.depth = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        node: Node | None
        if isinstance(event, AliasEvent):
            self.get_event()  # type: ignore[no-untyped-call]
            node = ScalarNode(_TAG + "str", "", event.start_mark, event.end_mark)  # type: ignore[arg-type]
            self.refused[id(node)] = f"aliases (*{event.anchor}) are not used here: write it out"
            return node
        anchor, event.anchor = event.anchor, None
        tag, event.tag = event.tag, None
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise UnreadableError(_mark(event.start_mark), "is nested too deeply")
        node = super().compose_node(parent, index)
        self.depth -= 1
        if tag is not None:
            self.refused[id(node)] = f"tags ({tag}) are not used here"
        if anchor is not None:
            self.anchored[id(node)] = f"anchors (&{anchor}) are not used here"
        return node


def _compose(text: str) -> tuple[Node | None, _Loader]:
    """Compose the only document of ``text``; the loader knows which of its nodes are refused."""
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        mark = Mark(before.count("\n") + 1, error.position - before.rfind("\n"))
        raise UnreadableError(mark, f"the character {_ascii(error)} is not allowed") from None
    try:
        return loader.get_single_node(), loader
    except yaml.MarkedYAMLError as error:
        place = error.problem_mark or error.context_mark or loader.get_mark()
        raise UnreadableError(_mark(place), _syntax(error)) from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        # PyYAML lets chr() and int() fail on escapes and directives beyond their range
        raise UnreadableError(_mark(loader.get_mark()), f"is not YAML: {error}") from None
    finally:
        loader.dispose()


def _ascii(error: yaml.reader.ReaderError) -> str:
    code = error.character
    return ascii(chr(code)) if isinstance(code, int) else ascii(code)


def _syntax(error: yaml.MarkedYAMLError) -> str:
    problem = " ".join((error.problem or "cannot be read").split())
    if "document" in (error.context or "") and "another document" in problem:
        return "a settings file is one YAML document; here begins another"
    if r"'\t'" in problem:
        return f"is not YAML: {problem} (indent by spaces)"
    context = f" ({' '.join(error.context.split())})" if error.context else ""
    return f"is not YAML: {problem}{context}"


def _mark(mark: Any) -> Mark:
    return Mark(mark.line + 1, mark.column + 1)


class _Converter:
    """Turns nodes into a Tree, collecting every fault instead of stopping at the first."""

    def __init__(self, loader: _Loader) -> None:
        self._refused, self._anchored = loader.refused, loader.anchored
        self._tree = Tree()

    def tree(self, node: Node) -> Tree:
        self._tree.root = self._value(node, ())
        self._tree.empty = (
            isinstance(node, ScalarNode)
            and node.tag == _TAG + "null"
            and id(node) not in self._refused
        )
        return self._tree

    def _fault(self, node: Node, path: Path, message: str) -> None:
        self._tree.faults.append(Fault(_mark(node.start_mark), path, message))

    def _bad(self, node: Node, path: Path, message: str) -> _Bad:
        self._fault(node, path, message)
        self._tree.bad.add(path)
        return BAD

    def _value(self, node: Node, path: Path) -> object:
        self._tree.values[path] = _mark(node.start_mark)
        if refused := self._refused.get(id(node)):
            return self._bad(node, path, refused)
        if anchored := self._anchored.get(id(node)):
            self._fault(node, path, anchored)
        if isinstance(node, MappingNode):
            return self._mapping(node, path)
        if isinstance(node, SequenceNode):
            return [self._value(item, (*path, at)) for at, item in enumerate(node.value)]
        assert isinstance(node, ScalarNode)
        return self._scalar(node, path)

    def _mapping(self, node: MappingNode, path: Path) -> dict[str, object]:
        content: dict[str, object] = {}
        for key, value in node.value:
            name = self._key(key, path)
            if name is None:
                continue
            if name in content:
                first = self._tree.keys[(*path, name)]
                self._fault(key, (*path, name), f"duplicate key, first given at line {first.line}")
                continue
            self._tree.keys[(*path, name)] = _mark(key.start_mark)
            content[name] = self._value(value, (*path, name))
        return content

    def _key(self, key: Node, path: Path) -> str | None:
        if id(key) in self._refused:
            self._fault(key, path, self._refused[id(key)])
        elif not isinstance(key, ScalarNode):
            self._fault(key, path, "a key must be a word, not a list or a mapping")
        elif key.tag == _TAG + "merge":
            self._fault(key, path, "merge keys (<<) are not used here: write the keys out")
        elif not key.value or _UNUSABLE.search(key.value):
            self._fault(key, path, f"{key.value[:60]!a} cannot be a key")
        else:
            return str(key.value)
        return None

    def _scalar(self, node: ScalarNode, path: Path) -> object:
        text = node.value
        self._tree.written[path] = text
        match node.tag.removeprefix(_TAG):
            case "null":
                advice = "give it one, or leave the key out" if path else ""
                return self._bad(node, path, f"has no value: {advice}")
            case "bool":
                return text.lower() in ("true", "yes", "on")
            case "int":
                return self._number(node, path)
            case "float" if _FLOAT.match(text):
                return float(text)
        if unusable := _UNUSABLE.search(text):
            message = f"contains the character {unusable.group()!a}, which nothing can match"
            return self._bad(node, path, message)
        return text

    def _number(self, node: ScalarNode, path: Path) -> object:
        text = node.value
        if not _NUMBER.match(text):
            why = "is not read alike by all YAML readers"
            message = f"{text[:60]} {why}: write it in plain decimal or 0x..., or quote it as text"
            return self._bad(node, path, message)
        if len(text) > _MAX_DIGITS:
            return self._bad(node, path, "is too large a number")
        return int(text, 0)
