"""A machine for the tests of this directory, and victims that end with their test."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import install_tree
import pytest
from inside import Lasting, Pair, Service, installed, started, stopped
from machine import PATIENCE, Machine


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let those come last that run beside the others."""
    items.sort(key=lambda item: item.get_closest_marker("beside") is not None)


@pytest.fixture(scope="session", autouse=True)
def lanes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Begin what runs beside the others, of what is selected."""
    stories = defaultdict(list)
    for item in request.session.items:
        if mark := item.get_closest_marker("beside"):
            lane, story = mark.args
            stories[lane].append(story)
    for lane, its in stories.items():
        lane.begin(request, its)
    yield
    for lane in stories:
        lane.end(PATIENCE)


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is laid over the root of a machine: ksmd, installed."""
    made = tmp_path_factory.mktemp("machine") / "tree"
    made.mkdir()
    made.chmod(0o755)  # it becomes the root directory
    install_tree.make(made)
    return made


@pytest.fixture(scope="session")
def bare_tree(tmp_path_factory: pytest.TempPathFactory, tree: Path) -> Path:
    """The same without ksmd: the interpreter that targets run."""
    made = tmp_path_factory.mktemp("bare") / "tree"
    without = {str(tree): ["usr"], str(tree / "etc"): ["ksmd"]}
    shutil.copytree(
        tree, made, symlinks=True, ignore=lambda folder, _: without.get(str(folder), [])
    )
    return made


@pytest.fixture(scope="session")
def machine(tree: Path) -> Iterator[Machine]:
    """A booted machine with ksmd installed, its user made, and its units enabled."""
    with installed(tree) as booted:
        yield booted


@pytest.fixture
def service(machine: Machine) -> Iterator[Service]:
    """ksmd.service, enabled and not started."""
    with stopped(machine) as made:
        yield made


@pytest.fixture
def running(machine: Machine) -> Iterator[Service]:
    """ksmd.service, paused, which has merged nothing yet."""
    with started(machine) as made:
        yield made


@pytest.fixture(scope="session")
def lasting(machine: Machine) -> Iterator[Lasting]:
    """Victims that are there already."""
    made = Lasting(machine)
    yield made
    made.end()


@pytest.fixture
def pair(lasting: Lasting) -> Pair:
    """Two victims with the same content; they serve the next test too if all is well with them."""
    return lasting.pair()
