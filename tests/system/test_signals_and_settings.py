"""Signals, pause and resume, and settings that change under a running daemon."""

from __future__ import annotations

import signal

import pytest
from harness import Oracle, mappings, settings_for, store_mappings, target, until

pytestmark = pytest.mark.root


@pytest.fixture
def pair(victims):
    return [victims(pages=512) for _ in range(2)]


def check_all(victims) -> None:
    for victim in victims:
        assert victim.check(), victim.report()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_it_gives_every_page_back_and_exits_well(pair, daemons, number):
    oracle = Oracle(*pair)
    daemon = daemons(settings_for(*pair))
    daemon.scan()
    assert oracle.share() == 1
    assert daemon.stop(number) == 0
    assert oracle.saved() == 0
    assert [store_mappings(victim.pid) for victim in pair] == [[], []]
    assert not daemon.socket.exists()
    assert "Traceback" not in daemon.log()
    check_all(pair)


def test_told_to_stop_during_a_scan_it_gives_back_what_was_merged_so_far(victims, daemons):
    many = [victims(pages=2048, layout="runs:short") for _ in range(3)]
    daemon = daemons(settings_for(*many))
    daemon.ctl("scan", "--until-settled")  # does not wait
    until(lambda: any(store_mappings(victim.pid) for victim in many), "it began to merge")
    assert daemon.stop() == 0
    assert [store_mappings(victim.pid) for victim in many] == [[], [], []]
    check_all(many)


def test_with_on_stop_keep_merged_memory_stays_merged_and_guarded(pair, daemons):
    oracle = Oracle(*pair)
    daemon = daemons(settings_for(*pair, on_stop="keep"))
    daemon.scan()
    assert daemon.stop() == 0
    assert oracle.share() == 1
    assert pair[0].ask("dontneed 10 100") == {"bad": 0}
    pair[0].command("write 300 5")
    assert pair[1].ask("fork") == {"child": 0, "bad": 0}
    check_all(pair)


def test_a_bad_file_at_sighup_keeps_the_old_settings_and_says_why(pair, daemons):
    daemon = daemons(settings_for(*pair))
    daemon.configure("version: 1\nscan: {pages_to_scan: 0}\n")
    daemon.send(signal.SIGHUP)
    daemon.await_log("the old settings stay")
    assert f"{daemon.config}:2:23: scan.pages_to_scan" in daemon.log()
    daemon.scan()
    assert {line["pid"] for line in daemon.status()["targets"]} == {v.pid for v in pair}
    assert Oracle(*pair).share() == 1
    daemon.config.unlink()
    daemon.send(signal.SIGHUP)
    daemon.await_log("does not exist")
    assert Oracle(*pair).share() == 1


def test_a_good_file_at_sighup_takes_effect(victims, pair, daemons):
    more = [victims(pages=512, seed=9) for _ in range(2)]
    daemon = daemons(settings_for(*pair))
    daemon.scan()
    assert Oracle(*more).saved() == 0
    daemon.configure(settings_for(*pair, *more))
    daemon.send(signal.SIGHUP)
    daemon.await_log("settings read again")
    daemon.scan()
    assert Oracle(*more).share() == 1
    daemon.configure(settings_for(*pair, *more, run="unmerge"))
    daemon.send(signal.SIGHUP)
    until(lambda: not any(store_mappings(v.pid) for v in (*pair, *more)), "all is given back")
    assert daemon.status()["run"] == "unmerge"
    check_all([*pair, *more])


def test_with_run_stop_an_asked_scan_merges_nothing(pair, daemons):
    daemon = daemons(settings_for(*pair, run="stop"))
    daemon.scan()
    assert Oracle(*pair).saved() == 0
    assert daemon.status()["run"] == "stop"


def test_a_target_taken_out_of_the_settings_is_not_forgotten_while_it_is_merged(pair, daemons):
    oracle = Oracle(*pair)
    daemon = daemons(settings_for(*pair))
    daemon.scan()
    daemon.configure({"version": 1})
    daemon.send(signal.SIGHUP)
    daemon.await_log("settings read again")
    daemon.scan()
    assert oracle.share() == 1
    assert pair[0].ask("dontneed 3 3") == {"bad": 0}
    assert daemon.stop() == 0
    assert [store_mappings(victim.pid) for victim in pair] == [[], []]
    check_all(pair)


def test_usr1_scans_and_merges_now(pair, daemons):
    daemon = daemons(settings_for(*pair))
    before = daemon.status()["full_scans"]
    daemon.send(signal.SIGUSR1)
    oracle = Oracle(*pair)
    until(lambda: oracle.share() == 1, "what SIGUSR1 asked for")
    until(lambda: daemon.status()["full_scans"] >= before + 2, "its scans are counted")
    check_all(pair)


