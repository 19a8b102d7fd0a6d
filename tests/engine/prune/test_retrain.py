"""Pruning that trains: the schedule, zeros that stay, recovery, and a resumed run that ends the same."""

import dataclasses
import functools
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from engine import lesson
from engine.calibration import token_rows
from engine.errors import BadText, Cancelled
from engine.methods import Context, get
from engine.models import LoadedModel, load
from engine.places import DEMO
from engine.prune import gradual
from engine.training import Schedule
from tests.conftest import Recorder, in_memory, tiny_config

QUICK = {"steps": 12, "batch": 2, "sequence_length": 16, "targets": "*.mlp.*"}


def pruned(name: str, context: Context, **changes: object) -> LoadedModel:
    method = get(name)
    model = in_memory(tiny_config(), seed=3)
    with torch.no_grad():
        return method.apply(model, method.check({**QUICK, **changes}), context)


def sparsities(model: LoadedModel) -> set[float]:
    return {
        round(float((model.network.get_submodule(name).weight == 0).float().mean()), 3) for name in sorted(model.pruned)
    }


def test_the_schedule_is_the_papers() -> None:
    params = gradual.Params(sparsity=0.8)
    for done in (0.0, 0.25, 0.5, 1.0):
        expected = 0.8 + (0.0 - 0.8) * (1 - done) ** 3
        assert gradual.sparsity_at(done, params) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["prune/gradual", "prune/l1"])
def test_exactly_the_selected_linears_end_at_exactly_the_sparsity(name: str, context: Context) -> None:
    model = pruned(name, context, sparsity=0.75)
    assert len(model.pruned) == 9
    assert sparsities(model) == {0.75}
    assert float((model.network.get_submodule("model.layers.0.self_attn.q_proj").weight == 0).float().mean()) < 0.01


@pytest.mark.parametrize("name", ["prune/gradual", "prune/l1"])
def test_a_pattern_ends_with_two_of_four(name: str, context: Context) -> None:
    model = pruned(name, context, pattern="2:4")
    for linear in model.pruned:
        weight = model.network.get_submodule(linear).weight
        assert bool(((weight.view(-1, 4) == 0).sum(1) == 2).all())


@pytest.mark.parametrize("name", ["prune/gradual", "prune/l1"])
def test_a_file_may_hold_the_zeros_as_bits(name: str, context: Context) -> None:
    model = pruned(name, context, storage="bitmask")
    assert len(model.sparse) == 9
    assert model.sparse == model.pruned


def test_the_sparsity_rises_step_by_step(context: Context, recorder: Recorder) -> None:
    pruned("prune/gradual", context, sparsity=0.8, every=2, ramp=0.75)
    shown = [data["value"] for kind, data in recorder.said if kind == "sample" and data["series"] == "sparsity"]
    expected = [0.8 * (1 - (1 - step / 9) ** 3) for step in (2, 4, 6, 8)]
    assert shown == pytest.approx(expected)


def test_the_price_makes_weights_small_before_the_cut(context: Context, recorder: Recorder) -> None:
    pruned("prune/l1", context, penalty=0.0, learning_rate=3e-3)
    pruned("prune/l1", dataclasses.replace(context, folder=context.folder / "priced"), penalty=1.0, learning_rate=3e-3)
    free, priced = (float(line.rsplit(" ", 1)[1]) for line in recorder.logs() if line.startswith("cut "))
    assert priced < 0.9 * free


def test_a_price_may_stand_without_a_cut(context: Context, recorder: Recorder) -> None:
    pruned("prune/l1", context, sparsity=0.0)
    assert any(line.startswith("cut 0 of ") for line in recorder.logs())


@pytest.mark.parametrize("name", ["prune/gradual", "prune/l1"])
@pytest.mark.parametrize("stop_at", [4, 10])
def test_an_interrupted_run_ends_with_the_same_weights(
    name: str, stop_at: int, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lesson, "Schedule", functools.partial(Schedule, checkpoint_every=2))
    changes = {"every": 3} if name == "prune/gradual" else {}
    whole = pruned(name, dataclasses.replace(context, folder=context.folder / "whole"), **changes)
    asked = 0

    def check() -> None:
        nonlocal asked
        asked += 1
        if asked == stop_at:
            raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        pruned(name, dataclasses.replace(context, check_cancelled=check), **changes)
    again = pruned(name, context, **changes)
    for key, value in whole.network.state_dict().items():
        torch.testing.assert_close(again.network.state_dict()[key], value, rtol=0, atol=0)


def test_training_recovers_what_the_cut_broke(context: Context) -> None:
    short = pruned("prune/gradual", context, sparsity=0.9, steps=2, targets="")
    longer = dataclasses.replace(context, folder=context.folder / "longer")
    trained = pruned("prune/gradual", longer, sparsity=0.9, steps=40, targets="", learning_rate=3e-3)
    assert sparsities(short) == sparsities(trained) == {0.9}
    rows = token_rows(trained.tokenizer, context.calibration, 64, 8)

    def loss(model: LoadedModel) -> float:
        with torch.no_grad():
            logits = model.network(rows).logits[:, :-1].flatten(0, 1).float()
        return float(functional.cross_entropy(logits, rows[:, 1:].flatten()))

    assert loss(trained) < loss(short) - 0.3


@pytest.mark.parametrize("name", ["prune/gradual", "prune/l1"])
def test_a_text_that_is_no_text_is_refused_before_the_run(name: str, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Too short.")
    for text, words in ((tmp_path / "absent.txt", "no training text"), (tmp_path / "short.txt", "tokens")):
        with pytest.raises(BadText, match=words):
            get(name).check({"text": str(text)}).check_sources(DEMO / "model")


@pytest.mark.parametrize("name", ["prune/gradual", "prune/l1"])
def test_the_chart_says_how_far_it_has_gone_from_the_original(name: str, context: Context, recorder: Recorder) -> None:
    model = load(DEMO / "model", "float32")
    method = get(name)
    with torch.no_grad():
        method.apply(model, method.check({**QUICK, "sparsity": 0.9}), context)
    far = [float(str(data["value"])) for kind, data in recorder.said if data.get("series") == "kl_heldout"]
    assert 0 <= far[0] < 0.3  # at the first step little has changed
    assert far[-1] > far[0]
