"""Reading a settings file: every mistake in it at once, each with its line and column.

An operator corrects a file in one round when all of it is judged in one round. So text, models and
contradictions between targets are judged each on its own, and the answers are put in the order of
the file. Nothing but SettingsError is raised, whatever the file holds.
"""

from __future__ import annotations

import difflib
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ksmd.settings import conflicts, merge, tree
from ksmd.settings.models import Settings, Target
from ksmd.settings.problems import Problem, SettingsError

#: The directory beside a settings file whose *.yaml files add to it.
DROP_INS = "conf.d"
_MAX_BYTES = 4 * tree.MAX_CHARACTERS


@dataclass(frozen=True, slots=True)
class Loaded:
    """Settings, the files they come from, and where each value of :func:`effective` stands.

    ``sources`` maps a path such as ``("scan", "pages_to_scan")`` to "file:line"; what no file gives
    is not in it.
    """

    settings: Settings
    files: tuple[str, ...]
    sources: Mapping[conflicts.Path, str]


def load(path: Path) -> Settings:
    """Read the settings file at ``path``, and what ``conf.d`` beside it adds."""
    return read(path).settings


def read(path: Path) -> Loaded:
    """Read as :func:`load` does, and tell where everything comes from."""
    texts = {str(path): _text(path)}
    problems: list[Problem] = []
    for file in _drop_ins(path, problems):
        try:
            texts[str(file)] = _text(file)
        except SettingsError as error:
            problems += error.problems
    return _read(texts, problems)


def loads(text: str, name: str = "<string>") -> Settings:
    """Read settings from YAML text; ``name`` stands for the file in messages."""
    return _read({name: text}, []).settings


def _read(texts: Mapping[str, str], problems: list[Problem]) -> Loaded:
    documents = []
    for number, (name, text) in enumerate(texts.items()):
        try:
            document = tree.read(text)
        except tree.UnreadableError as error:
            problems.append(Problem(name, *error.mark, "", str(error)))
            continue
        if document.empty and number == 0:
            problems.append(_of_file(name, "is empty; at least `version: 1` is needed"))
        elif not document.empty:
            documents.append(merge.Document(name, document))
    first = next(iter(texts))
    if not documents or documents[0].name != first:
        raise SettingsError(problems)  # what the others mean depends on it
    whole = merge.Combined(documents)
    settings = _Judge(whole).settings(problems)
    sources = {path: f"{at.file}:{at.mark.line}" for path, at in _given(whole, settings)}
    return Loaded(settings, tuple(texts), sources)


def _given(
    whole: merge.Combined, settings: Settings
) -> Iterator[tuple[conflicts.Path, merge.Place]]:
    """Find the places of all values that a file gives."""

    def walk(value: object, path: conflicts.Path) -> Iterator[conflicts.Path]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from walk(inner, (*path, key))
        elif isinstance(value, list) and value:
            for at, inner in enumerate(value):
                yield from walk(inner, (*path, at))
        else:
            yield path

    for path in walk(settings.model_dump(mode="json", exclude_none=True), ()):
        if (place := whole.given(path)) is not None:
            yield path, place


def _drop_ins(path: Path, problems: list[Problem]) -> list[Path]:
    """Find conf.d/*.yaml beside the file, by name.

    They choose whose memory is touched as the file does, so they must be of the same owner or of
    root: a settings file in a directory that anyone may write to would take in anyone's rules.
    """
    folder = path.parent / DROP_INS
    try:
        found = sorted(file for file in folder.iterdir() if _is_drop_in(file))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        problems.append(_of_file(str(folder), f"cannot be read: {error.strerror}"))
        return []
    before = len(problems)
    for file in (folder, *found):
        try:
            if file.stat().st_uid not in {0, path.stat().st_uid}:
                message = "belongs neither to root nor to the owner of the settings file"
                problems.append(_of_file(str(file), message))
        except OSError as error:
            problems.append(_of_file(str(file), f"cannot be read: {error.strerror}"))
    return found if len(problems) == before else []


def _is_drop_in(file: Path) -> bool:
    return file.suffix == ".yaml" and not file.name.startswith(".")


def _of_file(name: str, message: str) -> Problem:
    return Problem(name, 0, 0, "", message)


