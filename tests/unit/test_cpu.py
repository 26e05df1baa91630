"""numpy is told before it comes what suits this machine."""

from __future__ import annotations

import pytest

from ksmd.kernel.cpu import FEATURES, HUGE_PAGES, suit_numpy

ZEN_4 = """\
processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 17
flags\t\t: fpu avx2 avx512f avx512_vbmi2

processor\t: 1
"""


def test_wide_sorts_are_left_out_where_they_are_slow() -> None:
    environ: dict[str, str] = {}
    suit_numpy(environ, ZEN_4)
    assert "AVX512_ICL" in environ[FEATURES].split()


@pytest.mark.parametrize(
    "cpuinfo",
    [
        ZEN_4.replace(" avx512f", ""),  # Zen 3: numpy would complain of what is not there
        ZEN_4.replace("25", "26"),
        ZEN_4.replace("AuthenticAMD", "GenuineIntel"),
        "processor\t: 0\nBogoMIPS\t: 50.00\n",
        "",
    ],
)
def test_elsewhere_numpy_sorts_as_it_likes(cpuinfo: str) -> None:
    environ: dict[str, str] = {}
    suit_numpy(environ, cpuinfo)
    assert FEATURES not in environ


def test_what_the_operator_has_set_stays() -> None:
    environ = {FEATURES: "", HUGE_PAGES: "1"}
    suit_numpy(environ, ZEN_4)
    assert environ == {FEATURES: "", HUGE_PAGES: "1"}


def test_the_daemon_asks_the_processor_itself() -> None:
    environ: dict[str, str] = {}
    suit_numpy(environ)
    assert set(environ) <= {FEATURES, HUGE_PAGES}


def test_arrays_that_live_for_milliseconds_get_no_huge_pages() -> None:
    environ: dict[str, str] = {}
    suit_numpy(environ, "")
    assert environ == {HUGE_PAGES: "0"}
