"""Settings of the kernel come back, whatever happens between."""

from __future__ import annotations

from pathlib import Path

import pytest

from ksmd.kernel import ksm, sysfs
from ksmd.model.errors import KsmdError


def _folder(tmp_path: Path) -> Path:
    (tmp_path / "run").write_text("0\n")
    (tmp_path / "pages_to_scan").write_text("100\n")
    (tmp_path / "advisor_mode").write_text("[none] scan-time\n")
    return tmp_path


def _content(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text().strip() for file in folder.iterdir()}


def test_values_are_set_and_come_back(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    with ksm.KernelKsm(folder, run=1, pages_to_scan=5, advisor_mode="scan-time") as kernel:
        assert kernel.read() == {"run": 1, "pages_to_scan": 5, "advisor_mode": "scan-time"}
    assert _content(folder) == {"run": "0", "pages_to_scan": "100", "advisor_mode": "none"}


def test_values_come_back_after_an_error(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    with pytest.raises(RuntimeError), ksm.KernelKsm(folder, run=1):
        raise RuntimeError
    assert _content(folder)["run"] == "0"


def test_a_file_that_is_missing_leaves_the_others_as_they_were(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    with pytest.raises(KsmdError), sysfs.Settings(folder, {"run": "1", "absent": "1"}):
        pytest.fail("entered")
    assert _content(folder)["run"] == "0"


def test_one_failure_to_restore_does_not_stop_the_others(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    settings = sysfs.Settings(folder, {"run": "1", "pages_to_scan": "7"})
    settings.__enter__()
    (folder / "pages_to_scan").unlink()
    (folder / "pages_to_scan").mkdir()
    with pytest.raises(KsmdError, match="pages_to_scan"):
        settings.__exit__(None, None, None)
    assert (folder / "run").read_text() == "0"


def test_run_is_set_last_and_restored_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, order = _folder(tmp_path), []
    monkeypatch.setattr(sysfs, "write", lambda file, value: order.append((file.name, value)))
    with ksm.KernelKsm(folder, run=1, pages_to_scan=5):
        pass
    assert order == [("pages_to_scan", "5"), ("run", "1"), ("run", "0"), ("pages_to_scan", "100")]


def test_a_kernel_without_ksm_is_none(tmp_path: Path) -> None:
    assert ksm.read(tmp_path / "absent") is None


@pytest.mark.parametrize(
    ("text", "choice"),
    [("always [madvise] never\n", "madvise"), ("100\n", "100"), ("] [", "] ["), ("[x", "[x")],
)
def test_the_bracketed_word_is_the_choice(text: str, choice: str) -> None:
    assert sysfs.chosen(text) == choice
