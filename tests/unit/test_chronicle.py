"""One line of the log for each thing that begins or ends in a target, and none for each window."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from ksmd.daemon.chronicle import Chronicle


def target(slot: int, name: str = "web"):
    return SimpleNamespace(
        slot=slot, pid=100 + slot, selected=SimpleNamespace(name=name, domain="d")
    )


@pytest.fixture
def chronicle(caplog: pytest.LogCaptureFixture) -> Chronicle:
    caplog.set_level(logging.INFO)
    return Chronicle("registered")


def test_a_target_is_told_of_when_it_begins_to_be_merged_or_given_back_and_when_it_ends(
    chronicle: Chronicle, caplog: pytest.LogCaptureFixture
) -> None:
    one = target(1)
    for kind in ("merged", "merged", "merged", "unmerged", "unmerged", "merged", "target_gone"):
        chronicle.note(kind, one, 5)
    assert [record.getMessage() for record in caplog.records] == [
        "pid 101 (web): merging, 5 pages so far",
        "pid 101 (web): giving back, 5 pages so far",
        "pid 101 (web): merging, 5 pages so far",
        "pid 101 (web) is a target no more",
    ]
    assert {record.levelno for record in caplog.records} == {logging.INFO}
    assert caplog.records[0].ksmd_fields == {
        "target_pid": 101, "target_name": "web", "domain": "d", "event": "merged", "pages": 5,
    }  # fmt: skip


def test_targets_are_told_apart_and_one_that_was_never_merged_ends_in_silence(
    chronicle: Chronicle, caplog: pytest.LogCaptureFixture
) -> None:
    for slot in (1, 2):
        chronicle.note("merged", target(slot), 1)
    chronicle.note("target_gone", target(3), 0)
    assert [record.getMessage()[:7] for record in caplog.records] == ["pid 101", "pid 102"]


def test_a_storm_of_writes_is_a_warning_each_time(
    chronicle: Chronicle, caplog: pytest.LogCaptureFixture
) -> None:
    for pages in (300, 400):
        chronicle.note("cow_storm", target(1), pages)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert "400 merged pages were written" in caplog.text


def test_what_programs_registered_themselves_fills_no_log(
    chronicle: Chronicle, caplog: pytest.LogCaptureFixture
) -> None:
    for kind in ("merged", "unmerged", "target_gone"):
        chronicle.note(kind, target(1, "registered"), 5)
    assert caplog.records == []
