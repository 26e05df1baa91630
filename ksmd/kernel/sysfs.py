"""Settings of the kernel in sysfs, and how to put back what was there."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

from ksmd.model.errors import KsmdError, PrivilegeError


def chosen(text: str) -> str:
    """Give the choice in brackets of a file such as "always [madvise] never", else the text."""
    opening, closing = text.find("["), text.find("]")
    return text[opening + 1 : closing] if 0 <= opening < closing else text.strip()


def write(file: Path, value: str) -> None:
    """Write a file; PrivilegeError, or KsmdError where the kernel does not take the value."""
    try:
        file.write_text(value)
    except PermissionError as error:
        raise PrivilegeError(f"{file}: {error.strerror}") from error
    except OSError as error:
        raise KsmdError(f"{file}: cannot write {value!r}: {error.strerror}") from error


class Settings:
    """Set files of *folder* for the length of a with block, in the order given.

    They are restored in the opposite order, every one even where another fails; the first failure
    is raised then.
    """

    def __init__(self, folder: Path, values: dict[str, str]) -> None:
        self.folder = folder
        self._wanted = values
        self._before: dict[str, str] = {}

    def __enter__(self) -> Self:
        try:
            for name, value in self._wanted.items():
                file = self.folder / name
                try:
                    before = chosen(file.read_text())
                except OSError as error:
                    raise KsmdError(f"{file}: {error.strerror}") from error
                self._before[name] = before
                write(file, value)
        except KsmdError:
            self._restore()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        failed: KsmdError | None = None
        while self._before:
            name, value = self._before.popitem()
            try:
                write(self.folder / name, value)
            except KsmdError as error:
                failed = failed or error
        if failed:
            raise failed
