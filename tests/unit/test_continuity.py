"""Counters go on over a restart, within one boot, and never at the price of anything else."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from ksmd.core.ledger import Ledger
from ksmd.daemon.continuity import COUNTERS, INTERVAL_SECS, NAME, LedgerFile


def restored(directory: Path | None, boot: str = "this") -> Ledger:
    ledger = Ledger()
    LedgerFile(directory, ledger, boot).restore()
    return ledger


def save(directory: Path | None, ledger: Ledger, boot: str = "this") -> None:
    LedgerFile(directory, ledger, boot).save()


def test_the_next_daemon_counts_on(tmp_path: Path) -> None:
    save(tmp_path, Ledger(pages_scanned=10, pages_skipped=20, full_scans=3, cow_breaks=4))
    found = restored(tmp_path)
    assert [getattr(found, name) for name in COUNTERS] == [10, 20, 3, 4]
    assert not found.refusals


def test_after_a_boot_counters_begin_at_zero(tmp_path: Path) -> None:
    save(tmp_path, Ledger(full_scans=3), "last")
    assert restored(tmp_path) == Ledger()


def test_without_a_state_directory_nothing_is_written_or_read(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(None, Ledger(full_scans=3))
    assert restored(None) == Ledger()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "7", '{"boot": "this"}', '{"boot": "this", "full_scans": "many"}', "\xff\xfe"],
)
def test_a_file_that_makes_no_sense_costs_the_counters_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    (tmp_path / NAME).write_bytes(content.encode("latin-1"))
    assert restored(tmp_path) == Ledger()
    assert "cannot be read" in caplog.text


def test_no_counter_ever_falls_below_zero(tmp_path: Path) -> None:
    told = {"boot": "this"} | dict.fromkeys(COUNTERS, -5)
    (tmp_path / NAME).write_text(json.dumps(told))
    assert restored(tmp_path) == Ledger()


def test_it_is_saved_once_in_a_while_and_only_when_something_changed(tmp_path: Path) -> None:
    now = [0.0]
    ledger = Ledger()
    file = LedgerFile(tmp_path, ledger, "this", lambda: now[0])
    ledger.full_scans = 1
    file.keep()
    assert not (tmp_path / NAME).exists()
    now[0] = INTERVAL_SECS
    file.keep()
    assert restored(tmp_path).full_scans == 1
    inode = (tmp_path / NAME).stat().st_ino
    now[0] = 2 * INTERVAL_SECS
    file.keep()
    assert (tmp_path / NAME).stat().st_ino == inode
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_a_directory_that_cannot_be_written_is_told_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    file = LedgerFile(tmp_path / "absent", Ledger(), "this")
    for _ in range(3):
        file.save()
    assert caplog.text.count("cannot be written") == 1
