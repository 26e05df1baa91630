"""``ksmctl doctor`` beside real conflicts: what it says, and the exit code for scripts."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from harness import Daemon, settings_for, until

pytestmark = pytest.mark.root


def examine(daemon: Daemon) -> tuple[dict[str, Any], int]:
    done = daemon.run_ctl("doctor", "--config", daemon.config)
    return json.loads(done.stdout), done.returncode


def found(answer: dict[str, Any], text: str) -> list[dict[str, Any]]:
    return [one for one in answer["findings"] if text in one["what"]]


def test_another_daemon_is_noticed_named_and_to_be_stopped(daemons, victims) -> None:
    victim = victims(pages=64)
    first = daemons(settings_for(victim))
    second = daemons(settings_for(victim))
    answer, code = examine(first)
    (finding,) = found(answer, "daemons of ksmd run")
    assert {first.pid, second.pid} <= set(map(int, re.findall(r"\d+", finding["what"])))
    assert (finding["level"], finding["advice"]) == ("problem", "stop all but one")
    assert code == answer["exit_code"] == 1


def test_ksmtuned_is_noticed_while_it_runs(daemons, victims, tmp_path: Path) -> None:
    daemon = daemons(settings_for(victims(pages=64)))
    program = tmp_path / "ksmtuned"
    shutil.copy("/bin/sleep", program)
    with subprocess.Popen([program, "600"]) as process:
        try:
            comm = Path(f"/proc/{process.pid}/comm")
            until(lambda: comm.read_text() == "ksmtuned\n", "its name")
            answer, code = examine(daemon)
            (finding,) = found(answer, f"ksmtuned (pid {process.pid})")
            assert "systemctl disable --now ksmtuned" in finding["advice"]
            assert finding["level"] == "warning"
            assert code == answer["exit_code"] == 1
        finally:
            process.kill()
    assert not found(examine(daemon)[0], "ksmtuned (pid")
