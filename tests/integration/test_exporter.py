"""The exporter over real HTTP, against a control server that gives a known status."""

from __future__ import annotations

import contextlib
import dataclasses
import selectors
import signal
import socket
import subprocess
import sysconfig
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from ksmd.daemon.control import ControlServer
from ksmd.exporter import server
from ksmd.exporter.metrics import GAUGES
from ksmd.model.errors import KsmdError, UsageError
from ksmd.model.status import Status, TargetStatus

KSMD = Path(sysconfig.get_path("scripts")) / "ksmd"
STATUS = Status(
    run="merge", paused=True, pages_sharing=7, general_profit=-4096, cow_breaks=3,
    stops=12, stop_ms_p99=2.0, stop_ms_max=4.0,
    refusals={"stack": 5},
    targets=[
        TargetStatus(1, "web", "front", merging_pages=2, stop_ms_max=1.5),
        TargetStatus(2, "web", "front", merging_pages=3, stop_ms_max=4.0, refused="traced"),
        TargetStatus(3, 'odd "name"\\', "back", merging_pages=9),
    ],
)  # fmt: skip


class Daemon:
    """A control server in a thread, which answers Status."""

    def __init__(self, path: Path) -> None:
        self._server = ControlServer(path, lambda *_: dataclasses.asdict(STATUS))
        self._selector = selectors.DefaultSelector()
        self._server.register(self._selector)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._end.is_set():
            for key, mask in self._selector.select(0.02):
                key.data(key, mask)

    def stop(self) -> None:
        self._end.set()
        self._thread.join()
        self._server.close()
        self._selector.close()


@pytest.fixture
def control(tmp_path: Path):
    path = tmp_path / "ksmd.sock"
    daemon = Daemon(path)
    yield path
    daemon.stop()


@contextlib.contextmanager
def serving(control: Path):
    """An exporter in this process; the address it serves."""
    listener = server.bind("127.0.0.1", 0)
    made = server.serve(listener, control)
    thread = threading.Thread(target=made.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/metrics"
    finally:
        made.shutdown()
        thread.join()
        made.server_close()


def scrape(address: str) -> dict[str, float]:
    with urllib.request.urlopen(address, timeout=20) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        lines = answer.read().decode().splitlines()
    found = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
    return {name: float(value) for name, value in found}


@pytest.mark.root
def test_the_counters_are_served_as_metrics(control: Path) -> None:
    with serving(control) as address:
        found = scrape(address)
    assert found["ksmd_user_up"] == 1
    assert found["ksmd_user_pages_sharing"] == 7
    assert found["ksmd_user_general_profit_bytes"] == -4096
    assert found["ksmd_user_cow_breaks_total"] == 3
    assert found["ksmd_user_stops_total"] == 12
    assert found["ksmd_user_stop_seconds_p99"] == 0.002
    assert found["ksmd_user_stop_seconds_max"] == 0.004
    assert found["ksmd_user_paused"] == 1
    assert found['ksmd_user_run{run="merge"}'] == 1
    assert found['ksmd_user_run{run="stop"}'] == 0
    assert found['ksmd_user_refusals{reason="stack"}'] == 5
    assert {f"ksmd_user_{told.metric}" for told in GAUGES} <= set(found)


@pytest.mark.root
def test_figures_of_targets_are_summed_by_entry_and_carry_no_pid(control: Path) -> None:
    with serving(control) as address:
        found = scrape(address)
    web, odd = 'domain="front",name="web"', 'domain="back",name="odd \\"name\\"\\\\"'
    assert found[f"ksmd_user_target_merging_pages{{{web}}}"] == 5
    assert found[f"ksmd_user_target_processes{{{web}}}"] == 2
    assert found[f"ksmd_user_target_refused{{{web}}}"] == 1
    assert found[f"ksmd_user_target_stop_seconds_max{{{web}}}"] == 0.004
    assert found[f"ksmd_user_target_merging_pages{{{odd}}}"] == 9
    assert not any("pid" in name for name in found)


def test_without_a_daemon_there_is_up_0_and_no_stale_figure(tmp_path: Path) -> None:
    with serving(tmp_path / "none") as address:
        found = scrape(address)
    assert found.pop("ksmd_user_up") == 0
    assert set(found) == {"ksmd_user_scrape_seconds"}


@pytest.mark.root
def test_a_caller_who_says_nothing_holds_up_nobody_else(control: Path) -> None:
    with serving(control) as address:
        port = int(address.split(":")[2].split("/")[0])
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(5)]
        assert scrape(address)["ksmd_user_up"] == 1
        for one in silent:
            one.close()


@pytest.mark.root
def test_it_serves_the_socket_that_it_inherits_and_ends_well_by_sigterm(control: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as made:
        port = made.getsockname()[1]
        script = 'exec 3<&"$1"; export LISTEN_FDS=1 LISTEN_PID=$$; exec "$2" exporter --socket "$3"'
        process = subprocess.Popen(
            ["bash", "-c", script, "bash", str(made.fileno()), str(KSMD), str(control)],
            pass_fds=[made.fileno()], stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    try:
        assert scrape(f"http://127.0.0.1:{port}/metrics")["ksmd_user_pages_sharing"] == 7
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        _, told = process.communicate()
    assert f"metrics at http://127.0.0.1:{port}/metrics" in told


@pytest.mark.parametrize("text", ["", "9929", "host:", ":80", "host:http", "host:70000"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        server.address(text)


def test_addresses_of_both_families_are_understood() -> None:
    assert server.address("127.0.0.1:9929") == ("127.0.0.1", 9929)
    assert server.address("[::1]:0") == ("::1", 0)
    with server.bind("127.0.0.1", 0) as taken, pytest.raises(KsmdError, match="cannot listen"):
        server.bind("127.0.0.1", taken.getsockname()[1])
