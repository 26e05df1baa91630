"""A private ksmd for ``ksmd demo``: its own settings, its own socket, gone when the demo is.

It selects processes by pid, and only those that the demo started.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from ksmd.client import Client, DaemonUnavailableError
from ksmd.kernel.tied import tied
from ksmd.model.errors import KsmdError

START_SECONDS = 60.0
STOP_SECONDS = 60.0


class DemoDaemon:
    """``ksmd run`` with its settings, socket and log in *directory*."""

    def __init__(self, directory: Path, pids: list[int]) -> None:
        self.socket = directory / "ksmd.sock"
        self._log = directory / "ksmd.log"
        config = directory / "ksmd.yaml"
        settings = {
            "version": 1,
            "socket": str(self.socket),
            "targets": [{"name": "demo", "match": {"pid": pids}, "domain": "demo"}],
        }
        config.write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
        command = [sys.executable, "-P", "-m", "ksmd.cli.ksmd", "run"]
        command += ["--config", str(config), "--socket", str(self.socket)]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                tied(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.pid = self._process.pid

    def wait_ready(self) -> None:
        """Wait until the socket answers."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                with Client(self.socket, START_SECONDS) as ksmd:
                    ksmd.call("GetApiVersion")
                    return
            except DaemonUnavailableError as error:
                if self._process.poll() is not None:
                    raise KsmdError(f"the daemon ended: {self._last_words()}") from error
                if time.monotonic() > deadline:
                    raise KsmdError(f"the daemon does not answer: {self._last_words()}") from error
            time.sleep(0.05)

    def stop(self) -> None:
        """Have it give everything back and end; KsmdError when it does not, or not well."""
        self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired as error:
            self.kill()
            raise KsmdError(f"the daemon did not stop: {self._last_words()}") from error
        if code != 0:
            raise KsmdError(f"the daemon ended with code {code}: {self._last_words()}")

    def kill(self) -> None:
        """End it in any case: politely first, for then targets get their pages back."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()

    def _last_words(self) -> str:
        text = self._log.read_text(encoding="utf-8", errors="replace")
        return "\n".join(text.splitlines()[-15:]) or "(it logged nothing)"
