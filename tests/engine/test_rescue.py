"""After a divergence: on from the last good checkpoint at a lower rate, or an end there; and the recipe says which."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine import card, children, intermediate, methods, pipeline, rescue
from engine.errors import BadParams, Diverged, InputError
from engine.lesson import Lesson, TrainingParams
from engine.methods import Context
from engine.models import LoadedModel
from engine.records import Divergence, Recipe, Run, Status
from engine.rescue import Factors
from engine.training import Extras, Schedule, train
from tests.conftest import Recorder, in_memory, tiny_config

LEARN = {"distill/logits": {"student": "current", "steps": 300}}


def diverged(kept: int = 100, attempt: int = 1, number: int = 0) -> Divergence:
    return Divergence(attempt=attempt, number=number, step=121, kept=kept, why="the loss is nan")


def failed(*steps: object, attempt: int = 1, status: Status = Status.FAILED) -> Run:
    recipe = Recipe.model_validate({"steps": steps or [LEARN]})
    return Run(id="0a1b2c3d", recipe=recipe, status=status, attempt=attempt, created=1.0)


def setting(recipe: Recipe, number: int = 0) -> object:
    return recipe.steps[number].params[rescue.SETTING]


def trained(context: Context, factors: Factors = (), bad: int = 99) -> LoadedModel:
    """Twelve steps with a checkpoint after every fourth; the loss of step `bad` (from 0) is no number."""
    model, now = in_memory(tiny_config(), seed=2), 0
    rows = torch.randint(1280, (40, 24), generator=torch.Generator().manual_seed(0))

    def begin(step: int) -> None:
        nonlocal now
        now = step

    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        logits = model.network(input_ids=batch).logits[:, :-1].float().flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten()) * (math.nan if now == bad else 1)

    schedule = Schedule(12, 4, 1e-3, checkpoint_every=4, factors=factors)
    train(model, rows, loss_of, schedule, context, extras=Extras(begin=begin))
    return model


@pytest.mark.parametrize("factors", [((4, 0.1), (8, 0.0)), ((4, 0.0),)])
def test_what_goes_on_from_a_checkpoint_is_what_its_recipe_makes_from_the_beginning(
    factors: Factors, context: Context, recorder: Recorder
) -> None:
    with pytest.raises(Diverged, match=r"step 6: .*The checkpoint of step 4 is kept"):
        trained(context, bad=5)
    assert ("diverged", {"step": 6, "kept": 4, "why": "the loss is nan"}) in recorder.said
    checkpoint = load_file(context.folder / "training.safetensors")
    found = trained(context, factors)
    assert "resumed at step 4 of 12" in recorder.logs()
    whole = trained(dataclasses.replace(context, folder=context.folder / "whole"), factors)
    for name, value in whole.network.named_parameters():
        torch.testing.assert_close(found.network.get_parameter(name), value, rtol=0, atol=0)
    (end,) = (first for first, factor in factors if not factor)
    assert f"warning: the training ends after step {end}, with the weights of that step" in recorder.logs()
    last = load_file(context.folder / "training.safetensors")
    for name, value in found.network.named_parameters():
        torch.testing.assert_close(last[f"weight.{name}"].to(value.dtype), value, rtol=0, atol=0)
    same = [torch.equal(checkpoint[name], last[name]) for name in checkpoint]
    assert all(same) == (end == 4)


def test_the_rate_is_the_schedules_times_the_factor_of_the_step() -> None:
    usual = Schedule(steps=200, batch=1, rate=1e-3)
    slower = dataclasses.replace(usual, factors=rescue.read("0.5 after 5, 0.1 after 100, 0 after 150"))
    for step, factor in ((4, 1.0), (5, 0.5), (99, 0.5), (100, 0.1), (149, 0.1)):
        assert slower.at(step) == pytest.approx(factor * usual.at(step))
    assert (usual.end, slower.end) == (200, 150)
    assert dataclasses.replace(usual, factors=((300, 0.0),)).end == 200


@pytest.mark.parametrize(
    "text",
    ["0.1", "after 5", "0.1 after 0", "2 after 5", "-1 after 5", "nan after 5", "0.1 after 5,", "0.1 after 5.5",
     "0.1 after 9, 0.2 after 9", "0.1 after 9, 0.2 after 5", "0 after 5, 0.1 after 9"],
)  # fmt: skip
def test_factors_that_cannot_be_read_are_refused(text: str) -> None:
    with pytest.raises(BadParams, match=r"distill/logits: learning_rate_factors: .*(such as|must rise)"):
        methods.get("distill/logits").check({rescue.SETTING: text})


@pytest.mark.parametrize("method", ["distill/logits", "prune/gradual"])
def test_factors_that_no_step_has_are_refused(method: str) -> None:
    """A card would say of them that training ended there."""
    methods.get(method).check({"steps": 300, rescue.SETTING: "0.1 after 250, 0 after 299"})
    with pytest.raises(BadParams, match="no step comes after step 300: steps is 300"):
        methods.get(method).check({"steps": 300, rescue.SETTING: "0.1 after 250, 0 after 300"})


def test_each_rescue_lowers_the_rate_that_held_and_leaves_the_rest_of_the_recipe() -> None:
    run = failed({"prune/wanda": {}}, LEARN, "quantize/rtn")
    once = rescue.amended(run, [diverged(number=1)], 0.1)
    assert setting(once, 1) == "0.1 after 100"
    assert once.model_copy(update={"steps": run.recipe.steps}) == run.recipe
    assert (once.steps[0], once.steps[2]) == (run.recipe.steps[0], run.recipe.steps[2])
    again = run.model_copy(update={"recipe": once, "attempt": 2})
    assert setting(rescue.amended(again, [diverged(number=1), diverged(100, 2, 1)], 0.1), 1) == "0.01 after 100"
    assert setting(rescue.amended(again, [diverged(150, 2, 1)], 0.5), 1) == "0.1 after 100, 0.05 after 150"
    assert setting(rescue.amended(again, [diverged(150, 2, 1)], 0), 1) == "0.1 after 100, 0 after 150"
    ended = run.model_copy(update={"recipe": rescue.amended(again, [diverged(150, 2, 1)], 0), "attempt": 3})
    assert setting(rescue.amended(ended, [diverged(150, 3, 1)], 0.1), 1) == "0.1 after 100, 0.01 after 150"
    assert rescue.may_end(again, [diverged(150, 2, 1)])
    assert not rescue.may_end(ended, [diverged(150, 3, 1)])  # and was no good
    planned = failed({"distill/logits": {rescue.SETTING: "0.5 after 200"}})
    assert setting(rescue.amended(planned, [diverged()], 0.1)) == "0.1 after 100, 0.05 after 200"
    assert setting(rescue.amended(planned, [diverged()], 0)) == "0 after 100"


@pytest.mark.parametrize(
    ("run", "found", "factor", "says"),
    [
        (failed(), [], 0.1, "has no checkpoint to go on from"),
        (failed(), [diverged(kept=0)], 0.1, "has no checkpoint to go on from"),
        (failed(attempt=2), [diverged()], 0.1, "has no checkpoint to go on from"),
        (failed(status=Status.SUCCEEDED), [diverged()], 0.1, "has no checkpoint to go on from"),
        (failed(), [diverged()], 1.0, "from 0, which ends the training, to below 1"),
        (failed(), [diverged()], -0.1, "from 0, which ends the training, to below 1"),
        (failed(), [diverged()], math.nan, "from 0, which ends the training, to below 1"),
    ],
)
def test_no_rescue_without_a_checkpoint_or_a_factor(
    run: Run, found: list[Divergence], factor: float, says: str
) -> None:
    with pytest.raises(InputError, match=says):
        rescue.amended(run, found, factor)


@pytest.mark.parametrize("step", [{"prune/gradual": {"ramp": 0.5}}, {"prune/l1": {"share": 0.5}}])
def test_a_pruning_does_not_end_before_its_last_weights_are_gone(step: dict[str, object]) -> None:
    assert not rescue.may_end(failed(step), [diverged(100)])
    assert rescue.may_end(failed(step), [diverged(150)])
    assert setting(rescue.amended(failed(step), [diverged(100)], 0.1)) == "0.1 after 100"
    with pytest.raises(BadParams, match="cannot end after step 100: its last weights go after step 150"):
        rescue.amended(failed(step), [diverged(100)], 0)


def test_the_pipeline_says_which_step_diverged_and_files_the_model_under_a_key_of_its_own(
    tiny_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, schedule, calls = Lesson.batch_loss, TrainingParams.schedule, 0

    def loss(self: Lesson, numbers: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return usual(self, numbers) * (math.nan if calls == 6 else 1)

    def often(self: TrainingParams, parameters: int) -> Schedule:
        return dataclasses.replace(schedule(self, parameters), checkpoint_every=4)

    monkeypatch.setattr(TrainingParams, "schedule", often)
    monkeypatch.setattr(Lesson, "batch_loss", loss)
    learn = {"distill/logits": {"student": "current", "steps": 14, "batch": 1, "sequence_length": 8}}
    source = tiny_folder(num_hidden_layers=1)
    steps = [{"prune/magnitude": {}}, learn, "quantize/rtn"]
    recipe = Recipe.model_validate({"model": str(source), "steps": steps})
    folder, said = tmp_path / "runs" / "0a1b" / "attempt-1", Recorder()
    folder.mkdir(parents=True)
    with pytest.raises(Diverged):
        pipeline.apply_steps(recipe, folder, "cpu", said, lambda: None)
    (data,) = [data for kind, data in said.said if kind == "diverged"]
    assert data == {"step": 6, "kept": 4, "why": "the loss is nan", "number": 1}
    run = Run(id="0a1b", recipe=recipe, status=Status.FAILED, attempt=1, created=1.0)
    amended = rescue.amended(run, [Divergence.model_validate({**data, "attempt": 1})], 0.1)
    pipeline.apply_steps(amended, folder, "cpu", said, lambda: None)
    assert "resumed at step 4 of 14" in said.logs()
    rates = [data["value"] for kind, data in said.said if kind == "sample" and data["series"] == "learning_rate"]
    assert rates == pytest.approx([0.1 * Schedule(14, 1, 1e-3).at(step) for step in (9, 13)])
    kept = {path.name for path in (tmp_path / "cache" / "steps").iterdir()}
    for asked, own in ((amended, True), (recipe, False)):
        checked = methods.check(asked)
        assert (intermediate.key(asked, source, checked[:2], "cpu") in kept) is own
        assert intermediate.key(asked, source, checked[:1], "cpu") in kept


def test_of_several_processes_the_first_one_may_say_it() -> None:
    assert children.event_kind("diverged") == "diverged"


def test_no_run_goes_on_from_an_assistant(context: Context, recorder: Recorder) -> None:
    method = methods.get("distill/logits")
    asked = {"student": "blocks", "keep_every": 3, "assistants": 1, "batch": 2, "sequence_length": 16, "steps": 3}
    params = method.check({**asked, "learning_rate": 1e9, rescue.SETTING: "0.1 after 1"})  # which is the student's
    with pytest.raises(Diverged), torch.no_grad():
        method.apply(in_memory(tiny_config()), params, context)
    assert "assistant 1 of 1: 2 blocks of 64" in recorder.logs()
    assert "diverged" not in [kind for kind, _ in recorder.said]
    assert not [line for line in recorder.logs() if "times what the schedule says" in line]


def test_the_card_says_which_rate_held_and_where_training_ended() -> None:
    text = card.text(rescue.amended(failed(), [diverged()], 0), {})
    assert "- distill/logits: the training ends after step 100, with the weights of that step." in text
    text = card.text(rescue.amended(failed(), [diverged()], 0.1), {})
    assert "- distill/logits: after step 100 the learning rate is 0.1 times what the schedule says." in text
