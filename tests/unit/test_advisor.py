"""The advisor reaches its scan time, keeps its limits, and hurries for new targets for a while."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksmd.core.advisor import Advisor

PAGE_SECS = 1e-6
SLEEP = 0.02


def scans(
    advisor: Advisor, pages: int, count: int, *, scan_secs: float = 200.0, max_cpu: int = 70,
    most: int = 10**6, page_secs: float = PAGE_SECS,
) -> list[tuple[float, float]]:  # fmt: skip
    """Seconds that each scan takes, and its share of one core."""
    found = []
    for _ in range(count):
        advisor.targets({1, 2})
        batch = advisor.pages(
            scan_secs=scan_secs, sleep_secs=SLEEP, max_cpu=max_cpu, least=500, most=most
        )
        busy = pages * page_secs
        took = busy + -(-pages // batch) * SLEEP
        found.append((took, busy / took))
        advisor.learn(pages, busy)
    return found


@pytest.mark.parametrize("scan_secs", [30.0, 200.0, 600.0])
def test_a_full_scan_takes_the_time_that_is_wanted(scan_secs: float) -> None:
    pages = 16 << 20  # 64 GiB
    settled = scans(Advisor(), pages, 12, scan_secs=scan_secs)[6:]
    assert all(took == pytest.approx(scan_secs, rel=0.05) for took, _ in settled)


def test_a_new_target_is_scanned_faster_and_that_wears_off() -> None:
    advisor = Advisor()
    took = [seconds for seconds, _ in scans(advisor, 16 << 20, 8)]
    # the first scan knows nothing and takes the most pages; then the burst halves
    assert took[0] < took[1] < took[2] < took[3]
    assert took[3:] == pytest.approx([200.0] * 5, rel=0.05)
    advisor.targets({1, 2, 3})
    batch = {"sleep_secs": SLEEP, "max_cpu": 70, "least": 500, "most": 10**6}
    hurried = advisor.pages(scan_secs=200.0, **batch)
    for _ in range(5):
        advisor.targets({1, 2, 3})
    assert hurried > 4 * advisor.pages(scan_secs=200.0, **batch)


def test_more_memory_than_the_processor_can_read_in_that_time_takes_longer() -> None:
    settled = scans(Advisor(), 400 << 20, 8, max_cpu=50)[4:]
    assert all(share <= 0.51 for _, share in settled)
    assert all(took > 400 for took, _ in settled)


@given(
    st.lists(st.tuples(st.integers(0, 1 << 40), st.floats(0, 1e6)), max_size=5),
    st.floats(0.1, 1e5),
    st.floats(0, 10),
    st.integers(1, 100),
)
def test_whatever_was_measured_the_limits_hold(
    history: list[tuple[int, float]], scan_secs: float, sleep_secs: float, max_cpu: int
) -> None:
    advisor = Advisor()
    for pages, seconds in history:
        advisor.targets({1})
        advisor.learn(pages, seconds)
    batch = advisor.pages(
        scan_secs=scan_secs, sleep_secs=sleep_secs, max_cpu=max_cpu, least=500, most=30000
    )
    assert 500 <= batch <= 30000
