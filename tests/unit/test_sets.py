"""Columns as sets, against Python's own."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ksmd.core.sets import among, distinct

numbers = st.lists(st.integers(0, 40), max_size=60)


@given(numbers)
def test_distinct(some):
    assert distinct(np.array(some, np.uint64)).tolist() == sorted(set(some))


@given(numbers, numbers)
def test_among(some, wanted):
    found = among(np.array(some, np.uint32), np.array(wanted, np.uint32))
    assert found.tolist() == [one in wanted for one in some]


def test_the_daemon_loads_nothing_that_it_does_not_use():
    code = (
        "import sys, numpy as np, ksmd.cli.ksmd, ksmd.cli.run, ksmd.daemon.main\n"
        "from ksmd.core import sets\n"
        "sets.among(sets.distinct(np.arange(9)), np.arange(3))\n"
        "big = ('pydantic', 'rich', 'yaml', 'email', 'numpy.ma', 'importlib.metadata')\n"
        "print([name for name in big if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
