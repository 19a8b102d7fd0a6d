"""AWQ: folding changes nothing, the best scale is never worse than none, and the arithmetic is the paper's."""

import dataclasses

import pytest
import torch

from engine.calibration import walk_blocks
from engine.experts import NAMES
from engine.methods import Calibrated, Context
from engine.models import LoadedModel
from engine.observing import Block, BlockLinear
from engine.prune import low_rank
from engine.quantize import awq
from engine.quantize._fold import Fold, folds
from engine.quantize._grid import round_to_nearest
from tests.conftest import in_memory
from tests.families import FAMILIES, MIXTURES

# Where scales can be folded: the linear before, or "norm", and the linears that read it.
LLAMA = ["norm q_proj k_proj v_proj", "v_proj o_proj", "norm gate_proj up_proj", "up_proj down_proj"]
PLACES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3", "stablelm", "gemma2", "gemma3"), LLAMA),
    "phi3": ["norm qkv_proj", "qkv_proj o_proj", "norm gate_up_proj", "gate_up_proj down_proj"],
    "olmo2": ["v_proj o_proj", "up_proj down_proj"],  # its norms stand after the products
    "bloom": ["norm query_key_value", "norm dense_h_to_4h"],
    "falcon": ["norm query_key_value dense_h_to_4h"],
    "gpt2": ["norm c_attn", "norm c_fc"],
    "gpt_neox": ["norm query_key_value", "norm dense_h_to_4h"],
    "opt": ["norm q_proj k_proj v_proj", "v_proj out_proj", "norm fc1", "fc1 fc2"],
    **{
        family: [
            "norm q_proj k_proj v_proj", "v_proj o_proj",
            " ".join(["norm", *(leaf for _ in range(4) for leaf in (gate, up)), "gate", *shared]),
            *[f"{up} {down}"] * 4, *["up_proj down_proj"] * bool(shared),
        ]
        for family, (gate, up, down), shared in (
            ("mixtral", NAMES["mixtral"], []), ("qwen3_moe", NAMES["qwen3_moe"], []), ("olmoe", NAMES["olmoe"], []),
            ("qwen2_moe", NAMES["qwen2_moe"], ["gate_proj", "up_proj", "shared_expert_gate"]),
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("family", PLACES)
@torch.no_grad()
def test_folding_keeps_what_the_model_computes(family: str, context: Context) -> None:
    model = in_memory((FAMILIES | MIXTURES)[family], torch.float32)
    ids = torch.randint(3, 1280, (2, 24), generator=torch.Generator().manual_seed(1))
    before = model.network(input_ids=ids).logits
    names: list[list[str]] = []
    for block in walk_blocks(model, context, Calibrated(samples=4, sequence_length=16)):
        found = folds(block, *block.batches[0])
        names.append([describe(fold.source, fold.readers, block) for fold in found])
        for number, fold in enumerate(found):
            fold.apply(torch.rand(fold.size, generator=torch.Generator().manual_seed(number)) + 0.5)
    for each in names:
        assert sorted(map(sorted, map(str.split, each))) == sorted(map(sorted, map(str.split, PLACES[family])))
    torch.testing.assert_close(model.network(input_ids=ids).logits, before, rtol=1e-3, atol=1e-4)


def describe(source: torch.nn.Module, readers: tuple[BlockLinear, ...], block: Block) -> str:
    path = next(path for path, module in block.module.named_modules() if module is source)
    first = path.rpartition(".")[2] if hasattr(source, "in_features") else "norm"
    return " ".join([first, *(reader.name.rpartition(".")[2] for reader in readers)])


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_readers_undo_what_a_norms_weights_came_out_as(offset: float) -> None:
    norm, reader = torch.nn.LayerNorm(64).to(torch.bfloat16), torch.nn.Linear(64, 64)
    dice = torch.Generator().manual_seed(0)
    with torch.no_grad():
        norm.weight.copy_(2 * torch.rand(64, generator=dice) + 1 - offset)  # a norm with an offset adds it
        reader.weight.copy_(torch.eye(64))
    before = norm.weight.float() + offset
    scale = torch.logspace(0, 4, 64)  # the last would round a weight with an offset to nothing
    with torch.no_grad():
        exact = Fold(norm, (BlockLinear("it", reader),), 64, offset=offset).apply(scale)
    after = (norm.weight.float() + offset) * reader.weight.diagonal()
    torch.testing.assert_close(after, before, rtol=1e-5, atol=0)
    torch.testing.assert_close(exact[:16], scale[:16], rtol=0.02, atol=0)
    assert bool((norm.weight.float() + offset > 0).all())


def test_experts_count_by_the_tokens_that_reach_them() -> None:
    dice = torch.Generator().manual_seed(0)
    inputs = [torch.randn(count, 32, generator=dice) * torch.rand(32, generator=dice).exp() for count in (300, 20)]
    readers = []
    for number, x in enumerate(inputs):
        linear = BlockLinear(f"expert-{number}", torch.nn.Linear(32, 16, bias=False), tokens=len(x))
        linear.hessian = (2 * x.t() @ x / len(x)).triu()
        readers.append(linear)
    everything = torch.cat(inputs)
    torch.testing.assert_close(awq.mean_square(readers), 2 * everything.square().mean(0))
    params = awq.Params(bits=3, group_size=32)
    fold = Fold(torch.nn.LayerNorm(32), tuple(readers), 32)
    ratio, _ = awq.best_scale(fold, readers, params)
    size = everything.square().mean(0).sqrt()
    costs = {}
    for each in awq.RATIOS:
        scale, moved = awq.scale_for(size, each), 0.0
        for reader, x in zip(readers, inputs, strict=True):
            importance = 2 * x.square().mean(0) / scale.square()
            rounded = round_to_nearest(reader.weight * scale, params, "it", torch.float32, importance)
            moved += float(((rounded.dequantize() / scale - reader.weight) @ x.t()).square().sum())
        costs[each] = moved
    assert ratio == min(costs, key=costs.__getitem__)


def test_a_low_rank_mixture_can_be_scaled(context: Context) -> None:
    model = in_memory(MIXTURES["mixtral"])
    small = {"samples": 4, "sequence_length": 16}
    low_rank.apply(model, low_rank.Params.model_validate({"ratio": 0.5, "multiple": 8, **small}), context)
    apart = dataclasses.replace(context, folder=context.folder / "awq")
    for block in walk_blocks(model, apart, Calibrated(samples=4, sequence_length=16)):
        assert any(
            describe(fold.source, fold.readers, block).startswith("norm") for fold in folds(block, *block.batches[0])
        )


def test_the_scale_is_the_one_worked_out_by_hand() -> None:
    torch.testing.assert_close(awq.scale_for(torch.tensor([1.0, 16.0]), 0.5), torch.tensor([0.5, 2.0]))
    torch.testing.assert_close(awq.scale_for(torch.tensor([3.0, 7.0]), 0.0), torch.ones(2))


def test_large_channels_are_scaled_up_and_the_error_falls(tiny: LoadedModel, context: Context) -> None:
    with torch.no_grad():  # one channel in each group that carries the most, as in trained models
        for layer in tiny.network.model.layers:
            layer.input_layernorm.weight[::32] *= 30
    params = awq.Params(bits=3, group_size=32, samples=8, sequence_length=32)
    block = next(walk_blocks(tiny, context, params, "directions"))
    fold = next(fold for fold in folds(block, *block.batches[0]) if len(fold.readers) == 3)
    ratio, scale = awq.best_scale(fold, list(fold.readers), params)
    assert ratio > 0
    others = torch.ones(len(scale), dtype=torch.bool)
    others[::32] = False
    assert scale[::32].min() > scale[others].max()


def test_a_resumed_block_keeps_its_folded_norm(tiny: LoadedModel, context: Context) -> None:
    params = awq.Params(bits=4, group_size=32, samples=4, sequence_length=16)
    awq.apply(tiny, params, context)
    again = awq.apply(in_memory(tiny.network.config), params, context)  # every block is read back
    for (name, one), (_, two) in zip(tiny.network.named_parameters(), again.network.named_parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0, msg=name)
