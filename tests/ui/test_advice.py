"""The advice panel: judged by the engine, shown by cards, and one click away from a recipe."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import cast

import pytest

from engine.assumptions import Assumptions
from engine.errors import InputError
from engine.modes import Limits
from engine.records import Recipe
from engine.scheduler import Scheduler
from tests.ui import fakes
from tests.ui.conftest import ANNA, BEN
from tests.ui.fakes import FakeScheduler
from ui.desk import FIRST, Desk
from ui.pages import advice, compress

VALUES = tuple(Assumptions().model_dump().values())


def advised(desk: Desk, goal: str = "latency", number: object = 0.7, values: tuple[object, ...] = VALUES) -> str:
    found = advice.advise(desk, Recipe(), goal, number, values, ANNA)
    return str(advice.summary(found)) + "".join(str(advice.card(each, found)) for each in found.advices)


def test_cards_say_what_a_measure_brings_needs_and_costs(desk: Desk) -> None:
    html = advised(desk)
    for words in ("Start with: GPTQ, 4 bit.", "start here", "reaches the goal", "helps", "calibration text",
                  "for the teacher&#39;s tokens", "2,000 USD", "16 sequences at a time"):  # fmt: skip
        assert words in html, words
    assert "not measured here" in html
    assert "Nothing here reaches" in advised(desk, "memory", 0.001)


def test_quality_is_the_visitors_own(desk: Desk, scheduler: FakeScheduler) -> None:
    fakes.finished(scheduler, FIRST, BEN, 3.0, 0.5)
    assert "KL to the original" not in advised(desk)
    fakes.finished(scheduler, Recipe(), ANNA)
    fakes.finished(scheduler, FIRST, ANNA, 3.0, 0.5)
    assert "Perplexity 4.70 ± 0.118 (+11.9 %)" in advised(desk)


def test_one_click_makes_advice_the_draft(desk: Desk) -> None:
    found = advice.advise(desk, Recipe(), "latency", 0.7, VALUES, ANNA)
    first = next(each for each in found.advices if each.first)
    assert first.recipe is not None
    before = compress.as_draft(Recipe.model_validate({"seed": 7}))
    after, shape = cast(list[object], advice.using(first.recipe)(before, 4))
    recipe = compress.as_recipe(cast(compress.Draft, after))
    assert (recipe.steps, recipe.seed, shape) == (first.recipe.steps, 7, 5)
    assert "mq-notice bad" not in compress.judge(desk, cast(compress.Draft, after))


@pytest.mark.parametrize(
    ("goal", "number", "values"),
    [
        ("fame", 1, VALUES), ("memory", None, VALUES), ("memory", "8", VALUES), ("latency", 7, VALUES),
        ("memory", True, VALUES), ("memory", -1, VALUES), ("cost", float("nan"), VALUES),
        ("cost", float("inf"), VALUES),
    ],
)  # fmt: skip
def test_goals_from_the_api_are_judged(desk: Desk, goal: str, number: object, values: tuple[object, ...]) -> None:
    with pytest.raises(InputError):
        advice.advise(desk, Recipe(), goal, number, values, ANNA)


@pytest.mark.parametrize("value", [None, "x", -1.0, 1e300])
def test_assumptions_from_the_api_have_bounds(desk: Desk, value: object) -> None:
    with pytest.raises(ValueError, match="teacher_price"):
        advice.advise(desk, Recipe(), "cost", None, (value, *VALUES[1:]), ANNA)
    with pytest.raises(ValueError, match=r"shorter|longer"):
        advice.advise(desk, Recipe(), "cost", None, VALUES[1:], ANNA)


def test_folders_of_a_shared_server_get_no_advice(desk: Desk, scheduler: FakeScheduler) -> None:
    with pytest.raises(InputError, match="shared server"):
        advice.advise(desk, Recipe.model_validate({"model": "/etc"}), "cost", None, VALUES, ANNA)
    scheduler.limits = Limits()
    local = Desk(scheduler.store, cast(Scheduler, scheduler), None)
    with pytest.raises(InputError, match="no model folder"):
        advice.advise(local, Recipe.model_validate({"model": "/no/such"}), "cost", None, VALUES, ANNA)


WIRED = """
import pathlib, sys
from gradio.helpers import special_args
from engine.assumptions import Assumptions
from engine.scheduler import Scheduler
from tests.ui.conftest import ANNA, request
from ui.desk import FIRST
from ui.page import build
from ui.pages import compress
scheduler = Scheduler(pathlib.Path(sys.argv[1]))
page, _ = build(scheduler.store, scheduler)
(answer,) = [function for function in page.fns.values() if function.name == "answer"]
asked = ["latency", 0.7, compress.as_draft(FIRST), 4, "", *Assumptions().model_dump().values()]
assert len(answer.inputs) == len(asked)
found, count = answer.fn(*special_args(answer.fn, [*asked], request(ANNA))[0])  # as Gradio fills the request in
(way,) = [function for function in page.fns.values() if function.name == "take_way"]
assert way.fn(compress.as_draft(FIRST), 1, "", request(ANNA)) == [compress.as_draft(FIRST), 2]  # it fits as it is
print(count, next(each.name for each in found.advices if each.first))
"""


def test_the_panel_is_wired_to_its_inputs(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", WIRED, str(tmp_path / "home")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=120)
    assert done.stdout.strip() == "5 gptq4", done.stderr
