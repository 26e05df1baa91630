"""Daemons and actors for the end-to-end tests, all of them ended with their test."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from actor import Actor
from harness import Daemon
from programs import Example, Puppet, everybody, open_directory

StartDaemon = Callable[..., Daemon]
StartActor = Callable[..., Actor]


@pytest.fixture
def daemons(tmp_path: Path) -> Iterator[StartDaemon]:
    """Start daemons: ``daemons(settings)``. What they logged is shown where a test fails."""
    started: list[Daemon] = []

    def start(settings: Mapping[str, Any] | str | None, **options: Any) -> Daemon:
        directory = tmp_path / f"daemon{len(started)}"
        directory.mkdir()
        started.append(Daemon(directory, settings, **options))
        return started[-1]

    yield start
    for daemon in started:
        daemon.close()
        print(f"-- log of the daemon {daemon.pid} --\n{daemon.log()}")


@contextlib.contextmanager
def starting_open_daemons() -> Iterator[StartDaemon]:
    """Start daemons whose socket lets everybody in, and end them with the block."""
    started: list[Daemon] = []
    directories: list[Path] = []

    def start(**settings: Any) -> Daemon:
        directories.append(open_directory())
        started.append(Daemon(directories[-1], everybody(**settings)))
        return started[-1]

    yield start
    for daemon in started:
        daemon.close()
        print(f"-- log of the daemon {daemon.pid} --\n{daemon.log()}")
    for directory in directories:
        shutil.rmtree(directory)


@pytest.fixture
def open_daemons() -> Iterator[StartDaemon]:
    """Start daemons whose socket lets everybody in: ``open_daemons(**settings)``, paused."""
    with starting_open_daemons() as start:
        yield start


@pytest.fixture(scope="module")
def module_daemon() -> Iterator[Daemon]:
    """One such daemon for all tests of a module that leave it as they found it."""
    with starting_open_daemons() as start:
        yield start()


@pytest.fixture
def puppets() -> Iterator[Callable[..., Puppet]]:
    """Start puppets: ``puppets(path, uid=..., pages=..., seed=...)``."""
    started: list[Puppet] = []

    def start(path: Path | None, **options: Any) -> Puppet:
        started.append(Puppet(path, **options))
        return started[-1]

    yield start
    for puppet in started:
        puppet.close()


@pytest.fixture
def examples() -> Iterator[Callable[..., Example]]:
    """Start the shipped examples: ``examples("c" or "python", path)``."""
    started: list[Example] = []

    def start(language: str, path: Path, **options: Any) -> Example:
        started.append(Example(language, path, **options))
        return started[-1]

    yield start
    for example in started:
        example.close()


@pytest.fixture
def actors() -> Iterator[StartActor]:
    """Start actors: ``actors(pages)``."""
    started: list[Actor] = []

    def start(pages: int, **options: Any) -> Actor:
        started.append(Actor(pages, **options))
        return started[-1]

    yield start
    for actor in started:
        actor.stop()
