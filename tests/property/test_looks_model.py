"""Looks and runs in any order: what counts as looked at was looked at after the last run."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from ksmd.core import looks

#: Milliseconds that pass, and what happens then: the process runs, a scan asks whether it has run
#: (as it does at its beginning), or a block is looked at.
EVENTS = st.lists(
    st.tuples(st.sampled_from([1, 200, 1100]), st.sampled_from(["runs", "asks", "looks"])),
    min_size=30,
    max_size=60,
)


@given(EVENTS)
@settings(max_examples=200)
def test_no_look_before_a_run_counts_after_it(events):
    clock = last_run = since = 0
    known = True  # whether the last scan that asked knew of all runs
    looked: list[tuple[int, int]] = []  # milliseconds, and the second that it counts as
    for passed, what in events:
        clock += passed
        now = clock // 1000
        if what == "runs":
            last_run, known = clock, False
        elif what == "looks":
            looked.append((clock, looks.second_of(since, now)))
        elif not known:
            since, known = looks.since_it_ran(since, now), True
        if known:
            wrong = [at for at, second in looked if second >= since and at < last_run]
            assert not wrong
        assert all(second <= clock // 1000 + looks.AHEAD for _, second in looked)


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_what_is_looked_at_in_the_same_scan_counts_where_the_clock_is_not_far_behind(before, now):
    since = looks.since_it_ran(min(before, now), now)
    assert looks.second_of(since, now) == since
    assert looks.second_of(since, now + 5) == now + 5
