"""What holds of settings however they are made, by file or by code."""

import ast
from pathlib import Path

import pytest
from pydantic import ValidationError

import ksmd
from ksmd.daemon.protocol import DEFAULT_SOCKET
from ksmd.settings import Match, Region, Settings, TableSizes, Target, defaults

PACKAGE = Path(ksmd.__file__).parent


def test_the_defaults_are_those_of_the_contract():
    assert defaults().model_dump(mode="json") == {
        "version": 1,
        "run": "merge",
        "on_stop": "unmerge",
        "socket": "/run/ksmd/ksmd.sock",
        "socket_mode": "0600",
        "socket_group": "root",
        "scan": {
            "pages_to_scan": 25000,
            "sleep_millisecs": 20,
            "max_pages_to_merge": 25000,
            "cpu_percent": 0,
            "advisor": "none",
            "target_scan_time": 200,
            "advisor_max_cpu": 70,
            "advisor_min_pages_to_scan": 500,
            "advisor_max_pages_to_scan": 30000,
        },
        "tables": {"page_hash_size": 0, "rmap_hash_size": 0, "sha1_hash_size": 0},
        "window": {
            "deadline_ms": 10,
            "stop_ms": 5,
            "max_pages": 4096,
            "max_runs": 300,
            "interval_secs": 10,
        },
        "store": {"large_folios": True},
        "limits": {"vma_percent": 50, "regions_per_user": 1024},
        "targets": [],
    }


def test_daemon_and_clients_mean_the_same_socket():
    assert str(defaults().socket) == DEFAULT_SOCKET


def test_defaults_of_a_target():
    target = Target(name="a", match=Match(pid=[5]))
    assert (target.regions, target.domain) == ("anon", None)
    assert (target.accept_seccomp_risk, target.min_age_secs) == (False, 0)


def test_tables_of_size_0_get_the_seeds_shares_of_free_memory():
    assert defaults().resolved_tables(3_200_000) == TableSizes(320_000, 320_000, 100_000)


def test_tables_sized_from_memory_never_get_smaller_than_1024():
    assert defaults().resolved_tables(0) == TableSizes(1024, 1024, 1024)
    assert defaults().resolved_tables(20_000) == TableSizes(2000, 2000, 1024)


def test_a_given_table_size_is_kept_however_small():
    tables = {"page_hash_size": 3, "sha1_hash_size": 7}
    settings = Settings(version=1, tables=tables)
    assert settings.resolved_tables(100_000) == TableSizes(3, 10_000, 7)


@pytest.mark.parametrize(
    ("section", "key", "least", "most"),
    [
        ("scan", "pages_to_scan", 1, 2**32 - 1),
        ("scan", "max_pages_to_merge", 1, 2**32 - 1),
        ("scan", "cpu_percent", 0, 10_000),
        ("scan", "sleep_millisecs", 0, 3_600_000),
        ("scan", "target_scan_time", 1, 86400),
        ("scan", "advisor_max_cpu", 1, 100),
        ("tables", "page_hash_size", 0, 2**32 - 1),
        ("window", "deadline_ms", 1, 1000),
        ("window", "stop_ms", 1, 1000),
        ("window", "max_pages", 1, 2**20),
        ("window", "max_runs", 1, 500),
        ("window", "interval_secs", 0, 86400),
        ("limits", "vma_percent", 1, 50),
    ],
)
def test_bounds_are_inclusive_and_closed(section, key, least, most):
    for value in (least, most):
        settings = Settings.model_validate({"version": 1, section: {key: value}})
        assert getattr(getattr(settings, section), key) == value
    for value in (least - 1, most + 1):
        with pytest.raises(ValidationError):
            Settings.model_validate({"version": 1, section: {key: value}})


def test_settings_cannot_be_changed_after_they_are_made():
    settings = Settings(version=1, targets=[Target(name="a", match=Match(pid=[5]))])
    for model, key in [
        (settings, "run"),
        (settings.scan, "pages_to_scan"),
        (settings.targets[0].match, "pid"),
    ]:
        with pytest.raises(ValidationError):
            setattr(model, key, getattr(model, key))
    assert isinstance(settings.targets, tuple)
    assert isinstance(settings.targets[0].match.pid, tuple)
    hash(settings)


def test_contradicting_targets_cannot_be_made_by_code_either():
    one = Target(name="a", match=Match(pid=(5,)), regions="heap")
    with pytest.raises(ValidationError) as caught:
        Settings(version=1, targets=(one, one))
    assert {error["loc"] for error in caught.value.errors()} == {
        ("targets", 1, "name"),
        ("targets", 1, "regions"),
    }


def test_a_region_ends_after_its_last_page():
    assert Region(start=0x1000, npages=3).end == 0x4000
    assert Region(start=(1 << 47) - 4096, npages=1).end == 1 << 47


def test_a_match_without_any_key_is_refused():
    with pytest.raises(ValidationError, match="at least one"):
        Match()
    with pytest.raises(ValidationError, match="at least one"):
        Match(exe=None)


def test_the_name_of_a_domain_cannot_be_that_of_a_user_id():
    with pytest.raises(ValidationError):
        Target(name="a", match=Match(pid=(1,)), domain="uid:0")


@pytest.mark.parametrize("room", ["model", "kernel", "remap", "guard", "core"])
def test_small_processes_and_pure_rooms_never_import_settings_or_pydantic(room):
    sources = sorted((PACKAGE / room).rglob("*.py"))
    assert sources
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                assert not name.startswith(("pydantic", "yaml", "ksmd.settings")), source
