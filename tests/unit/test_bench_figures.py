"""The benchmark's arithmetic: marks, medians, ratios, possible merge, CPU of what has ended."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest

from ksmd.bench import growth, promise, table
from ksmd.bench.census import possible
from ksmd.bench.clocks import ended_children
from ksmd.bench.compete import Outcome
from ksmd.bench.contender import OURS, THEIRS
from ksmd.bench.growth import Grown
from ksmd.bench.model import Costs, Point, Run, mark
from ksmd.bench.options import parse
from ksmd.bench.ours import FLAT_OUT, settings
from ksmd.bench.share import Latency
from ksmd.bench.share import show as show_latencies
from ksmd.bench.summary import middle, of_outcome, pause_numbers, percentile, ratio
from ksmd.bench.victims import parse_ranges
from ksmd.bench.workloads import WORKLOADS
from ksmd.cli.common import WIDTH, console
from ksmd.model.errors import UsageError
from ksmd.settings import Settings


def a_run(cpu: float = 1.0, saved: int = 99, possible_: int = 100) -> Run:
    timeline = (Point(0.0, 0.0, 0), Point(1.0, cpu / 2, 96), Point(2.0, cpu, saved))
    return Run(
        pages=1000,
        possible=possible_,
        timeline=timeline,
        passes=timeline[1:],
        end=timeline[-1],
        saved=saved,
        costs=Costs(vmas=600, page_tables=4096, tables=100, store=0, processes=5000, kernel=64),
        rescan_idle=0.01,
        rescan_written=0.02,
        written=10,
        read_before=100.0,
        read_after=110.0,
        write_ns=2000.0,
        huge_before=0,
        huge_after=0,
        intact=True,
        details={"stop_ms_p99": 1.5, "stop_ms_max": 2.5, "victims_cpu": 0.1},
    )


def test_a_mark_is_where_the_share_was_reached_for_good() -> None:
    points = [Point(float(i), 0.0, pages) for i, pages in enumerate((0, 96, 50, 95, 97, 100))]
    assert mark(points, 100, 0.95) == points[3]
    assert mark(points, 100, 1.0) == points[5]


def test_there_is_no_mark_for_what_was_never_reached_or_cannot_be() -> None:
    points = [Point(1.0, 1.0, 50)]
    assert mark(points, 100, 0.95) is None
    assert mark(points, 0, 0.95) is None


def test_net_takes_off_every_cost_and_counts_tables_inside_the_processes_once() -> None:
    run = a_run()
    assert run.net_bytes == 99 * 4096 - (600 + 4096 + 5000 + 64)
    assert Costs(tables=7000, processes=5000).total == 7000


def test_possible_is_all_but_one_of_each_content_and_all_of_zeros() -> None:
    sums = np.array([5, 5, 5, 7, 8, 8, 0, 0], np.uint64)
    assert possible(sums, zero=0) == 2 + 1 + 2
    assert possible(sums, zero=1) == 2 + 1 + 1
    assert possible(sums[:1], zero=5) == 1


def test_a_median_needs_most_runs() -> None:
    assert middle([3.0, 1.0, None]) == 2.0
    assert middle([3.0, None, None]) is None
    assert middle([]) is None


def test_a_ratio_needs_two_sides() -> None:
    assert ratio(1.0, 4.0) == 0.25
    assert ratio(1.0, 0.0) is None
    assert ratio(None, 1.0) is None
    assert ratio(1.0, None) is None


def test_percentiles_are_values_that_were_seen() -> None:
    values = list(range(1, 101))
    assert percentile(values, 0.5) == 50
    assert percentile(values, 0.99) == 99
    assert percentile([7], 0.99) == 7
    assert percentile([], 0.5) == 0.0
    told = pause_numbers([1_000_000, 3_000_000, 2_000_000])
    assert told == {"count": 3, "p50_ms": 2.0, "p99_ms": 3.0, "max_ms": 3.0}


def test_results_hold_medians_and_ratios_and_are_json() -> None:
    outcome = Outcome(WORKLOADS["W1"], {OURS: [a_run(1.0), a_run(3.0)], THEIRS: [a_run(4.0)]})
    outcome.pauses[OURS] = ([], [150_000])
    outcome.pauses[THEIRS] = ([], [])
    found = of_outcome(outcome)
    assert found[OURS]["median"]["cpu_99"] == 2.0
    assert found["ratios"]["cpu_99"] == 0.5
    assert found[OURS]["median"]["rescan_idle_ms_per_gib"] == pytest.approx(10 * 262144 / 1000)
    back = json.loads(json.dumps(found))
    assert back[THEIRS]["runs"][0]["end"] == {"seconds": 2.0, "cpu": 4.0, "pages": 99}
    assert back["ratios"] == found["ratios"]


def test_what_ksmd_did_alone_is_shown_without_a_rival() -> None:
    found = of_outcome(Outcome(WORKLOADS["W3"], {OURS: [a_run(possible_=0)]}))
    assert found[THEIRS] is None
    assert set(found["ratios"].values()) == {None}
    assert found[OURS]["median"]["saved_share"] is None


def test_tables_fit_in_a_hundred_columns(capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = [
        Outcome(workload, {OURS: [a_run(999.0)], THEIRS: [a_run(888.0)]})
        for workload in WORKLOADS.values()
    ]
    for outcome in outcomes:
        outcome.pauses = {OURS: ([], [99_000_000]), THEIRS: ([], [99_000_000])}
    out = console()
    for title, made in table.tables({"workloads": [of_outcome(outcome) for outcome in outcomes]}):
        out.print(title)
        out.print(made)
    text = capsys.readouterr().out
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= WIDTH
    assert all(text.count(f"{name} ") >= 5 for name in WORKLOADS)


def test_cpu_of_ended_children_is_read_past_any_name() -> None:
    fields = ["S", *map(str, range(4, 60))]
    assert ended_children(f"12 (a) b (c) {' '.join(fields)}\n") == pytest.approx((16 + 17) / 100)


def test_ranges_are_read_as_workers_say_them() -> None:
    first, second = parse_ranges("0x1000:16,0x9000:2")
    assert (first.start, first.npages, second.start, second.npages) == (4096, 16, 36864, 2)


def test_the_daemon_is_given_settings_that_it_accepts() -> None:
    class One:
        pid = 4711
        ranges = parse_ranges("0x7f0000000000:16")
        npages = 16

    given = settings([One()], FLAT_OUT)  # type: ignore[list-item]
    found = Settings.model_validate(given)
    assert found.scan.sleep_millisecs == 0
    assert found.targets[0].match.pid == (4711,)
    assert found.resolved_tables(1 << 30).rmap_hash_size == 1024
    nobody = Settings.model_validate(settings([], FLAT_OUT))
    assert nobody.resolved_tables(1 << 30) == Settings(version=1).resolved_tables(1 << 30)


def test_options_choose_workloads_and_refuse_what_means_nothing() -> None:
    options = parse(["--only", "w2,W1,W2", "--mib", "2", "--victims", "3"])
    assert [workload.name for workload in options.workloads] == ["W2", "W1"]
    assert (options.pages, options.ksm, options.json) == (512, True, False)
    assert len(parse([]).workloads) == 7
    with pytest.raises(UsageError, match="nobody to share"):
        parse(["--victims", "1"])


@pytest.mark.parametrize("wrong", [["--only", "W9"], ["--mib", "0"], ["--rounds", "-1"]])
def test_a_wrong_option_is_refused_by_the_command_line(wrong: list[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse(wrong)
    assert left.value.code == 2


def test_share_measures_three_sizes_unless_it_is_told_others() -> None:
    assert parse([]).share == ()
    assert parse(["--share"]).share == (1, 64, 1024)
    assert parse(["--share", "2, 8"]).share == (2, 8)
    for wrong in ("0", "-1", "x", "1,,2", ""):
        with pytest.raises(SystemExit):
            parse(["--share", wrong])


def test_the_table_of_latencies_has_a_line_for_each_size() -> None:
    found = [
        Latency(1, 255, (30.0, 10.0, 20.0), (255, 255, 255)),
        Latency(1024, 262_144, (4000.0,), (131_072,)),
    ]
    assert found[0].as_dict()["median_ms"] == 20.0
    out = console(io.StringIO())
    out.print(show_latencies(found)[1])
    lines = [line.split() for line in out.file.getvalue().splitlines()]
    assert lines[1] == ["1", "20.0", "30.0", "10.0", "30.0", "50", "100.0%"]
    assert lines[2] == ["1024", "4000.0", "4000.0", "4000.0", "4000.0", "256", "50.0%"]


def test_the_busiest_stretch_is_found_wherever_it_lies() -> None:
    rates = [0.0] * 50 + [0.5] * 100 + [0.1] * 100  # of one core, in steps of 0.1 s
    samples, used = [(100.0, 7.0)], 7.0
    for number, rate in enumerate(rates, 1):
        used += rate * 0.1
        samples.append((100.0 + number * 0.1, used))
    assert promise.most_over(samples, 10) == pytest.approx(50, abs=0.6)
    assert promise.most_over(samples, 25) == pytest.approx(24, abs=0.3)
    assert promise.most_over(samples, 5) == pytest.approx(50, abs=0.1)
    assert promise.most_over(samples[:20], 10) == 0


def test_a_promise_is_shown_beside_what_was_used() -> None:
    title, made = promise.show([promise.Kept(20, 18.4, 9.5, 84.0)])
    assert "cpu_percent" in title
    (row,) = zip(*(column.cells for column in made.columns), strict=True)
    assert row == ("20", "18.40", "0.92", "9.50", "84")


def test_growth_compares_every_size_with_the_first() -> None:
    sizes = [Grown(32, 8, 65536, 4.0, 1.0, 4.0), Grown(128, 8, 262144, 5.0, 0.9, 4.25)]
    ((title, made),) = growth.tables({"memory": sizes})
    assert "memory" in title
    columns = [list(column.cells) for column in made.columns]
    assert columns == [
        ["8", "8"], ["32", "128"], ["0.25", "1.00"], ["4.00", "5.00"], ["1.00", "1.25"],
        ["1.00", "0.90"], ["1.00", "0.90"], ["4.0", "4.2"],
    ]  # fmt: skip
    (told,) = growth.as_dict({"memory": sizes[1:]})["memory"]
    assert (told["pages"], told["merge_us"], told["table_bytes"]) == (262144, 5.0, 4.25)
