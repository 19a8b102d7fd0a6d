"""The k-bit scaling picture: which runs belong together, what each stores in all, and a line a method."""

from __future__ import annotations

import json
from typing import cast

import pytest

from engine.errors import BadParams
from engine.modes import Mode
from engine.records import Measurement, Recipe, Run, Status
from engine.scheduler import Scheduler
from tests.ui import fakes
from tests.ui.conftest import ANNA
from tests.ui.fakes import FakeScheduler
from ui import scaling
from ui.desk import Desk, Entry
from ui.pages import scaling as page

LLAMA = {"architecture": "llama", "vocabulary": "0123456789ab"}


def entry(
    key: str, bits: float, parameters: float, accuracy: float = 0.9, *steps: object, model: str = "demo",
    family: dict[str, str] | None = LLAMA, **others: float,
) -> Entry:  # fmt: skip
    recipe = Recipe.model_validate({"model": model, "steps": list(steps)})
    found = [
        Measurement(name="size.bits_per_weight", value=bits, unit="bit"),
        Measurement(name="size.parameters", value=parameters, unit="1", details=dict(family or {})),
        Measurement(name="accuracy", value=accuracy, error=0.01, unit="1", higher_is_better=True),
        *(Measurement(name=name, value=value, unit="1", higher_is_better=False) for name, value in others.items()),
    ]
    run = Run(id=key, recipe=recipe, status=Status.SUCCEEDED, created=1.0)
    return Entry(key, f"{recipe.title()} {key}", run, {m.name: m for m in found})


def test_a_family_has_one_architecture_and_one_vocabulary_whatever_its_folders_are_called() -> None:
    small = entry("small000", 16, 1e6, model="/models/small")
    large = entry("large000", 16, 4e6, model="/models/large")
    old = entry("old00000", 4, 4e6, model="/models/large", family=None)  # measured before families were recorded
    other = entry("other000", 16, 1e6, model="/models/other", family=LLAMA | {"vocabulary": "ffffffffffff"})
    unknown = entry("unknown0", 16, 1e6, model="/models/unknown", family=None)
    found = scaling.families([old, small, other, large, unknown])
    assert {name: [each.key for each in some] for name, some in found.items()} == {
        "llama, vocabulary 0123456789ab": ["old00000", "small000", "large000"],
        "llama, vocabulary ffffffffffff": ["other000"],
        "unknown": ["unknown0"],
    }


@pytest.mark.parametrize(
    ("steps", "line"),
    [
        ([], "original"),
        (["quantize/gptq"], "GPTQ 4 bit"),
        ([{"quantize/gptq": {"bits": 3, "group_size": 32}}], "GPTQ 3 bit"),
        (["quantize/bitsandbytes"], "bitsandbytes nf4"),
        ([{"quantize/mixed": {"budget": 3.25}}], "Mixed 3.25 bit"),
        ([{"quantize/mixed": {"budget": 40, "unit": "mib"}}], "Mixed 40 MiB"),
        ([{"prune/wanda": {"pattern": "2:4"}}, "quantize/rtn"], "Wanda 2:4 → RTN 4 bit"),
        (["quantize/no_more"], "No_more"),
    ],
)
def test_a_line_is_named_by_methods_and_bits_also_where_these_are_defaults(steps: list[object], line: str) -> None:
    assert scaling.line(Recipe.model_validate({"steps": steps})) == line


def test_the_picture_draws_all_stored_bits_against_quality_a_line_a_method() -> None:
    gptq = {"quantize/gptq": {"bits": 4}}
    some = [
        entry("a0000000", 16, 2**20, 0.8), entry("b0000000", 16, 2**22, 0.9, model="/large"),
        entry("c0000000", 4.5, 2**22, 0.88, gptq, model="/large"), entry("d0000000", 4.5, 2**20, 0.7, gptq),
    ]  # fmt: skip
    chart = scaling.chart(some, "accuracy")
    assert chart.figure is not None
    drawn = json.loads(chart.figure.to_json())
    lines = {trace["name"]: trace for trace in drawn["data"]}
    assert list(lines) == ["original", "GPTQ 4 bit"]
    assert lines["GPTQ 4 bit"]["x"] == [4.5 * 2**20 / 8, 4.5 * 2**22 / 8]
    assert lines["GPTQ 4 bit"]["y"] == pytest.approx([70, 88])
    assert lines["original"]["error_y"]["array"] == pytest.approx([1.96, 1.96])
    axis = drawn["layout"]["xaxis"]
    assert axis["type"] == "log"
    assert dict(zip(axis["tickvals"], axis["ticktext"], strict=True))[2.0**20] == "1.00 MiB"
    assert "http" not in chart.figure.to_json()
    assert "scattergl" not in chart.figure.to_json()
    assert chart.rows[0] == (
        "GPTQ 4 bit", "GPTQ 4 bit d0000000", "576 KiB", "4.50", "1048576", "70 % ± 2 %"
    )  # fmt: skip
    assert len(chart.rows) == 4
    assert "GPTQ 4 bit d0000000" in chart.table()


@pytest.mark.parametrize(("low", "high"), [(3e5, 4e5), (1.2e6, 4.4e6), (4e8, 1.4e11), (1e6, 1e6)])
def test_a_few_ticks_span_the_sizes(low: float, high: float) -> None:
    found = scaling.ticks(low, high)
    assert found == sorted(found)
    assert found[0] <= low
    assert found[-1] >= high
    assert 2 <= len(found) <= scaling.MOST_TICKS + 2


def test_another_quality_is_taken_where_none_was_measured() -> None:
    bare = [entry("a0000000", 16, 1e6, perplexity=5.0)]
    without = [Entry(e.key, e.label, e.run, {k: v for k, v in e.measured.items() if k != "accuracy"}) for e in bare]
    assert scaling.best_quality(bare) == "accuracy"
    assert scaling.best_quality(without) == "perplexity"
    assert scaling.chart(without, "accuracy").figure is None


def test_the_section_shows_only_the_visitors_own_runs(scheduler: FakeScheduler) -> None:
    desk = Desk(scheduler.store, cast(Scheduler, scheduler), None, Mode.PUBLIC)
    assert page.draw(desk, ANNA, None, "accuracy")[3] is None
    fakes.finished(scheduler, fakes.GPTQ, "ben-0123456789abcdefg", 3.2, 0.1)
    fakes.finished(scheduler, Recipe(), ANNA)
    mine = fakes.finished(scheduler, fakes.HALF, ANNA, 2.0, 0.5)
    picker, quality, remark, figure, table = page.draw(desk, ANNA, "no such family", "accuracy")
    assert quality == "accuracy"
    assert "one model" in str(remark)
    assert figure is not None
    assert mine.id[-6:] in str(table)
    assert "GPTQ" not in str(table)
    assert cast(dict[str, object], picker)["visible"] is False
    with pytest.raises(BadParams):
        page.draw(desk, ANNA, None, "beauty")
