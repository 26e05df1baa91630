"""What can be asked and heard: why memory is merged or not, and the stream of what happens."""

from __future__ import annotations

import pytest
from harness import PAGE, mappings, target, until
from programs import NOBODY, Raw

pytestmark = pytest.mark.root


@pytest.fixture
def daemon(open_daemons):
    return open_daemons()


class Listener:
    """A connection that listens."""

    def __init__(self, raw: Raw) -> None:
        self._raw = raw
        self._events: list[dict] = []
        raw.send("Monitor", more=True)
        assert raw.receive() == {"events": []}

    def until(self, kind: str, pid: int) -> dict:
        """Listen until something happened to a process."""
        while True:
            for event in self._events:
                if (event["event"], event["pid"]) == (kind, pid):
                    self._events.remove(event)
                    return event
            self._events += self._raw.receive()["events"]

    @property
    def seen(self) -> list[dict]:
        return self._events


@pytest.fixture
def listener(daemon):
    return Listener(Raw.connect(daemon.socket))


def pair(daemon, puppets, pages=1024):
    two = [puppets(daemon.socket, pages=pages) for _ in range(2)]
    for puppet in two:
        puppet.register()
        puppet.share()
    return two


def test_merging_and_unmerging_are_told_with_their_pages(daemon, listener, puppets):
    one, other = pair(daemon, puppets)
    for puppet in (one, other):
        merged = 0
        while merged < 1024:
            event = listener.until("merged", puppet.pid)
            assert (event["name"], event["domain"]) == ("registered", f"uid:{NOBODY}")
            assert event["pages"] > 0
            merged += event["pages"]
        assert merged == 1024
    other.raw.call("RemoveMemoryRegion", sma=other.sma, wait=True)
    given_back = 0
    while given_back < 1024:
        given_back += listener.until("unmerged", other.pid)["pages"]
    assert given_back == 1024
    listener.until("target_gone", other.pid)
    assert [event["pid"] for event in listener.seen if event["event"] == "unmerged"] == []


def test_a_target_that_goes_is_told(daemon, listener, puppets):
    one, _ = pair(daemon, puppets, pages=64)
    one.kill()
    event = listener.until("target_gone", one.pid)
    assert (event["pages"], event["reason"]) == (0, "")


def test_a_refusal_is_told_with_its_sentence(daemon, listener, puppets):
    one, other = pair(daemon, puppets, pages=64)
    daemon.give_back("--pid", other.pid)
    event = listener.until("refused", other.pid)
    assert event["reason"] == "released"
    assert "resume" in event["sentence"]
    assert one.intact()


def test_a_storm_of_cow_breaks_is_told(daemon, listener, puppets):
    """GIVEN merged memory WHEN its program writes over half of it THEN that is news."""
    one, _ = pair(daemon, puppets)
    one.ask("write 0 512")
    daemon.scan()
    event = listener.until("cow_storm", one.pid)
    assert event["pages"] == 512


def test_a_user_hears_of_its_own_process_alone(daemon, puppets):
    one, other = pair(daemon, puppets, pages=64)
    mine = puppets(daemon.socket, pages=64)
    heard = Listener(mine.raw)
    other.raw.hang_up()
    other.kill()
    until(lambda: len(daemon.status()["targets"]) == 1, "the other is gone")
    # registered by root, as its own connection is busy with listening
    root = Raw.connect(daemon.socket)
    sma = root.call("CreateSharedMemoryArea")["sma"]
    root.call(
        "RegisterMemoryRegion", sma=sma, addr=mine.address, npages=64, pid=mine.pid,
        domain=f"uid:{NOBODY}",
    )  # fmt: skip
    root.call("Share", sma=sma)
    event = heard.until("merged", mine.pid)
    assert event["pages"] == 64
    assert {event["pid"] for event in heard.seen} <= {mine.pid}
    assert one.intact()


def test_no_event_says_what_is_on_a_page_or_where_it_lies(daemon, puppets):
    listener = Listener(Raw.connect(daemon.socket))
    one, other = pair(daemon, puppets, pages=64)
    seen = [listener.until("merged", puppet.pid) for puppet in (one, other)]
    fields = {"event", "time", "pid", "name", "domain", "pages", "reason", "sentence"}
    assert {frozenset(event) for event in seen} == {frozenset(fields)}
    places = {str(one.address), hex(one.address), str(one.address // PAGE)}
    assert not any(place in str(event) for event in seen for place in places)


def test_a_listener_must_take_more_than_one_reply(daemon, puppets):
    failure = puppets(daemon.socket).raw.failure("Monitor")
    assert failure.name == "ExpectedMore"


# -- Why -------------------------------------------------------------------------------------------


def test_why_tells_every_range_of_a_process_that_has_more_than_fit_into_a_message(
    daemons, actors, puppets
):
    """GIVEN 12,000 mappings WHEN ksmctl or another client asks THEN each range has its answer."""
    actor = actors(12_000)
    for page in range(0, 12_000, 2):
        assert actor.ask(f"readonly {page} 1")["errno"] == 0
    daemon = daemons({"version": 1, "targets": [target(actor, regions="anon")]})
    daemon.ctl("scan", "--wait")
    start, npages = actor.region
    end = start + npages * PAGE

    def inside(areas):
        return [area for area in areas if start <= area["start"] < end]

    areas = inside(daemon.ctl("why", actor.pid)["areas"])
    assert sorted({at for area in areas for at in range(area["start"], area["end"], PAGE)}) == list(
        range(start, end, PAGE)
    )
    assert {area["reason"] for area in areas} == {"", "not-writable"}
    writable = [area for area in areas if not area["reason"]]
    there = [(low, high) for low, high, perms, _ in mappings(actor.pid) if perms == "rw-p"]
    assert {(area["start"], area["end"]) for area in writable} <= set(there)
    assert len(writable) == 6_000
    root = Raw.connect(daemon.socket)
    first = root.call("Why", pid=actor.pid)
    assert first["areas"][-1]["start"] < first["next"]
    assert root.call("Why", pid=actor.pid, start=first["next"])["areas"]
    page = root.call("Why", pid=actor.pid, address=end - 1)
    assert ([area["end"] for area in page["areas"]], "next" in page) == ([end], False)
