"""Settings read in a process of their own, which ends with that: the daemon stays small.

``python -m ksmd.settings.apart [FILE]`` writes what it has read, or what is wrong with it, as JSON.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ksmd.model.errors import KsmdError
from ksmd.settings.differences import changed
from ksmd.settings.problems import Problem, SettingsError
from ksmd.settings.values import Settings, settings_of

_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Given:
    """Settings; what they are as JSON, without what is not set; and where values stand.

    ``sources`` maps a path such as ``("scan", "pages_to_scan")`` to "file:line"; what no file gives
    is not in it.
    """

    settings: Settings
    content: Mapping[str, Any]
    sources: Mapping[tuple[str | int, ...], str]

    def changes(self, before: Given) -> str:
        """Name what is different now."""
        return ", ".join(changed(before.content, self.content)) or "nothing changed"


class Reading:
    """A file (None: no file, the defaults) that is being read, from the beginning on."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        command = [sys.executable, "-P", "-m", "ksmd.settings.apart"]
        self._process: subprocess.Popen[bytes] | None = None
        with contextlib.suppress(OSError):  # no process may be had: it is read here then
            self._process = subprocess.Popen(
                [*command, *([str(path)] if path is not None else [])],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for us
            )

    def result(self) -> Given:
        """Wait for it. SettingsError with all that is wrong; KsmdError where there is no answer."""
        answer = _answer(self._path) if self._process is None else _heard(self._process)
        if "problems" in answer:
            raise SettingsError([Problem(**problem) for problem in answer["problems"]])
        sources = {tuple(path): place for path, place in answer["sources"]}
        return Given(settings_of(answer["settings"]), answer["content"], sources)


def _heard(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    said = b""
    try:
        out, said = process.communicate(timeout=_SECONDS)
        answer: dict[str, Any] = json.loads(out)
    except (subprocess.TimeoutExpired, ValueError):
        process.kill()
        process.communicate()
        lines = said.decode(errors="replace").strip().splitlines()
        last = f": {lines[-1]}" if lines else ""
        raise KsmdError(f"the settings could not be read{last}") from None
    return answer


def _answer(path: Path | None) -> dict[str, Any]:
    # pydantic, which whoever uses Reading is to be spared
    from ksmd.settings import Loaded, defaults, effective, read  # noqa: PLC0415

    try:
        loaded = read(path) if path else Loaded(defaults(), (), {})
    except SettingsError as error:
        return {"problems": [asdict(problem) for problem in error.problems]}
    return {
        "settings": loaded.settings.model_dump(mode="json"),
        "content": effective(loaded.settings),
        "sources": list(loaded.sources.items()),
    }


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        json.dump(_answer(Path(sys.argv[1]) if len(sys.argv) > 1 else None), sys.stdout)
