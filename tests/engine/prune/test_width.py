"""Width: scores against finite differences and slow loops, the sizes that are chosen, and bad input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional

from engine import anatomy, importance, preflight
from engine.calibration import token_rows
from engine.errors import BadModel, BadParams
from engine.importance import by_activation, by_taylor
from engine.methods import Context
from engine.models import LoadedModel, blocks
from engine.prune import width
from engine.records import Recipe
from tests.conftest import Recorder, in_memory, tiny_config
from tests.engine.test_surgery import KNOWN, lively
from tests.families import FAMILIES, MIXTURES

SMALL: dict[str, object] = {"samples": 3, "sequence_length": 16}
STEP = 4e-4


def params(**given: object) -> width.Params:
    return width.Params.model_validate(SMALL | given)


def rows_of(model: LoadedModel, context: Context, count: int = 3) -> Tensor:
    return token_rows(model.tokenizer, context.calibration, 16, count)


@torch.no_grad()
def loss_of(model: LoadedModel, rows: Tensor) -> float:
    logits = model.network(input_ids=rows, use_cache=False).logits[:, :-1].double()
    return float(functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))


def scaled(model: LoadedModel, rows: Tensor, axis: str, block: int, unit: int, factor: float) -> float:
    """The loss with all weights of one unit times `factor`, place by place."""
    body = anatomy.of(model.network.config)
    prefix, _ = blocks(model.network)
    kept = {name: weight.detach().clone() for name, weight in model.network.named_parameters()}
    with torch.no_grad():
        for name, weight in model.network.named_parameters():
            for dim, entry in enumerate(anatomy.units(body, name, tuple(weight.shape))):
                inside = axis == "channels" or name.startswith(f"{prefix}.{block}.")
                if entry is not None and entry[0] == axis and inside:
                    for place in torch.where(entry[1] == unit)[0].tolist():
                        weight.select(dim, place).mul_(factor)
        found = loss_of(model, rows)
        for name, weight in model.network.named_parameters():
            weight.copy_(kept[name])
    return found


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "falcon", "opt", "gemma2", "falcon-groups", "gpt_neox"])
def test_taylor_scores_are_the_slope_of_the_loss(family: str, context: Context) -> None:
    model = lively(KNOWN[family])
    rows = rows_of(model, context)
    body = anatomy.of(model.network.config)
    found = by_taylor(model, rows, context)
    model.network.double()  # differences of losses need the digits
    for axis, block in (("neurons", 1), ("heads", 2), ("channels", 0)):
        scores = found.of(axis)[block]  # type: ignore[arg-type]
        for unit in (0, len(scores) // 2, len(scores) - 1):
            far, near = (
                (scaled(model, rows, axis, block, unit, 1 + h) - scaled(model, rows, axis, block, unit, 1 - h))
                / (2 * h)
                for h in (STEP, STEP / 2)
            )
            slope = (4 * near - far) / 3  # Richardson: the error of third order is gone
            assert scores[unit] == pytest.approx(abs(slope), rel=0.02, abs=2e-3 * max(scores)), (axis, unit)
    assert len(found.neurons[0]) == body.neurons


def test_taylor_scores_of_batches_are_the_root_of_their_mean_square(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lively(tiny_config())
    rows = rows_of(model, context)
    each = [torch.tensor(by_taylor(model, row[None], context).heads) for row in rows]
    monkeypatch.setattr(importance.influence, "batches", lambda rows: torch.split(rows, 1))
    found = torch.tensor(by_taylor(model, rows, context).heads)
    torch.testing.assert_close(found, torch.stack(each).square().mean(0).sqrt(), rtol=1e-4, atol=1e-7)


def test_measuring_by_taylor_leaves_the_model_as_it_was(context: Context) -> None:
    model = in_memory(tiny_config())
    before = {name: weight.clone() for name, weight in model.network.state_dict().items()}
    by_taylor(model, rows_of(model, context), context)
    torch.testing.assert_close(model.network.state_dict(), before, rtol=0, atol=0)
    assert not any(weight.requires_grad or weight.grad is not None for weight in model.network.parameters())
    assert model.network.get_parameter("lm_head.weight") is model.network.get_parameter("model.embed_tokens.weight")


@torch.no_grad()
def test_experts_have_no_scores_of_their_own(context: Context) -> None:
    model = lively(MIXTURES["qwen3_moe"])
    found = by_activation(model, rows_of(model, context), context)
    assert all(len(heads) > 0 for heads in found.heads)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
def test_activation_scores_equal_a_loop(family: str, context: Context) -> None:
    """On correlated inputs: the hidden states of a text."""
    model = lively(KNOWN[family])
    rows = rows_of(model, context)
    found = by_activation(model, rows, context)
    names = {
        "llama": ("mlp.down_proj", "self_attn.o_proj", ["input_layernorm", "post_attention_layernorm"]),
        "gpt2": ("mlp.c_proj", "attn.c_proj", ["ln_1", "ln_2"]),
        "falcon": ("mlp.dense_4h_to_h", "self_attention.dense", ["input_layernorm"]),
    }[family]
    seen: dict[str, Tensor] = {}
    final = {"llama": "model.norm"}.get(family, "transformer.ln_f")
    prefix, modules = blocks(model.network)
    for name, module in model.network.named_modules():
        if name.endswith(names[:2]):
            module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0][..., :]}))
        if name == final or name.endswith(tuple(names[2])):
            module.register_forward_hook(lambda _, args, out, name=name: seen.update({name: out}))
    model.network(input_ids=rows)
    body = anatomy.of(model.network.config)
    for block in range(len(modules)):
        down = seen[f"{prefix}.{block}.{names[0]}"].reshape(-1, body.neurons)
        for unit in (0, 7, body.neurons - 1):
            norm = sum(float(value) ** 2 for value in down[:, unit]) ** 0.5
            assert found.neurons[block][unit] == pytest.approx(norm, rel=1e-4)
        out = seen[f"{prefix}.{block}.{names[1]}"].reshape(-1, body.heads, body.head_size)
        for unit in range(body.attention_units):
            mine = out[:, unit * body.heads_of_unit : (unit + 1) * body.heads_of_unit]
            assert found.heads[block][unit] == pytest.approx(float(mine.double().square().sum().sqrt()), rel=1e-4)
    norms = [seen[name] for name in seen if not name.endswith(names[:2])]
    assert len(norms) == len(modules) * len(names[2]) + 1
    for channel in (0, 31):
        norm = sum(float(each[..., channel].double().square().sum()) for each in norms) ** 0.5
        assert found.channels[channel] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("by", ["activation", "taylor"])
def test_what_matters_least_goes(by: str, context: Context) -> None:
    """Neurons, a group and channels that give almost nothing are found, others in each block."""
    model = lively(tiny_config(num_attention_heads=4, num_key_value_heads=4))
    weak = [[(7 * unit + block) % 128 for unit in range(32)] for block in range(3)]
    with torch.no_grad():
        for block, layer in enumerate(blocks(model.network)[1]):
            layer.mlp.up_proj.weight[weak[block]] *= 1e-4
            layer.mlp.down_proj.weight[:, weak[block]] *= 1e-2
            layer.self_attn.v_proj.weight[16 * block : 16 * block + 16] *= 1e-4
            layer.self_attn.o_proj.weight[:, 16 * block : 16 * block + 16] *= 1e-2
    smaller = width.apply(model, params(by=by, neurons=0.25, heads=0.25, multiple=16), context)
    for block, (old, new) in enumerate(zip(*(blocks(m.network)[1] for m in (model, smaller)), strict=True)):
        stay = [unit for unit in range(128) if unit not in weak[block]]
        torch.testing.assert_close(new.mlp.up_proj.weight, old.mlp.up_proj.weight[stay], rtol=0, atol=0)
        heads = [row for row in range(64) if row // 16 != block]
        torch.testing.assert_close(new.self_attn.k_proj.weight, old.self_attn.k_proj.weight[heads], rtol=0, atol=0)
    config = smaller.network.config
    assert (config.intermediate_size, config.num_attention_heads, config.num_key_value_heads) == (96, 3, 3)


def test_another_share_needs_no_new_calibration(
    context: Context, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    width.apply(in_memory(tiny_config()), params(), context)
    monkeypatch.setattr(importance, "MEASURES", {})  # a second measurement would find none
    smaller = width.apply(in_memory(tiny_config()), params(neurons=0.5, channels=0.5), context)
    assert any("measured before, now reused" in line for line in recorder.logs())
    assert (smaller.network.config.intermediate_size, smaller.network.config.hidden_size) == (64, 32)


@pytest.mark.parametrize(
    ("given", "family", "words"),
    [
        ({"neurons": 0.0}, "llama", "nothing is to be removed"),
        ({"heads": 0.9}, "llama", "would remove all 2 attention units; 0.5 leaves the fewest"),
        ({"neurons": 0.99}, "llama", "would remove all 128 feed-forward neurons; 0.75 leaves the fewest"),
        ({"neurons": 0.05}, "llama", "is none in steps of 32; 0.25 is the smallest share"),
        ({"multiple": 256}, "llama", "no multiple of 256 is below the width of 128 that 128 feed-forward neurons"),
        ({"heads": 0.5, "neurons": 0.5, "multiple": 64}, "llama", "no multiple of 64 is below the width of 64"),
        ({"channels": 0.5}, "gpt2", "4 heads of 16 and 32 channels do not fit. Remove the same share"),
        ({"heads": 0.5}, "olmo2", "olmo2 normalises the queries of all heads together"),
        ({}, "mixtral", "neurons cannot be removed: mixtral is a mixture of experts"),
        ({"heads": 0.25, "neurons": 0.0, "channels": 0.25}, "olmoe", "olmoe normalises"),
    ],
)
def test_what_cannot_be_removed_is_refused_before_work(given: dict, family: str, words: str) -> None:
    config = in_memory((FAMILIES | MIXTURES)[family]).network.config.to_dict()
    with pytest.raises(BadParams, match=words):
        width.Params.model_validate(given).check_config(config)


def test_other_families_and_shares_out_of_bounds_are_refused() -> None:
    with pytest.raises(BadModel, match="A bloom model cannot get other widths"):
        width.Params().check_config({"model_type": "bloom"})
    with pytest.raises(BadModel, match="A mamba model cannot get other widths here"):
        width.Params().check_config({"model_type": "mamba"})
    for given in ({"neurons": 1.0}, {"heads": -0.1}, {"channels": float("nan")}, {"multiple": 0}):
        with pytest.raises(ValidationError):
            width.Params.model_validate(given)


def test_coupled_families_lose_heads_and_channels_together(context: Context) -> None:
    given = {"neurons": 0.5, "heads": 0.5, "channels": 0.5}
    model = in_memory(FAMILIES["gpt2"])
    width.Params.model_validate(given).check_config(model.network.config.to_dict())
    smaller = width.apply(model, params(**given), context)
    config = smaller.network.config
    assert (config.hidden_size, config.num_attention_heads, config.n_inner) == (32, 2, 128)
    assert smaller.network(torch.arange(9)[None]).logits.isfinite().all()


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "falcon-groups"])
def test_the_shapes_that_the_next_step_is_checked_on_are_those_that_come(family: str, context: Context) -> None:
    model = in_memory(KNOWN[family])
    body = anatomy.of(model.network.config)
    settings = params(neurons=0.5, **({"heads": 0.5, "channels": 0.5} if body.coupled else {"heads": 0.5}))
    tensors = {name: tuple(weight.shape) for name, weight in model.network.state_dict().items()}
    config, shapes = settings.reshaped(model.network.config.to_dict(), tensors)
    smaller = width.apply(model, settings, context)
    weights = {name: tuple(w.shape) for name, w in smaller.network.state_dict().items() if name.endswith("weight")}
    assert {name: shape for name, shape in shapes.items() if name in weights} == weights
    assert anatomy.of_dict(config) == anatomy.of(smaller.network.config)


def test_a_group_that_the_narrower_model_has_not_is_refused_before_work(tiny_folder: Callable[..., Path]) -> None:
    steps = [{"prune/width": {"neurons": 0.25}}, {"prune/depth": {"count": 2}}, {"quantize/rtn": {"group_size": 64}}]
    recipe = {"model": str(tiny_folder()), "steps": steps, "measure": ["size"]}
    with pytest.raises(BadParams, match=r"64 .*96 inputs|96 inputs"):
        preflight.check(Recipe.model_validate(recipe))
    steps[2] = {"quantize/rtn": {"group_size": 32}}
    preflight.check(Recipe.model_validate(recipe))
    steps[2] = {"prune/depth": {"count": 1}}
    with pytest.raises(BadParams, match="a model of one block can lose none"):
        preflight.check(Recipe.model_validate(recipe))
