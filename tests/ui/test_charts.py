"""Charts: what is drawn is what was measured, and the table says the same."""

from __future__ import annotations

import csv
import json
import re
import urllib.parse

import pytest
from pydantic import JsonValue

from engine.records import Measurement
from tests.ui import fakes
from ui import charts, live, views
from ui.live import Series
from ui.spread import spread
from ui.wording import Measured


def runs() -> list[tuple[str, Measured]]:
    makes = [("original", 1.0, 0.0), ("4 bit", 3.2, 0.1), ("bad", 1.0, 2.0)]
    return [(label, {m.name: m for m in fakes.measured(shrink, worse)}) for label, shrink, worse in makes]


def test_the_front_holds_what_nothing_beats() -> None:
    points = [(5.0, 4.0), (1.0, 4.2), (5.0, 6.0), (1.0, 4.2), (0.5, 9.0)]
    assert charts.front(points, higher=False) == [0, 1, 3, 4]
    assert charts.front([(1.0, 0.9), (1.0, 0.8), (2.0, 0.95)], higher=True) == [0, 2]


def test_the_pareto_chart_draws_points_and_intervals() -> None:
    chart = charts.pareto(runs())
    assert chart.figure is not None
    drawn = json.loads(chart.figure.to_json())["data"]
    points = [trace for trace in drawn if trace.get("mode") == "markers+text"]
    assert [trace["text"][0] for trace in points] == ["original", "4 bit", "bad"]
    assert points[0]["x"][0] == pytest.approx(5_400_000 / 2**20)
    assert points[1]["y"][0] == pytest.approx(4.3)
    assert points[1]["error_y"]["array"][0] == pytest.approx(1.96 * 0.06)
    assert [row[-1] for row in chart.rows] == ["yes", "yes", "no"]


def test_many_runs_are_named_by_the_legend_not_one_over_another() -> None:
    chart = charts.pareto([(f"run {i}", m) for i in range(5) for _, m in runs()[:1]])
    assert chart.figure is not None
    drawn = [trace for trace in json.loads(chart.figure.to_json())["data"] if trace.get("mode") == "markers"]
    assert [trace["name"] for trace in drawn if trace["showlegend"]] == [f"run {i}" for i in range(5)]


def test_a_charts_numbers_can_be_taken_away_and_run_no_formula() -> None:
    html = charts.memory([("=cmd()", runs()[0][1])]).table()
    content = urllib.parse.unquote(re.findall(r'href="data:text/csv;charset=utf-8,([^"]+)"', html)[0])
    header, row = csv.reader(content.splitlines())
    assert header == ["Run", "Size on disk", "Memory, loaded", "Memory, peak"]
    assert row == ["'=cmd()", "5.15 MiB", "12.4 MiB", "19.1 MiB"]


def test_shares_are_drawn_in_per_cent() -> None:
    chart = charts.pareto(runs(), quality="accuracy")
    assert chart.figure is not None
    points = [trace for trace in json.loads(chart.figure.to_json())["data"] if trace.get("mode") == "markers+text"]
    assert points[0]["y"][0] == pytest.approx(94.0)


@pytest.mark.parametrize("draw", [charts.accuracy, charts.latency, charts.memory, charts.pareto])
def test_each_chart_has_its_numbers_as_a_table_and_stands_empty_without(draw: object) -> None:
    assert callable(draw)
    chart = draw(runs())
    assert chart.figure is not None
    assert "<table>" in chart.table()
    assert "original" in chart.table()
    assert draw([]).figure is None
    assert draw([]).table() == ""


def test_latency_shows_the_percentiles_that_were_measured() -> None:
    largest = "5.00 ms (largest of 155)"
    rows = charts.latency(runs()[:1]).rows
    assert rows[1] == ("original", "Time per token", "2.00 ms", "2.60 ms", "4.00 ms", largest, "dense bfloat16")


def test_few_values_have_a_largest_and_no_percentile() -> None:
    chart = charts.latency(runs()[:1])
    assert chart.rows[0][2:6] == ("6.00 ms", "–", "–", "11.0 ms (largest of 5)")
    assert chart.figure is not None
    first, each = json.loads(chart.figure.to_json())["data"]
    assert (first["x"], first["customdata"]) == ([6.0, 11.0], ["p50", "largest of 5"])
    assert each["customdata"] == ["p50", "p95", "p99"]


