"""The differential pair: a random program gives the same results whether it is merged or not.

What program.c does is a pure function of its seed. Two twins are merged with each other and given
back, over and over, while they run; two more are left alone. After every few hundred operations all
four must agree on every result so far (values, errors, faults, signals) and on every page.

KSMD_SOAK_SECONDS makes it a night's work: fresh seeds, each printed, for so many seconds.
KSMD_SEED runs one seed alone.
"""

from __future__ import annotations

import os
import random
import secrets
import time

import pytest
from differential import Pair
from stirring import Figures, Stirrer

pytestmark = [pytest.mark.root, pytest.mark.slow]

SEEDS = (1, 2, 3)
OPERATIONS = 300  # between two comparisons
SECONDS, SOAK_SEED_SECONDS = 18.0, 60.0  # for each seed
NIGHT_SECONDS = float(os.environ.get("KSMD_SOAK_SECONDS", "0"))
#: What a run must do at least to prove anything: a tenth of what it does on two busy cores.
LEAST_MERGED, LEAST_UNMERGED, LEAST_WINDOWS = 2000, 500, 20


def compare(seed: int, seconds: float, directory, daemons) -> Figures:
    """Run the twins of one seed for so long."""
    pair = Pair(directory, seed, daemons)
    try:
        stirrer = Stirrer(pair.daemon, lambda: pair.merged_pids, seed)
        deadline = time.monotonic() + seconds
        operations, how_many = 0, random.Random(seed)
        try:
            while time.monotonic() < deadline and stirrer.error is None:
                for _ in range(how_many.randint(1, 4)):
                    pair.run(OPERATIONS)
                    operations += OPERATIONS
                stirrer.await_scan()
        finally:
            figures = stirrer.stop()
        figures.operations = operations
        assert pair.daemon.stop() == 0, pair.daemon.log()
        pair.run(OPERATIONS)
        print(f"seed {seed}: {figures}")
        return figures
    finally:
        pair.close()


def judge(figures: Figures) -> None:
    assert figures.merged >= LEAST_MERGED, figures
    assert figures.unmerged >= LEAST_UNMERGED, figures
    assert figures.windows >= LEAST_WINDOWS, figures


def runs() -> list[int | None]:
    """Seeds to run for SECONDS each; None stands for a whole night."""
    if NIGHT_SECONDS:
        return [None]
    if "KSMD_SEED" in os.environ:
        return [int(os.environ["KSMD_SEED"])]
    return [*SEEDS, secrets.randbits(32)]


def all_night(tmp_path, daemons) -> Figures:
    """One fresh seed after the other."""
    deadline = time.monotonic() + NIGHT_SECONDS
    total = Figures()
    while time.monotonic() < deadline:
        seed = secrets.randbits(32)
        print(f"seed {seed}", flush=True)
        directory = tmp_path / str(seed)
        directory.mkdir()
        total.add(compare(seed, SOAK_SEED_SECONDS, directory, daemons))
    print(f"in all: {total}")
    return total


@pytest.mark.slow
@pytest.mark.timeout(600 + NIGHT_SECONDS)
@pytest.mark.parametrize("seed", runs())
def test_merged_and_unmerged_twins_agree_on_every_result_and_every_page(seed, tmp_path, daemons):
    judge(compare(seed, SECONDS, tmp_path, daemons) if seed is not None
          else all_night(tmp_path, daemons))  # fmt: skip