def _text(path: Path) -> str:
    name = str(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a FIFO would keep us waiting for a writer
            raise SettingsError([_of_file(name, "is not a regular file")])
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise SettingsError([_of_file(name, "does not exist")]) from None
    except OSError as error:
        raise SettingsError([_of_file(name, f"cannot be read: {error.strerror}")]) from None
    except ValueError as error:  # a NUL in the path
        raise SettingsError([_of_file(ascii(name), f"cannot be a path: {error}")]) from None
    if len(content) > _MAX_BYTES:
        raise SettingsError([_of_file(name, f"is longer than {_MAX_BYTES} bytes")])
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        before = content[: error.start]
        line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        message = f"is not UTF-8: byte {content[error.start]:#04x} ({error.reason})"
        raise SettingsError([Problem(name, line, column, "", message)]) from None


class _Judge:
    """All documents, judged in all the ways there are."""

    def __init__(self, whole: merge.Combined) -> None:
        self._whole = whole
        self._tree = whole.tree

    def settings(self, problems: list[Problem]) -> Settings:
        """Make the settings; SettingsError with *problems*, and all that are found here."""
        root = self._tree.root
        if root is not tree.BAD and not isinstance(root, dict):
            message = f"the settings must be a mapping (key: value), not {self._what(())}"
            raise SettingsError([*problems, self._problem((), message)])
        problems = problems + [
            Problem(file, *fault.mark, conflicts.shown(fault.path), fault.message)
            for file, fault in self._whole.faults
        ]
        settings = None
        try:
            settings = Settings.model_validate(root)
        except ValidationError as error:
            details = error.errors(include_url=False)
            problems += [problem for detail in details if (problem := self._of_model(detail))]
        problems += self._conflicts()
        if problems or settings is None:
            raise SettingsError(sorted(dict.fromkeys(problems), key=self._rank))
        return settings

    def _rank(self, problem: Problem) -> tuple[bool, str, int, int]:
        """Sort as the files are read: the first one, then the others by name."""
        return problem.file != self._whole.first, problem.file, problem.line, problem.column

    def _problem(self, path: conflicts.Path, message: str, *, key: bool = False) -> Problem:
        file, mark = self._whole.place(path, key=key)
        return Problem(file, *mark, conflicts.shown(path), message)

    def _conflicts(self) -> list[Problem]:
        root = self._tree.root
        targets = root.get("targets") if isinstance(root, Mapping) else None
        default = Target.model_fields["regions"].default
        return [
            self._problem(path, message) for path, message in conflicts.conflicts(targets, default)
        ]

    def _of_model(self, detail: ErrorDetails) -> Problem | None:
        """Translate one of pydantic's errors; None where it is reported from elsewhere."""
        if detail["type"] == "conflict":
            return None
        path = self._path(detail["loc"])
        if detail["type"] == "too_short" and self._at(path) != []:
            return None  # pydantic counts valid items only; what is wrong with the others is said
        unknown = detail["type"] == "extra_forbidden"
        if path in self._tree.bad and not unknown:
            return None
        message = self._unknown_key(path) if unknown else self._message(path, detail)
        return self._problem(path, message, key=unknown)

    def _path(self, location: conflicts.Path) -> conflicts.Path:
        """Drop from pydantic's location what is not in the file: branches of unions."""
        path: conflicts.Path = ()
        value = self._tree.root
        for at, part in enumerate(location):
            if isinstance(value, dict) and (part in value or at == len(location) - 1):
                value = value.get(str(part))
            elif isinstance(value, list) and isinstance(part, int):
                value = value[part]
            else:
                continue
            path = (*path, part)
        return path

    def _what(self, path: conflicts.Path) -> str:
        """Name a value of the file in a message."""
        if path in self._tree.written:
            text = self._tree.written[path]
            return repr(text if len(text) <= 60 else text[:60] + "...")
        return "a list" if isinstance(self._at(path), list) else "a mapping"

    def _at(self, path: conflicts.Path) -> object:
        value: Any = self._tree.root
        for part in path:
            value = value[part]
        return value

    def _unknown_key(self, path: conflicts.Path) -> str:
        known = _keys_at(path[:-1])
        close = difflib.get_close_matches(str(path[-1]), known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
        return f"unknown key; {hint}"

    def _message(self, path: conflicts.Path, detail: ErrorDetails) -> str:
        kind, context = detail["type"], detail.get("ctx", {})
        if kind in _WHOLE_MESSAGES:
            return _WHOLE_MESSAGES[kind]
        template = _MESSAGES.get(kind)
        if template is None:
            return detail["msg"]
        message = template.format_map(context)
        if kind == "literal_error":
            message = message.replace("'", "")
        if kind == "string_type" and path in self._tree.written:
            return f"{message}: put it in quotes, '{self._tree.written[path][:60]}'"
        return f"{message}, not {self._what(path)}{self._hint(path)}"

    def _hint(self, path: conflicts.Path) -> str:
        plain = self._tree.written.get(path, "").lower()
        if isinstance(self._at(path), bool) and plain not in ("true", "false"):
            return f" (a bare {plain} is a truth value in YAML)"
        return ""


_WHOLE_MESSAGES = {
    "missing": "is missing",
    "string_too_short": "must not be empty",
    "too_short": "must not be an empty list",
}
_MESSAGES = {
    "literal_error": "must be {expected}",
    "string_type": "must be text",
    "string_pattern_mismatch": "must consist of A-Z a-z 0-9 _ . -",
    "int_type": "must be an integer",
    "bool_type": "must be true or false",
    "path_type": "must be a path",
    "is_instance_of": "must be a path",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be below {lt:#x}",
    "model_type": "must be a mapping (key: value)",
    "model_attributes_type": "must be a mapping (key: value)",
    "tuple_type": "must be a list",
    "pids": "must be an integer or a list of integers",
    "regions": "must be anon, heap or a list of {{start, npages}}",
}


def _keys_at(path: conflicts.Path) -> list[str]:
    """Keys of the model that stands at ``path``."""
    model: type[BaseModel] = Settings
    for part in path:
        if isinstance(part, str):
            model = model_of(model.model_fields[part].annotation) or model
    return list(model.model_fields)


def model_of(annotation: Any) -> type[BaseModel] | None:
    """Find the model inside an annotation such as ``tuple[Target, ...]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for part in get_args(annotation) if (model := model_of(part))), None)