def test_usr2_writes_the_status_to_the_log(pair, daemons):
    daemon = daemons(settings_for(*pair))
    daemon.scan()
    daemon.send(signal.SIGUSR2)
    daemon.await_log("512 pages shared")
    for victim in pair:
        daemon.await_log(f"'pid': {victim.pid}")


def test_it_merges_by_itself_without_being_asked(pair, daemons):
    oracle = Oracle(*pair)
    settings = settings_for(*pair, window={"interval_secs": 0})
    daemon = daemons(settings, paused=False)
    until(lambda: oracle.share() == 1, "the background scan merges")
    check_all(pair)
    assert daemon.stop() == 0


def test_paused_it_merges_only_what_is_asked_for_until_it_is_resumed(pair, victims, daemons):
    oracle = Oracle(*pair)
    daemon = daemons(settings_for(*pair, window={"interval_secs": 0}))
    assert daemon.status()["paused"]
    scans = daemon.status()["full_scans"]
    assert oracle.saved() == 0
    daemon.ctl("resume")
    assert not daemon.status()["paused"]
    until(lambda: oracle.share() == 1, "the background scan merges")
    daemon.ctl("pause")
    assert daemon.status()["full_scans"] > scans
    assert oracle.share() == 1  # what is merged stays so
    daemon.scan()
    assert daemon.status()["paused"]


def test_what_was_given_back_by_request_is_not_merged_again_behind_ones_back(pair, daemons):
    oracle = Oracle(*pair)
    daemon = daemons(settings_for(*pair, window={"interval_secs": 0}), paused=False)
    daemon.scan()
    assert daemon.give_back()["pages"] == 1024
    assert daemon.status()["paused"]
    assert oracle.saved() == 0
    daemon.ctl("resume")
    until(lambda: oracle.share() == 1, "the background scan merges")


def test_a_single_target_that_was_given_back_stays_so_until_resume(pair, daemons):
    oracle = Oracle(*pair)
    daemon = daemons(settings_for(*pair))
    daemon.scan()
    daemon.give_back("--pid", pair[0].pid)
    daemon.scan()
    daemon.scan()
    assert store_mappings(pair[0].pid) == []
    assert daemon.status_of(pair[0])["refused"] == "released"
    daemon.allow_again()
    daemon.scan()
    assert daemon.status_of(pair[0])["refused"] == ""
    assert oracle.share() == 1


def test_tables_of_a_given_size_bind_and_what_does_not_fit_is_counted(victims, daemons):
    pair = [victims(pages=2048, layout="unique") for _ in range(2)]
    tables = {"page_hash_size": 4096, "rmap_hash_size": 1024, "sha1_hash_size": 64}
    daemon = daemons(settings_for(*pair, tables=tables))
    held = []
    while len(held) < 2 or (not any(held) and len(held) < 8):
        daemon.scan()
        status = daemon.status()
        assert status["refusals"]["table-full"] >= 4096 - 1024
        held.append(status["pages_unshared"])
    # which part had its turn last is chance, and of so few long stretches a part may get none
    assert 0 < max(held) <= 1024
    check_all(pair)


@pytest.mark.parametrize("layout", ["runs:long", "singles"])
def test_memory_that_does_not_fit_into_the_tables_is_merged_in_turns(victims, daemons, layout):
    pair = [victims(pages=4096, layout=layout) for _ in range(2)]
    oracle = Oracle(*pair)
    daemon = daemons(settings_for(*pair, tables={"page_hash_size": 1500, "rmap_hash_size": 1500}))
    daemon.scan()
    assert oracle.share() == 1
    check_all(pair)


def test_so_it_is_by_a_daemon_that_nobody_asks(victims, daemons):
    pair = [victims(pages=4096, layout="runs:long") for _ in range(2)]
    oracle = Oracle(*pair)
    settings = settings_for(*pair, tables={"page_hash_size": 3000, "rmap_hash_size": 3000})
    settings["scan"] = {"pages_to_scan": 100_000, "sleep_millisecs": 0}
    settings["window"] = {"interval_secs": 0}
    daemon = daemons(settings)
    daemon.ctl("resume")
    # a pass a second, two for each of four parts, in up to three scales
    until(lambda: oracle.share() == 1, "every part had its turn", patience=120)
    check_all(pair)


def test_domains_with_odd_names_are_kept_apart(victims, daemons):
    four = [victims(pages=64) for _ in range(4)]
    names = ["a", "a.b", "a_b", "a-b"]
    oracle = Oracle(*four)
    daemon = daemons(
        {"version": 1, "targets": [target(v, domain=n) for v, n in zip(four, names, strict=True)]}
    )
    daemon.scan()
    assert oracle.saved() == 0
    assert not [path for v in four for *_, path in mappings(v.pid) if "memfd:ksmd" in path]
