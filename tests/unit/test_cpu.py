"""numpy is told before it comes what the processor is bad at."""

from __future__ import annotations

import pytest

from ksmd.kernel.cpu import VARIABLE, avoid_slow_sorts

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
    avoid_slow_sorts(environ, ZEN_4)
    assert "AVX512_ICL" in environ[VARIABLE].split()


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
def test_elsewhere_numpy_does_as_it_likes(cpuinfo: str) -> None:
    environ: dict[str, str] = {}
    avoid_slow_sorts(environ, cpuinfo)
    assert not environ


def test_what_the_operator_has_set_stays() -> None:
    environ = {VARIABLE: ""}
    avoid_slow_sorts(environ, ZEN_4)
    assert environ == {VARIABLE: ""}


def test_the_daemon_asks_the_processor_itself() -> None:
    environ: dict[str, str] = {}
    avoid_slow_sorts(environ)
    assert set(environ) <= {VARIABLE}
