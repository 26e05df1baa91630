"""Several settings files as one: /etc/ksmd/ksmd.yaml, then conf.d/*.yaml by name.

Files add to each other and never override: what two files say differently is an error that names
both places, because an operator who reads one file must be able to believe it. Mappings are merged
key by key, targets by their name; any other list or value is one thing. A target that a later file
only adds keys to keeps its place in the order, and new ones come after those of earlier files.

Works on trees, so that a file that is wrong elsewhere still takes part, and every value keeps its
file, line and column.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ksmd.settings.conflicts import Path
from ksmd.settings.tree import BAD, Fault, Mark, Tree

_TARGETS: Path = ("targets",)


class Document(NamedTuple):
    """One file, read."""

    name: str
    tree: Tree


class Place(NamedTuple):
    """Where something stands, across files."""

    file: str
    mark: Mark


class Combined:
    """All documents as one tree; there is at least one, and ``first`` is its name.

    ``faults`` are those of every file, and what files disagree on.
    """

    def __init__(self, documents: Sequence[Document]) -> None:
        self.tree = Tree()
        self.faults: list[tuple[str, Fault]] = []
        self._files: dict[Path, str] = {}
        self.first = documents[0].name
        for number, document in enumerate(documents):
            _Addition(self, document, first=number == 0).add()

    def place(self, path: Path, *, key: bool = False) -> Place:
        """Place of *path*, or of the nearest mapping or list around it that is in a file."""
        mark = self.tree.mark(path, key=key)
        while path and path not in self._files:
            path = path[:-1]
        return Place(self._files.get(path, self.first), mark)

    def given(self, path: Path) -> Place | None:
        """Place of the value at *path*; None where no file gives it."""
        if path not in self._files and path[:-1] in self.tree.written:
            path = path[:-1]  # one value that stands for a list of one
        return self.place(path) if path in self._files else None

    def put(self, path: Path, source: Path, document: Document) -> object:
        """Take over the value at *source* of a document, with all that lies in it."""
        old = document.tree
        if source in old.values:
            self.tree.values[path] = old.values[source]
        if source in old.keys:
            self.tree.keys[path] = old.keys[source]
        if source in old.written:
            self.tree.written[path] = old.written[source]
        if source in old.bad:
            self.tree.bad.add(path)
        self._files[path] = document.name
        value = _at(old, source)
        if isinstance(value, dict):
            return {key: self.put((*path, key), (*source, key), document) for key in value}
        if isinstance(value, list):
            return [self.put((*path, at), (*source, at), document) for at, _ in enumerate(value)]
        return value


class _Addition:
    """One document on its way into the whole."""

    def __init__(self, whole: Combined, document: Document, *, first: bool) -> None:
        self._whole = whole
        self._document = document
        self._first = first
        self._moved: dict[int, int] = {}  # index of a target here -> in the whole

    def add(self) -> None:
        root = self._document.tree.root
        if self._first or (isinstance(root, dict) and not isinstance(self._whole.tree.root, dict)):
            self._whole.tree.root = self._whole.put((), (), self._document)
        elif isinstance(root, dict):
            assert isinstance(self._whole.tree.root, dict)
            self._mapping(self._whole.tree.root, (), ())
        elif root is not BAD and not self._document.tree.empty:
            mark = self._document.tree.mark(())
            self._fault(mark, (), "the settings must be a mapping (key: value)")
        for mark, path, message in self._document.tree.faults:
            self._fault(mark, self._target_path(path), message)

    def _fault(self, mark: Mark, path: Path, message: str) -> None:
        self._whole.faults.append((self._document.name, Fault(mark, path, message)))

    def _target_path(self, path: Path) -> Path:
        if path[:1] == _TARGETS and len(path) > 1 and path[1] in self._moved:
            return ("targets", self._moved[int(path[1])], *path[2:])
        return path

    def _mapping(self, into: dict[str, object], path: Path, source: Path) -> None:
        content = _at(self._document.tree, source)
        assert isinstance(content, dict)
        for key, value in content.items():
            here, there = (*path, key), (*source, key)
            if key not in into:
                into[key] = self._whole.put(here, there, self._document)
                continue
            known = into[key]
            if isinstance(known, dict) and isinstance(value, dict):
                self._mapping(known, here, there)
            elif here == _TARGETS and isinstance(known, list) and isinstance(value, list):
                self._targets(known, value)
            elif known is not BAD and value is not BAD and known != value:
                file, mark = self._whole.place(here)
                message = f"is given otherwise at {file}:{mark.line}; files add, none overrides"
                self._fault(self._document.tree.mark(there, key=True), here, message)

    def _targets(self, known: list[object], added: list[object]) -> None:
        names: dict[object, int] = {}
        for at, entry in enumerate(known):
            name = entry.get("name") if isinstance(entry, dict) else None
            if isinstance(name, str):
                names.setdefault(name, at)
        for at, entry in enumerate(added):
            name = entry.get("name") if isinstance(entry, dict) else None
            same = names.get(name) if isinstance(name, str) else None
            if same is None or same in self._moved.values():  # twice here: told as a conflict
                self._moved[at] = len(known)
                where: Path = ("targets", len(known))
                known.append(self._whole.put(where, ("targets", at), self._document))
            else:
                self._moved[at] = same
                into = known[same]
                assert isinstance(into, dict)
                self._mapping(into, ("targets", same), ("targets", at))


def _at(tree: Tree, path: Path) -> object:
    value = tree.root
    for part in path:
        value = value[part]  # type: ignore[index]  # every path of a tree leads through its values
    return value
