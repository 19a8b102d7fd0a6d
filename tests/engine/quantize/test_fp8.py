"""FP8: the nearest 8-bit float, files that strangers read, and the word `simulated`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine import artifacts, runtime
from engine.measure import size
from engine.methods import Context
from engine.models import LoadedModel
from engine.packing import InputGrid
from engine.quantize import fp8
from engine.records import Recipe
from engine.runtime.float8 import Float8Linear
from tests.conftest import in_memory, tiny_config
from tests.engine.quantize.test_smoothquant import apart, logits


def test_each_weight_goes_to_its_nearest_float() -> None:
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    found = fp8.quantize_weight(weight)
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    levels = every[every.isfinite()]
    distance = (levels * found.scale.unsqueeze(-1) - weight.unsqueeze(-1)).abs().amin(-1)
    torch.testing.assert_close((found.dequantize() - weight).abs(), distance)
    assert found.dequantize().abs().amax(1).tolist() == pytest.approx(weight.abs().amax(1).tolist())


def test_inputs_are_rounded_token_by_token() -> None:
    x = torch.tensor([[448.0, 1.06, -0.5], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(InputGrid(kind="float").fake(x), torch.tensor([[448.0, 1.0, -0.5], [0.0, 0.0, 0.0]]))


@pytest.mark.parametrize("activations", ["none", "token"])
def test_strangers_compute_the_same_and_the_runtime_says_simulated(
    activations: str, tiny: LoadedModel, context: Context, tmp_path: Path
) -> None:
    before = logits(in_memory(tiny_config()).network)
    model = fp8.apply(tiny, fp8.Params.model_validate({"activations": activations}), context)
    assert 0 < apart(logits(model.network), before) < 0.1
    artifacts.write(model, Recipe(), tmp_path / "artifact")
    stranger = AutoModelForCausalLM.from_pretrained(tmp_path / "artifact", dtype="auto")
    assert apart(logits(stranger), logits(model.network)) < 0.005
    loaded = runtime.load(tmp_path / "artifact")
    assert set(loaded.kernels.values()) == {"simulated: dense bfloat16"}
    assert len(loaded.kernels) == len(model.quantized)
    assert apart(logits(loaded.network), logits(model.network)) < 0.005
    files = {m.name: m.value for m in size.measure(tmp_path / "artifact")}
    assert files["size.parameters"] == sum(p.numel() for p in tiny.network.parameters())


def test_a_resumed_run_gives_the_same(tiny: LoadedModel, context: Context) -> None:
    params = fp8.Params(activations="token")
    done = logits(fp8.apply(tiny, params, context).network)
    again = fp8.apply(in_memory(tiny_config()), params, context)
    torch.testing.assert_close(logits(again.network), done, rtol=0, atol=0)


def check_product(device: str) -> None:
    """Float8Linear against float64 arithmetic on what weights and inputs stand for."""
    dice = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(*shape, generator=dice).bfloat16() for shape in ((48, 64), (2, 5, 64)))
    x[0, 0] *= 100  # each token has a scale of its own
    bias = torch.randn(48, generator=dice).bfloat16()
    quantized = fp8.quantize_weight(weight, InputGrid(kind="float"))
    codes, scale = InputGrid(kind="float").encode(x)
    exact = (codes.double() * scale.double()) @ quantized.dequantize().double().t() + bias.double()
    found = Float8Linear(quantized, bias, device)(x.to(device)).cpu()
    assert found.dtype == torch.bfloat16
    assert found.shape == (2, 5, 48)
    assert float((found.double() - exact).norm() / exact.norm()) < 0.005


def test_products_of_8_bit_floats_are_those_of_their_values() -> None:
    check_product("cpu")
    quantized = fp8.quantize_weight(torch.ones(48, 64), InputGrid(kind="float"))
    assert not Float8Linear.knows(quantized, "cpu")  # where it is no faster


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_multiplies_8_bit_floats_itself() -> None:
    check_product("cuda")
