"""The setting that gives the store large folios: when it is changed, and that it is put back."""

from __future__ import annotations

from pathlib import Path

import pytest

from ksmd.kernel.sysfs import chosen
from ksmd.kernel.thp import LargeFolios
from ksmd.model.errors import KsmdError

FILES = {"top": "shmem_enabled", "folio": "hugepages-1024kB/shmem_enabled"}
HUGE = "hugepages-2048kB/shmem_enabled"


@pytest.fixture
def sysfs(tmp_path: Path) -> Path:
    for size in ("1024kB", "2048kB"):
        (tmp_path / f"hugepages-{size}").mkdir()
    (tmp_path / FILES["top"]).write_text("always within_size advise [never] deny force\n")
    (tmp_path / FILES["folio"]).write_text("always inherit within_size advise [never]\n")
    (tmp_path / HUGE).write_text("always [inherit] within_size advise never\n")
    return tmp_path


def folio(sysfs: Path) -> str:
    return chosen((sysfs / FILES["folio"]).read_text())


def test_the_setting_is_changed_for_the_block_and_noted_meanwhile(sysfs: Path):
    note = sysfs / "note"
    folios = LargeFolios(note, lambda: True, sysfs)
    for _ in range(2):
        with folios as given:
            assert given
            assert folio(sysfs) == "advise"
            assert note.read_text() == "never"
        assert folio(sysfs) == "never"
        assert not note.exists()
    with pytest.raises(ZeroDivisionError), folios:
        _ = 1 // 0
    assert folio(sysfs) == "never"
    assert not folios.recover()


@pytest.mark.parametrize("value", ["advise", "always", "within_size"])
def test_what_is_given_already_is_left_as_it_is(sysfs: Path, value: str):
    (sysfs / FILES["folio"]).write_text(value)
    with LargeFolios(sysfs / "note", lambda: True, sysfs) as given:
        assert given
        assert folio(sysfs) == value
        assert not (sysfs / "note").exists()
    assert folio(sysfs) == value


def test_nothing_is_changed_where_that_is_not_allowed(sysfs: Path):
    with LargeFolios(sysfs / "note", lambda: False, sysfs) as given:
        assert not given
        assert folio(sysfs) == "never"


@pytest.mark.parametrize(
    ("file", "value"),
    [("top", "advise"), ("top", "always"), ("top", "force"), ("top", "deny"), ("huge", "advise")],
)
def test_where_folios_of_2_mib_might_be_given_none_is_asked_for(sysfs: Path, file: str, value: str):
    (sysfs / (HUGE if file == "huge" else FILES[file])).write_text(value)
    with LargeFolios(sysfs / "note", lambda: True, sysfs) as given:
        assert not given
        assert folio(sysfs) == "never"


def test_a_folio_of_1_mib_inherits_where_one_of_2_mib_does_not(sysfs: Path):
    (sysfs / HUGE).write_text("never")
    (sysfs / FILES["top"]).write_text("advise")
    (sysfs / FILES["folio"]).write_text("inherit")
    with LargeFolios(None, lambda: False, sysfs) as given:
        assert given


def test_how_they_can_be_had_is_told_without_a_change(sysfs: Path, monkeypatch: pytest.MonkeyPatch):
    folios = LargeFolios(folder=sysfs)
    assert "while part of an extent is made" in folios.describe()
    assert folio(sysfs) == "never"
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(KsmdError, match="says never, and we may not write to it; advise would do"):
        folios.describe()
    (sysfs / FILES["folio"]).write_text("advise")
    assert folios.describe().startswith("given: ")
    (sysfs / FILES["top"]).write_text("always")
    with pytest.raises(KsmdError, match="says always, that of 2 MiB inherit"):
        folios.describe()
    (sysfs / FILES["top"]).unlink()
    with pytest.raises(KsmdError, match="no setting"):
        folios.describe()


def test_a_kernel_without_the_setting_gives_none(tmp_path: Path):
    with LargeFolios(tmp_path / "note", lambda: True, tmp_path) as given:
        assert not given
    assert list(tmp_path.iterdir()) == []


def test_where_the_setting_cannot_be_written_nothing_is_left(
    sysfs: Path, monkeypatch: pytest.MonkeyPatch
):
    write = Path.write_text

    def refuse(path: Path, text: str) -> int:
        if path.name == "shmem_enabled":
            raise PermissionError(30, "Read-only file system")
        return write(path, text)

    monkeypatch.setattr(Path, "write_text", refuse)
    with LargeFolios(sysfs / "note", lambda: True, sysfs) as given:
        assert not given
    assert not (sysfs / "note").exists()


def test_what_a_killed_process_had_changed_is_put_back_by_the_next(sysfs: Path):
    note = sysfs / "note"
    killed = LargeFolios(note, lambda: True, sysfs)
    killed.__enter__()
    assert folio(sysfs) == "advise"
    heir = LargeFolios(note, lambda: True, sysfs)
    assert heir.recover()
    assert folio(sysfs) == "never"
    assert not note.exists()
    assert not heir.recover()


def test_what_cannot_be_put_back_is_said(sysfs: Path):
    folios = LargeFolios(sysfs / "note", lambda: True, sysfs)
    folios.__enter__()
    (sysfs / FILES["folio"]).unlink()
    (sysfs / FILES["folio"]).mkdir()
    with pytest.raises(KsmdError, match="cannot put back 'never'"):
        folios.__exit__(None, None, None)
    assert (sysfs / "note").read_text() == "never", "the next start tries again"