@pytest.mark.parametrize(
    ("details", "told"),
    [
        ({"count": 100, "largest": 9.0}, {"p95": 2.0, "p99": 3.0}),
        ({"count": 99, "largest": 9.0}, {"p95": 2.0, "largest": 9.0}),
        ({"count": 20, "largest": 9.0}, {"p95": 2.0, "largest": 9.0}),
        ({"count": 19, "largest": 9.0}, {"largest": 9.0}),
        ({"count": 1, "largest": 1.0}, {}),
        ({"repetitions": 2, "new_tokens": 32}, {"p95": 2.0}),  # the second largest of 62 was kept, not the largest
        ({"repetitions": 5, "new_tokens": 9}, {"p95": 2.0, "largest": 3.0}),
        ({}, {}),
    ],
)
def test_a_percentile_needs_a_value_beyond_it(details: dict[str, JsonValue], told: dict[str, float]) -> None:
    known: dict[str, JsonValue] = {"p50": 1.0, "p95": 2.0, "p99": 3.0}
    assert spread(Measurement(name="latency.tpot", value=1.0, unit="s", details=known | details)).tail == told


def test_latency_says_which_kernels_computed() -> None:
    chart = charts.latency(runs())
    assert (chart.headers[-1], [row[-1] for row in chart.rows[2:4]]) == ("Kernels", ["int4pack", "int4pack"])
    assert chart.figure is not None
    drawn = json.loads(chart.figure.to_json())["data"]
    assert [trace["text"][0] for trace in drawn[:3]] == ["dense bfloat16", "dense bfloat16", "int4pack"]
    assert all("%{text}" in trace["hovertemplate"] for trace in drawn)


def test_no_chart_asks_another_host_or_webgl() -> None:
    for chart in (charts.pareto(runs()), charts.accuracy(runs()), charts.latency(runs()), charts.memory(runs())):
        assert chart.figure is not None
        text = chart.figure.to_json()
        assert "http" not in text
        assert "scattergl" not in text


def test_thinning_keeps_the_peak_and_the_end() -> None:
    points = [(float(i), 1.0) for i in range(5000)]
    points[2345] = (2345.0, 99.0)
    thinned = live.thin(points, 100)
    assert len(thinned) == 100
    assert (2345.0, 99.0) in thinned
    assert thinned[-1] == points[-1]


def test_live_lines_stay_inside_the_drawing() -> None:
    series = Series("memory.resident", "B", ((10.0, 1e8), (11.0, 4e8), (14.0, 2e8)))
    expected = live.Expected(peak=5e8, done=18.0)
    html = live.lines(series, [(9.0, "loading"), (11.0, "GPTQ")], expected)
    pairs = [pair.split(",") for pair in html.split('points="')[1].split('"')[0].split()]
    assert all(0 <= float(x) <= live.WIDTH and 0 <= float(y) <= live.HEIGHT for x, y in pairs)
    assert float(pairs[-1][0]) == live.WIDTH / 2  # the run ended half way to when it was expected to
    assert "peak 381 MiB" in html
    assert html.count('class="limit"') == 2
    assert "Dashed: what was expected, 477 MiB at most and done after 8.0 s." in html
    assert [float(w) for w in re.findall(r"width:([\d.]+)%", html)] == [12.5, 37.5]  # names as wide as their bands
    late = live.lines(series, [(11.0, "loading")])
    assert re.findall(r'width:([\d.]+)%" title="(\w+)"', late) == [("25.00", "Starting"), ("75.00", "loading")]


def test_one_point_and_no_point_draw() -> None:
    assert live.lines(Series("loss", "nat", ())) == ""
    assert "polyline" in live.lines(Series("loss", "nat", ((1.0, 0.0),)))
    assert "polyline" in live.sparkline([5.0], "CPU")


def test_the_strip_names_a_missing_gpu_and_hides_whose_run_it_is() -> None:
    status: views.Machine = {"cpu": 3.0, "ram_used": 1, "ram_total": 2, "gpu": None, "engine": 3, "running": "secret99"}
    html = views.strip(status, {}, None)
    assert "no GPU" in html
    assert "secret99" not in html
    assert "Another visitor" in html
