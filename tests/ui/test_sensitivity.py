"""What each block can bear, on the page: every number written, the newest record found, and only the visitor's."""

from __future__ import annotations

import re

from pydantic import JsonValue

from engine.records import Measurement, Model, Recipe
from tests.ui import fakes
from tests.ui.conftest import ANNA, BEN, request
from tests.ui.fakes import FakeScheduler
from ui import sensitivity, views
from ui.desk import Desk, is_original
from ui.journal import Journal
from ui.pages import compress

LOOK = Recipe.model_validate({"measure": ["sensitivity"]})


def record(*influences: float) -> Measurement:
    blocks: list[JsonValue] = [
        {
            "block": number, "influence": value, "angle": 0.1, "perplexity": 3.0 + value, "error_half": 0.25,
            "error_3_bits": 0.11,
        }
        for number, value in enumerate(influences)
    ]  # fmt: skip
    details: dict[str, JsonValue] = {"protocol": "16 sequences", "perplexity": 2.5, "blocks": blocks}
    return Measurement(name="sensitivity", value=1.3, unit="1", details=details)


def test_every_number_is_written_and_columns_have_scales_of_their_own() -> None:
    html = sensitivity.table(record(0.01, 0.1, 1.0))
    assert html.count("<tr>") == 4
    for text in ("0.010", "0.10", "1.0", "3.0", "25 %", "11 %"):
        assert re.search(rf"<td[^>]*>{re.escape(text)}", html), text
    heats = re.findall(r'<tr><th scope="row">\d</th><td style="--heat: (\d+)%"', html)
    assert heats == ["12", "46", "80"]
    assert "2.5" in html
    assert "maquette-sensitivity.csv" in html


def test_what_is_not_there_or_broken_is_said_in_a_line() -> None:
    for found in (None, record(), Measurement(name="sensitivity", value=1, unit="1", details={"blocks": "<b>"})):
        assert sensitivity.table(found).startswith("<p")
    broken = Measurement(name="sensitivity", value=1, unit="1", details={"blocks": [{"block": "<b>"}]})
    assert "<b>" not in sensitivity.table(broken)


def test_the_button_queues_a_look_that_is_no_original(desk: Desk) -> None:
    draft = compress.as_draft(fakes.GPTQ)
    run = desk.run(compress.submit_look(desk, draft, request(ANNA)), ANNA)
    assert (run.recipe.steps, run.recipe.measure) == ((), ("sensitivity",))
    assert not is_original(run)
    compress.submit(desk, draft, True, request(ANNA))
    assert [is_original(each) for each in desk.runs(ANNA)] == [False, True, False]


def test_the_page_shows_the_newest_record_of_the_visitors_own_model(desk: Desk, scheduler: FakeScheduler) -> None:
    draft = compress.as_draft(fakes.GPTQ)
    assert "0.50" not in compress.bearing(desk, draft, request(ANNA))
    fakes.finished(scheduler, LOOK, BEN, measurements=[record(0.9)])
    fakes.finished(scheduler, LOOK, ANNA, measurements=[record(0.5)])
    fakes.finished(scheduler, fakes.GPTQ, ANNA, 3.2, 0.1)
    assert "0.50" in compress.bearing(desk, draft, request(ANNA))
    assert "0.90" not in compress.bearing(desk, draft, request(ANNA))
    other = {**draft, "model": {"source": "/elsewhere", "dtype": "bfloat16"}}
    assert "0.50" not in compress.bearing(desk, other, request(ANNA))
    assert sensitivity.newest(desk.entries(ANNA), Model.model_validate("demo")) is not None
    baseline = desk.baseline(fakes.GPTQ, ANNA)
    assert baseline is None or is_original(baseline.run)


def test_a_runs_page_has_the_table(desk: Desk, scheduler: FakeScheduler) -> None:
    run = fakes.finished(scheduler, LOOK, ANNA, measurements=[record(0.5)])
    entry = desk.entry(run.id, ANNA)
    html = views.run_detail(run, Journal(desk.store).story(run), (), None, entry, None)
    assert "mq-heat" in html
    assert run.recipe.title() == "what each block can bear"
