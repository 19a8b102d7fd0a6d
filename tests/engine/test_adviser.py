"""Advice: prices that can be checked by hand, the order of practice, and no quality that nobody measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from engine import adviser, cli, fit, pace, preflight, suitability
from engine.adviser import Advice, Advised, Goal
from engine.advising import TITLES, assume, rows
from engine.assumptions import Assumptions
from engine.errors import BadParams, InputError, UnknownName
from engine.headers import Shape
from engine.presets import PRESETS
from engine.records import Measurement, Model, Recipe, Run, Status
from engine.scheduler import Scheduler
from engine.sizes import Holding
from tests.engine.test_fit import LARGE, llama

USUAL = Assumptions()
MODEL = Model.model_validate("demo")


def advise(goal: str, shape: Shape = LARGE, assumptions: Assumptions = USUAL) -> Advised:
    return adviser.advise(Goal.parse(goal), MODEL, shape, assumptions)


def named(found: Advised) -> dict[str, Advice]:
    return {advice.name: advice for advice in found.advices}


def test_distilling_over_500_b_tokens_costs_a_million_dollars_in_teacher_tokens() -> None:
    assert Assumptions(teacher_price=2, distill_tokens=500).teacher_usd() == pytest.approx(1e6)
    advice = named(advise("latency=0.5", assumptions=Assumptions(distill_tokens=500)))["student"]
    assert advice.teacher == pytest.approx(1e6)
    assert advice.price == pytest.approx(1e6 + advice.hours * USUAL.gpu_rate)


def test_gptq_of_175_b_takes_four_gpu_hours() -> None:
    assert USUAL.quantize_hours(175 * 10**9) == 4
    advice = named(advise("memory=8GB"))["gptq4"]
    assert advice.hours == pytest.approx(4 * LARGE.parameters / 175e9)
    assert advice.price == pytest.approx(advice.hours * 2)
    assert advice.teacher == 0
    slower = named(advise("memory=8GB", assumptions=Assumptions(gptq_hours=8)))["gptq4"]
    assert slower.hours == pytest.approx(2 * advice.hours)


def test_training_takes_six_operations_a_weight_and_token() -> None:
    assumptions = Assumptions(distill_tokens=1, arithmetic=100, utilization=0.5)
    assert assumptions.training_hours(10**9) == pytest.approx(6e18 / 50e12 / 3600)


def test_a_price_paid_once_is_spread_over_what_is_served() -> None:
    assumptions = Assumptions(gpu_rate=3.6, served=100, months=10)
    assert assumptions.served_usd(0.01, batch=1) == pytest.approx(10.0)  # 3.6 USD an hour, 360,000 tokens an hour
    assert assumptions.served_usd(0.01, batch=4) == pytest.approx(2.5)
    assert assumptions.served_usd(0.01, 1, paid_once=2000) == pytest.approx(10.0 + 2)


def test_measures_come_in_the_order_of_practice() -> None:
    found = [advice.stage for advice in advise("memory=8GB").advices]
    assert found == sorted(found, key=["optimise", "quantize", "train"].index)
    assert set(found) == {"optimise", "quantize", "train"}
    assert [advice.name for advice in advise("cost").advices][:4] == ["batch", "kv8", "kernels", "context"]


def test_the_mildest_measure_that_reaches_the_goal_comes_first() -> None:
    eight = named(advise("memory=13.4GB"))
    assert [name for name, advice in eight.items() if advice.first] == ["w8a8"]
    four = named(advise("memory=11GB"))
    assert [name for name, advice in four.items() if advice.first] == ["gptq4"]
    assert not four["gptq8"].reaches
    assert four["gptq4"].figures.memory <= 11e9 < four["gptq8"].figures.memory
    assert not any(advice.first for advice in advise("memory=10MB").advices)
    assert not advise("memory=10MB").met
    plenty = advise("memory=100GB")
    assert plenty.met
    assert not any(advice.first for advice in plenty.advices)
    assert rows(plenty)[1][0] == ">"


def test_memory_and_latency_are_those_of_the_estimate_and_the_roofline() -> None:
    found = advise("latency=0.5")
    held = Holding(LARGE, 2)
    assert found.now.memory == fit.serving(held, 1, 2048).total
    bytes_ = 2 * LARGE.parameters - 2 * 128256 * 4096 + 2 * 32 * 8 * 128 * 2048 * 2
    assert pace.bytes_read(held, 1, 2048) == bytes_  # the table of embeddings is looked up, not read
    assert found.now.token_seconds == pytest.approx(bytes_ / 2039e9)
    four = named(found)["gptq4"]
    assert four.reaches
    assert four.figures.token_seconds < 0.5 * found.now.token_seconds


def test_large_batches_are_bound_by_arithmetic() -> None:
    held = Holding(llama(2, 256, 512, heads=4, shared=1), 2)
    one, many = (pace.token_seconds(held, batch, 1, 2039e9, 312e12) for batch in (1, 4096))
    assert many == pytest.approx(2 * held.shape.parameters * 4096 / 312e12)
    assert one < many < 4096 * one


def test_the_cheapest_way_to_serve_is_found_with_its_price() -> None:
    found = advise("cost")
    best = min((advice for advice in found.advices if advice.helps), key=lambda advice: advice.figures.cost)
    (first,) = [advice for advice in found.advices if advice.first]
    assert first.figures.cost == best.figures.cost
    assert first.name == "batch"
    rare = named(advise("cost", assumptions=Assumptions(served=0.001, largest_batch=1)))
    assert not rare["student"].helps  # nothing that is served seldom pays for its training
    assert not rare["gptq4"].helps
    assert named(found)["gptq4"].helps


def test_every_recipe_can_be_run_on_the_model_it_is_for() -> None:
    shape = llama(4, 96, 160, heads=6, shared=2)  # groups of 64 divide none of its inputs
    found = [advice for advice in advise("memory=8GB", shape).advices if advice.recipe]
    assert {"gptq4", "depth_gptq4", "kv8"} <= {advice.name for advice in found}
    for advice in found:
        assert advice.recipe is not None
        suitability.check_steps(adviser.methods.check(advice.recipe), shape)
    four = named(advise("memory=8GB", shape))["gptq4"].recipe
    assert four is not None
    assert four.steps[0].params["group_size"] == 32


def test_a_quantized_model_is_left_as_it_is() -> None:
    shape = replace(LARGE, config={**LARGE.config, "quantization_config": {}})
    assert [advice.name for advice in advise("memory=8GB", shape).advices] == ["batch", "kernels", "context"]


def test_quality_is_what_runs_have_measured_of_the_same_steps() -> None:
    four = named(advise("memory=8GB"))["gptq4"].recipe
    assert four is not None
    kl = Measurement(name="kl", value=0.01, unit="nat")
    speed = Measurement(name="latency.tpot", value=1.0, unit="s")

    def run(recipe: Recipe, status: Status = Status.SUCCEEDED) -> Run:
        return Run(id="abcd1234", recipe=recipe, status=status, created=1.0)

    def look(found: Mapping[str, Measurement], recipe: Recipe, status: Status = Status.SUCCEEDED) -> object:
        measured = adviser.of_runs([(run(recipe, status), lambda: found)])
        return named(adviser.advise(Goal.parse("memory=8GB"), MODEL, LARGE, USUAL, measured))["gptq4"].quality

    spelled = four.model_copy(update={"seed": 3, "steps": (four.steps[0].model_copy(
        update={"params": {**four.steps[0].params, "symmetric": True}}),)})  # fmt: skip
    found = {"kl": kl, "latency.tpot": speed}
    assert look(found, four) == look(found, spelled) == {"kl": kl}
    assert look(found, four, Status.FAILED) == {}
    assert look({"latency.tpot": speed}, four) == {}
    assert look(found, four.model_copy(update={"model": Model.model_validate("/other")})) == {}
    other = four.model_copy(update={"steps": (four.steps[0].model_copy(update={"params": {"bits": 3}}),)})
    assert look(found, other) == {}


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("memory=8GB", "memory", 8e9), ("memory=8", "memory", 8e9), ("memory=7.5 GiB", "memory", 7.5 * 2**30),
        ("memory=900mb", "memory", 9e8), ("latency=0.5", "latency", 0.5), ("cost", "cost", None),
        ("cost=.3", "cost", 0.3),
    ],
)  # fmt: skip
def test_goals_as_they_are_typed(text: str, kind: str, value: float | None) -> None:
    assert Goal.parse(text) == Goal(kind, value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("memory", "memory=8GB"), ("latency", "latency=0.5"), ("memory=eight", "Write memory=8GB"),
        ("", "The goal is ''"),
        ("speed=2", "Write memory=8GB"), ("latency=2", "up to 1"), ("latency=0", "above 0"), ("memory=-8GB", "Write"),
        ("memory=8parsec", "Write"), ("latency=0.5GB", "Write"), ("memory=1e999", "Write"), ("cost=inf", "Write"),
    ],
)  # fmt: skip
def test_goals_that_are_none(text: str, words: str) -> None:
    with pytest.raises(BadParams, match=words):
        Goal.parse(text)


@pytest.mark.parametrize(
    ("setting", "error", "words"),
    [
        ("teacher_prize=3", UnknownName, "Did you mean teacher_price"), ("months=0", BadParams, "months"),
        ("utilization=1.5", BadParams, "utilization"), ("batch=many", BadParams, "batch"),
        ("served=nan", BadParams, "served"),
        ("teacher_price", BadParams, "'teacher_price' is no .* Write it as teacher_price=3; there are teacher_price, "),
        ("teacher_price= ", BadParams, "Write it as teacher_price=3"), ("", BadParams, "Write it as teacher_price=3"),
    ],
)  # fmt: skip
def test_assumptions_have_bounds(setting: str, error: type[InputError], words: str) -> None:
    with pytest.raises(error, match=words):
        assume([setting])


def test_every_assumption_has_a_default_a_bound_a_description_and_words() -> None:
    from ui.words import ENGLISH

    for name, info in Assumptions.model_fields.items():
        assert not info.is_required()
        assert info.metadata
        assert info.description
        assert f"assume.{name}" in ENGLISH
    assert {f"advice.{name}" for name in TITLES} <= set(ENGLISH)


def test_the_command_line_advises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = ["--home", str(tmp_path)]
    assert cli.main(["advise", "demo", "--goal", "latency=0.7", *home], Scheduler) == 0
    said = capsys.readouterr().out
    assert "not measured here" in said
    assert sum(line.startswith(">") for line in said.splitlines()) == 1
    (now,) = [line for line in said.splitlines() if "as it is" in line]
    assert " 4.59 MB " in now
    assert rows(advise("cost"))[1][3] == "16.06 GB"
    body = ["advise", "demo", "--goal", "cost", "--assume", "teacher_price=4", "--json", *home]
    assert cli.main(body, Scheduler) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["goal"] == {"kind": "cost", "value": None}
    student = next(each for each in found["advice"] if each["name"] == "student")
    assert student["teacher"] == pytest.approx(4000)
    preflight.check(Recipe.model_validate(student["recipe"]))
    assert cli.main(["advise", "demo", "--goal", "speed", *home], Scheduler) == 2
    assert len(rows(advise("cost"))) == 2 + len(advise("cost").advices)


def test_the_smallest_that_is_advised_is_the_preset() -> None:
    recipe = named(advise("memory=8GB"))["tenth"].recipe
    assert recipe is not None
    assert [step.method for step in recipe.steps] == [step.method for step in PRESETS["tenth"]]
    assert recipe.steps[-2].params == PRESETS["tenth"][-2].params | {"group_size": 64}
