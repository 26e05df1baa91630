"""The notes that a pager leaves with its service manager: what is read is what was written last."""

from __future__ import annotations

import errno
import os
import select
import socket

import pytest

from ksmd.guard.context import Context, Counters
from ksmd.guard.intervals import Intervals
from ksmd.guard.keeper import Keeper
from ksmd.guard.notes import REWRITE, Noted, Notes
from ksmd.guard.stored import Stored
from ksmd.guard.watch import Watch

GUARD = {"do": "guard", "id": 7, "ranges": [[4096, 8192]], "about": {"pid": 1}}


@pytest.fixture
def notes():
    made = Notes()
    yield made
    for fd in made.fds:
        os.close(fd)


def test_what_was_noted_is_read_in_its_order_by_the_next(notes: Notes) -> None:
    lines = [{"do": "secret", "key": "ab"}, GUARD, {"do": "drop", "id": 7}]
    for line in lines:
        notes.append(line)
    assert list(Notes(notes.fds).read()) == lines


def test_notes_that_were_written_anew_replace_all_earlier_ones(notes: Notes) -> None:
    for number in range(3):
        notes.append({"do": "drop", "id": number})
        notes.rewrite([GUARD])
        notes.append({"do": "secret", "key": str(number)})
        assert list(Notes(notes.fds).read()) == [GUARD, {"do": "secret", "key": str(number)}]


def test_who_dies_while_writing_anew_leaves_the_notes_before(notes: Notes, monkeypatch) -> None:
    notes.append(GUARD)
    real = os.pwrite

    def dies(fd: int, data: bytes, at: int) -> int:
        if at == 0:  # the generation, which comes last
            raise KeyboardInterrupt
        return real(fd, data, at)

    monkeypatch.setattr(os, "pwrite", dies)
    with pytest.raises(KeyboardInterrupt):
        notes.rewrite([{"do": "secret", "key": "new"}])
    assert list(Notes(notes.fds).read()) == [GUARD]


def test_a_line_that_was_never_finished_ends_what_is_read(notes: Notes) -> None:
    notes.append(GUARD)
    notes.append({"do": "drop", "id": 7})
    for fd in notes.fds:
        os.ftruncate(fd, max(0, os.fstat(fd).st_size - 3))
    assert list(Notes(notes.fds).read()) == [GUARD]


def test_notes_are_called_long_before_they_fill_memory_and_are_short_when_rewritten(
    notes: Notes,
) -> None:
    count = 0
    while not notes.long:
        notes.append(GUARD)
        count += 1
    assert count * 60 < 2 * REWRITE
    notes.rewrite([GUARD])
    assert not notes.long
    assert sum(os.fstat(fd).st_size for fd in notes.fds) < 2 * REWRITE


def test_messages_come_to_what_is_held() -> None:
    noted = Noted(
        [
            {"do": "highest", "id": 3},
            {"do": "secret", "key": "ab"},
            GUARD,
            {"do": "extend", "id": 7, "ranges": [[8192, 20480]]},
            {"do": "settle", "id": 7, "ranges": [[4096, 12288]]},
            {"do": "guard", "id": 9, "ranges": [], "about": {}},
            {"do": "drop", "id": 9},
            {"do": "settle", "id": 9, "ranges": [[0, 4096]]},
            {"do": "keep", "inode": 5, "offset": 0, "length": 4096, "about": {"number": 1}},
            {"do": "keep", "inode": 5, "offset": 4096, "length": 4096, "about": {}},
            {"do": "keep", "inode": 6, "offset": 0, "length": 4096, "about": {}},
            {"do": "release", "inode": 6},
        ]
    )
    assert noted.secret == "ab"
    assert noted.highest == 9  # also of what is gone: no number is used twice
    assert noted.targets == {7: (Intervals([(12288, 20480)]), {"pid": 1})}
    assert noted.extents == {5: ({"number": 1}, {0: 4096, 4096: 4096})}


def test_without_memory_for_notes_the_guard_goes_on_and_what_has_gaps_is_not_kept(
    tmp_path, monkeypatch, capsys
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end, select.epoll() as epoll:
        end.bind(str(tmp_path / "notify"))
        stored = Stored(str(tmp_path / "notify"))
        stored.restore(Watch(epoll, lambda: None, stored), Keeper())
        assert stored.flush()
        told = [end.recv(200).decode().splitlines()[-1] for _ in range(2)]
        assert told == ["FDNAME=notes-0", "FDNAME=notes-1"]

        def full(fd: int, data: bytes, at: int) -> int:
            raise OSError(errno.ENOSPC, "full")

        monkeypatch.setattr(os, "pwrite", full)
        for _ in range(2):
            stored.note(GUARD)
        assert stored.flush()
        told = [end.recv(200).decode() for _ in range(2)]
        assert told == [f"FDSTOREREMOVE=1\nFDNAME=notes-{number}" for number in (0, 1)]
    assert capsys.readouterr().err.count("no notes any more") == 1


def test_a_manager_that_does_not_read_is_told_later_and_never_what_was_closed_since(
    tmp_path,
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind(str(tmp_path / "notify"))
        stored = Stored(str(tmp_path / "notify"))
        contexts = [Context(os.dup(0), number, 0, Counters()) for number in range(2000)]
        for context in contexts:
            stored.hold(context)
        assert not stored.flush()  # its queue takes fewer
        last = contexts.pop()
        stored.let_go(last)
        os.close(last.fd)
        end.settimeout(0.2)
        seen = []
        while not stored.flush() or len(seen) < 2000:
            text, fds, _, _ = socket.recv_fds(end, 200, 1)
            seen.append(text.decode().splitlines())
            for fd in fds:
                os.close(fd)
        assert [lines[-1] for lines in seen[:3]] == [f"FDNAME=guard-{n}" for n in range(3)]
        assert seen[-1] == ["FDSTOREREMOVE=1", "FDNAME=guard-1999"]
        assert len(seen) == 2000
        for context in contexts:
            os.close(context.fd)
