"""Depth: distances and losses against slow loops, the choice, and what is kept for other shares."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional

from engine import influence, scores
from engine.calibration import token_rows
from engine.errors import BadModel, BadParams
from engine.methods import Context
from engine.models import LoadedModel, blocks
from engine.prune import depth
from engine.surgery import keep_blocks
from tests.conftest import Recorder, in_memory, tiny_config
from tests.families import FAMILIES

SMALL: dict[str, object] = {"samples": 5, "sequence_length": 24}


def params(**given: object) -> depth.Params:
    return depth.Params.model_validate(SMALL | given)


def lively(layers: int = 5) -> LoadedModel:
    """Blocks that each do something, and not the same."""
    model = in_memory(tiny_config(num_hidden_layers=layers), torch.float32)
    with torch.no_grad():
        for number, block in enumerate(blocks(model.network)[1]):
            for weight in block.parameters():
                if weight.dim() == 2:
                    weight.mul_(3 + 2 * ((number * 3) % layers))
    return model


def rows_of(model: LoadedModel, context: Context) -> Tensor:
    return token_rows(model.tokenizer, context.calibration, 24, 5)


@torch.no_grad()
def test_distances_equal_a_loop_over_tokens(context: Context) -> None:
    model = lively()
    rows = rows_of(model, context)
    found = influence.distances(model, rows, context)
    states = model.network.base_model.layers  # the loop runs the blocks' inputs token by token
    seen: list[Tensor] = []
    hooks = [layer.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for layer in states]
    hooks.append(states[-1].register_forward_hook(lambda _, args, out: seen.append(out)))
    model.network(input_ids=rows)
    for hook in hooks:
        hook.remove()
    for start in range(5):
        for length in range(1, 6 - start):
            cosines = [
                float(functional.cosine_similarity(a, b, dim=0))
                for before, after in zip(seen[start], seen[start + length], strict=True)
                for a, b in zip(before, after, strict=True)
            ]
            mean = sum(1 - c for c in cosines) / len(cosines)
            angle = sum(math.acos(max(-1, min(1, c))) / math.pi for c in cosines) / len(cosines)
            assert found.cosine[start][length - 1] == pytest.approx(mean, abs=1e-5)
            assert found.angle[start][length - 1] == pytest.approx(angle, abs=1e-3)


@pytest.mark.parametrize("family", ["llama", "falcon", "gemma2", "gpt2"])
@torch.no_grad()
def test_losses_are_those_of_models_that_never_had_the_blocks(family: str, context: Context) -> None:
    model = in_memory(FAMILIES[family], torch.float32)
    rows = rows_of(model, context)
    total = len(blocks(model.network)[1])
    runs = [range(0), range(1), range(1, 3), range(total - 1, total)]
    for run, loss in zip(runs, influence.losses_without(model, rows, runs, context), strict=True):
        without = keep_blocks(model, [number for number in range(total) if number not in run])
        logits = without.network(input_ids=rows, use_cache=False).logits[:, :-1]
        assert loss == pytest.approx(float(functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())))


@pytest.mark.parametrize("by", ["influence", "angle"])
@pytest.mark.parametrize("contiguous", [False, True])
def test_the_blocks_that_matter_least_go(by: str, contiguous: bool, context: Context) -> None:
    """Two neighbouring blocks that do almost nothing are found; the rest stays bit by bit."""
    model = lively()
    with torch.no_grad():
        for number in (2, 3):
            for weight in blocks(model.network)[1][number].parameters():
                if weight.dim() == 2:
                    weight.mul_(1e-3)
    smaller = depth.apply(model, params(by=by, contiguous=contiguous, count=2), context)
    assert smaller.network.config.num_hidden_layers == 3
    for new, old in enumerate([0, 1, 4]):
        ours, theirs = (blocks(m.network)[1][n].state_dict() for m, n in ((smaller, new), (model, old)))
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=0)


@torch.no_grad()
def test_by_perplexity_the_best_run_of_all_goes(context: Context) -> None:
    model = lively()
    rows = rows_of(model, context)
    smaller = depth.apply(model, params(by="perplexity", contiguous=True, count=2), context)
    losses = {}
    for start in range(4):
        without = keep_blocks(model, [number for number in range(5) if number not in (start, start + 1)])
        logits = without.network(input_ids=rows).logits[:, :-1]
        losses[start] = float(functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))
    best = min(losses, key=losses.__getitem__)
    expected = keep_blocks(model, [number for number in range(5) if number not in (best, best + 1)])
    torch.testing.assert_close(smaller.network.state_dict(), expected.network.state_dict(), rtol=0, atol=0)


@torch.no_grad()
def test_greedily_the_best_of_those_that_are_left_goes_each_time(context: Context) -> None:
    model = lively()
    rows = rows_of(model, context)
    smaller = depth.apply(model, params(by="greedy", count=2), context)
    left = list(range(5))
    for _ in range(2):
        losses = {}
        for number in left:
            without = keep_blocks(model, [other for other in left if other != number])
            logits = without.network(input_ids=rows).logits[:, :-1]
            losses[number] = float(functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))
        left.remove(min(losses, key=losses.__getitem__))
    expected = keep_blocks(model, left).network.state_dict()
    torch.testing.assert_close(smaller.network.state_dict(), expected, rtol=0, atol=0)


def test_greed_lets_no_run_of_blocks_go() -> None:
    with pytest.raises(ValidationError, match="one at a time"):
        params(by="greedy", contiguous=True)


def test_runs_are_judged_whole_and_ties_go_to_the_first() -> None:
    assert depth.choose([range(n, n + 1) for n in range(4)], [3.0, 1.0, 2.0, 1.0], 2) == [1, 3]
    assert depth.choose([range(n, n + 2) for n in range(3)], [2.0, 1.0, 1.0], 2) == [1, 2]


def test_another_share_needs_no_new_calibration(
    context: Context, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = depth.apply(lively(), params(count=1), context)
    assert not any("measured before" in line for line in recorder.logs())
    monkeypatch.setattr(influence, "capture", None)  # a second measurement would be a call of None
    second = depth.apply(lively(), params(count=3, by="angle", contiguous=True), context)
    assert any("measured before, now reused" in line for line in recorder.logs())
    assert [len(blocks(m.network)[1]) for m in (first, second)] == [4, 2]


def test_what_is_kept_belongs_to_the_weights_the_text_and_the_settings(context: Context) -> None:
    digests = {
        scores.fingerprint(in_memory(tiny_config()), context, {"samples": 4}),
        scores.fingerprint(in_memory(tiny_config(), seed=1), context, {"samples": 4}),
        scores.fingerprint(in_memory(tiny_config(), torch.float32), context, {"samples": 4}),
        scores.fingerprint(in_memory(tiny_config()), context, {"samples": 5}),
    }
    assert len(digests) == 4
    assert scores.fingerprint(in_memory(tiny_config()), context, {"samples": 4}) in digests


@pytest.mark.parametrize(
    ("given", "config", "error", "words"),
    [
        ({"count": 3}, {"num_hidden_layers": 3}, BadParams, "all 3 blocks would be removed. Keep one"),
        ({"count": 9}, {"num_hidden_layers": 3}, BadParams, "all 3 blocks"),
        ({"share": 0.99}, {"num_hidden_layers": 3}, BadParams, "all 3 blocks"),
        ({"share": 0.1}, {"num_hidden_layers": 3}, BadParams, "a share of 0.1 of 3 blocks is none"),
        ({}, {"n_layer": 12, "scale_attn_by_inverse_layer_idx": True}, BadModel, "scale_attn_by_inverse_layer_idx"),
        ({}, {"num_hidden_layers": 8, "attn_layer_period": 4}, BadModel, "attn_layer_period"),
    ],
)
def test_what_cannot_be_removed_is_refused_before_work(
    given: dict, config: dict, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        depth.Params.model_validate(given).check_config(config)
