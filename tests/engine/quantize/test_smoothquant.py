"""SmoothQuant: its scale by hand, strangers that compute the same, integer products that are exact."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from engine import artifacts, runtime
from engine.methods import Context
from engine.models import LoadedModel
from engine.packing import InputGrid, QuantizedWeight
from engine.quantize import smoothquant
from engine.quantize.smoothquant import Params, smoothing
from engine.records import Recipe
from engine.runtime.linear import Int8Linear
from engine.runtime.native.library import available
from tests.conftest import in_memory, tiny_config
from tests.families import FAMILIES

SMALL = {"samples": 8, "sequence_length": 32}
IDS = torch.randint(3, 1280, (2, 24), generator=torch.Generator().manual_seed(7))


@torch.inference_mode()
def logits(network: PreTrainedModel) -> torch.Tensor:
    return network(input_ids=IDS, use_cache=False).logits.double()


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def with_outliers(family: str = "llama") -> LoadedModel:
    """A model of which some channels are many times larger than the others, as in large trained models."""
    model = in_memory(FAMILIES[family])
    with torch.no_grad():
        for name, parameter in model.network.named_parameters():
            if "norm" in name and parameter.dim() == 1 and parameter.shape[0] == 64 and name.endswith("weight"):
                parameter[::16] *= 40
    return model


def test_the_scale_is_the_one_worked_out_by_hand() -> None:
    found = smoothing(torch.tensor([16.0, 1.0]), torch.tensor([1.0, 1.0]), 0.5)
    torch.testing.assert_close(found, torch.tensor([4.0, 1.0]))
    torch.testing.assert_close(
        smoothing(torch.tensor([9.0, 4.0]), torch.tensor([1.0, 4.0]), 1.0), torch.tensor([9.0, 4.0])
    )


def test_inputs_are_rounded_to_255_levels_of_their_own_token() -> None:
    x = torch.tensor([[127.5, -127.5, 1.4, 0.0], [0.0, 0.0, 0.0, 0.0]])
    codes, scale = InputGrid().encode(x)
    assert codes[0].tolist() == [127.0, -128.0, 1.0, 0.0]
    assert scale[0].item() == 1.0
    torch.testing.assert_close(InputGrid().fake(x)[1], x[1])
    torch.testing.assert_close(InputGrid(0.5).fake(torch.tensor([[0.8, 100.0]])), torch.tensor([[1.0, 63.5]]))


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_the_integer_product_is_that_of_the_rounded_operands(rows: int) -> None:
    dice = torch.Generator().manual_seed(rows)
    codes = torch.randint(0, 256, (32, 64), generator=dice, dtype=torch.uint8)
    scale = (torch.rand(32, 1, generator=dice) + 0.5).bfloat16()
    weight = QuantizedWeight(codes, scale, torch.full_like(scale, 128, dtype=torch.uint8), 8, True, InputGrid())
    x = torch.randn(rows, 64, generator=dice).bfloat16()
    bias = torch.randn(32, generator=dice).bfloat16()
    integers, steps = InputGrid().encode(x)
    exact = (integers.double() * steps.double()) @ ((codes.double() - 128) * scale.double()).t()
    found = Int8Linear(weight, bias)(x).double()
    assert apart(found, exact + bias.double()) < 0.004  # one rounding to bfloat16 and one of the bias


def test_joined_linears_round_their_input_once_and_compute_the_same() -> None:
    dice = torch.Generator().manual_seed(0)
    parts = []
    for rows in (32, 16, 48):
        codes = torch.randint(0, 256, (rows, 64), generator=dice, dtype=torch.uint8)
        scale = torch.rand(rows, 1, generator=dice).bfloat16()
        zero = torch.full_like(scale, 128, dtype=torch.uint8)
        parts.append(Int8Linear(QuantizedWeight(codes, scale, zero, 8, True, InputGrid())))
    x = torch.randn(2, 64, generator=dice).bfloat16()
    before = torch.cat([part(x) for part in parts], dim=1)
    joined = Int8Linear.joined(parts)
    assert joined is not None
    torch.testing.assert_close(joined(x), before, rtol=0, atol=0)
    torch.testing.assert_close(torch.cat([part(x) for part in parts], dim=1), before, rtol=0, atol=0)
    parts[1].inputs = InputGrid(0.1)
    vars(parts[0]).pop("_joined")
    assert Int8Linear.joined(parts) is None


@pytest.mark.parametrize("activations", ["token", "tensor"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "gpt_neox"])
def test_strangers_and_the_runtime_compute_the_same(
    family: str, activations: str, context: Context, tmp_path: Path
) -> None:
    params = Params.model_validate(SMALL | {"activations": activations})
    model = smoothquant.apply(in_memory(FAMILIES[family]), params, context)
    assert all(weight.inputs is not None for weight in model.quantized.values())
    artifacts.write(model, Recipe(), tmp_path / "artifact")
    stranger = AutoModelForCausalLM.from_pretrained(tmp_path / "artifact", dtype="auto")
    # OPT flattens tokens before its MLP; compressed-tensors 0.20 takes each number of a flat input for a token.
    assert apart(logits(stranger), logits(model.network)) < (0.02 if family == "opt" else 1e-6)
    loaded = runtime.load(tmp_path / "artifact")
    assert set(loaded.kernels) == set(model.quantized)
    assert {name.removesuffix(f"-{available()}") for name in loaded.kernels.values()} == {"int8-int8"}
    # Sums in another order move an input across a rounding boundary here and there; a step is 1 of 127.
    assert apart(logits(loaded.network), logits(model.network)) < 0.02


def test_smoothing_outliers_lowers_the_error(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = logits(with_outliers().network)
    smoothed = smoothquant.apply(with_outliers(), Params.model_validate(SMALL), context)
    monkeypatch.setattr(smoothquant, "smooth", lambda block, strength: {})
    other = Context("cpu", 0, context.folder / "plain", context.cache, context.calibration, context.emit, lambda: None)
    plain = smoothquant.apply(with_outliers(), Params.model_validate(SMALL), other)
    assert apart(logits(smoothed.network), exact) < 0.7 * apart(logits(plain.network), exact)


def test_a_resumed_run_rounds_the_inputs_of_restored_blocks(tiny: LoadedModel, context: Context) -> None:
    done = smoothquant.apply(tiny, Params.model_validate(SMALL), context)
    again = smoothquant.apply(in_memory(tiny_config()), Params.model_validate(SMALL), context)
    torch.testing.assert_close(logits(again.network), logits(done.network), rtol=0, atol=0)
