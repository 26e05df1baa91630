"""What every test may rely on: root or a clear answer, victims, and a host left as it was found."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from victims import Victim, binary

# how long an example takes says more of the machine than of the code
hypothesis.settings.register_profile(
    "ksmd", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("ksmd")

_KERNEL_SETTINGS = (
    Path("/sys/kernel/mm/ksm"),
    Path("/sys/kernel/mm/transparent_hugepage"),
)

_TESTS = Path(__file__).parent
#: Where the tests lie that may change them.
_KERNEL_WORK = frozenset({"bench", "integration", "system"})


def _root_required() -> bool:
    return os.environ.get("KSMD_REQUIRE_ROOT") == "1"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs root where there is none."""
    if item.get_closest_marker("root") and os.geteuid() != 0:
        pytest.skip("needs root")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn any skip of a root test into a failure where KSMD_REQUIRE_ROOT=1 promises root."""
    report = yield
    skipped = report.skipped and not hasattr(report, "wasxfail")
    if skipped and item.get_closest_marker("root") and _root_required():
        report.outcome = "failed"
        report.longrepr = f"KSMD_REQUIRE_ROOT=1, and yet skipped: {report.longrepr}"
    return report


def _kernel_settings() -> dict[Path, str]:
    """The settings (not the counters) of kernel KSM and of huge pages."""
    return {
        path: path.read_text()
        for root in _KERNEL_SETTINGS
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.stat().st_mode & 0o200 and path.stat().st_mode & 0o400
    }


def _value(setting: str) -> str:
    """What to write to get a setting back: "always [madvise] never" is set by "madvise"."""
    return setting.partition("[")[2].partition("]")[0] or setting.strip()


@pytest.fixture(scope="session", autouse=True)
def kernel_settings_as_found(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail the session if a test left another setting of kernel KSM or THP; put it back.

    A session of pure logic may run beside one that changes some for a while.
    """
    kinds = {item.path.relative_to(_TESTS).parts[0] for item in request.session.items}
    if not kinds & _KERNEL_WORK:
        yield
        return
    before = _kernel_settings()
    yield
    changed = {path: now for path, now in _kernel_settings().items() if now != before.get(path)}
    for path in changed:
        path.write_text(_value(before[path]))
    assert not changed, f"a test left other kernel settings: {changed}"


@pytest.fixture(scope="session")
def package_build(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Future[Path]]:
    """The Debian package, built once, beside whatever runs meanwhile."""
    script = Path(__file__).parents[1] / ".ci/deb"
    command = [script, tmp_path_factory.mktemp("package")]

    def build() -> Path:
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        assert built.returncode == 0, built.stderr
        return Path(built.stdout.splitlines()[-1])

    with ThreadPoolExecutor(1) as aside:
        yield aside.submit(build)


@pytest.fixture(scope="session")
def debian_package(package_build: Future[Path]) -> Path:
    """Give the Debian package."""
    return package_build.result()


StartVictim = Callable[..., Victim]


@pytest.fixture
def victims() -> Iterator[StartVictim]:
    """Start victims: ``victims("nanosleep", pages=64)``. They end with the test, by their pids."""
    started: list[Victim] = []

    def start(kind: str = "idle", **options: Any) -> Victim:
        started.append(Victim(kind, **options))
        return started[-1]

    yield start
    for victim in started:
        victim.stop()
    left = _running(binary()) if started else []
    for pid in left:
        os.kill(pid, 9)
    assert not left, f"victims, or children of theirs, were left running: {left}"


def _running(executable: Path) -> list[int]:
    """The processes that run this very file; nobody else runs it, as it is this session's."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if (entry / "exe").readlink() == executable:
                    found.append(int(entry.name))
            except OSError:
                continue  # gone, a kernel thread, or another user's
    return found
