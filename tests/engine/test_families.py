"""Every decoder family, from weights in memory to a folder that stock transformers and the packed runtime read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import JsonValue
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from engine import artifacts, methods, preflight, runtime
from engine.errors import BadModel
from engine.methods import Context
from engine.models import LoadedModel, blocks, linears
from engine.packing import QuantizedWeight
from engine.quantize import gptq, rtn
from engine.records import Recipe
from tests.conftest import in_memory
from tests.families import FAMILIES, MIXTURES

IDS = torch.randint(3, 1280, (2, 24), generator=torch.Generator().manual_seed(7))


@torch.inference_mode()
def logits(network: PreTrainedModel) -> torch.Tensor:
    found: torch.Tensor = network(input_ids=IDS, use_cache=False).logits
    return found


def of_blocks(model: LoadedModel) -> list[str]:
    prefix, modules = blocks(model.network)
    return [f"{prefix}.{n}.{path}" for n, module in enumerate(modules) for path, _ in linears(module)]


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_transformers_computes_the_same_logits(family: str, context: Context, tmp_path: Path) -> None:
    model = rtn.apply(in_memory(FAMILIES[family]), rtn.Params(bits=4, group_size=32), context)
    assert list(model.quantized) == of_blocks(model)
    artifacts.write(model, Recipe(), tmp_path / "artifact")
    stranger = AutoModelForCausalLM.from_pretrained(
        tmp_path / "artifact", dtype="auto", attn_implementation=model.network.config._attn_implementation
    )
    torch.testing.assert_close(logits(stranger), logits(model.network), rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_gptq_reaches_every_linear_and_the_runtime_reads_it(family: str, context: Context, tmp_path: Path) -> None:
    params = gptq.Params(bits=4, group_size=32, samples=4, sequence_length=32)
    model = gptq.apply(in_memory(FAMILIES[family]), params, context)
    assert list(model.quantized) == of_blocks(model)
    assert all(isinstance(weight, QuantizedWeight) for weight in model.quantized.values())
    artifacts.write(model, Recipe(), tmp_path / "artifact")
    loaded = runtime.load(tmp_path / "artifact")
    ours, dense = logits(loaded.network).double(), logits(model.network).double()
    assert (ours - dense).norm() / dense.norm() < 0.03
    packed = {name for name in model.quantized if type(model.network.get_submodule(name)) is nn.Linear}
    assert set(loaded.kernels) == packed  # GPT-2's and Falcon's linears are stored dense
    assert bool(packed) == (family not in ("gpt2", "falcon"))


@pytest.mark.parametrize("method", ["smoothquant", "zeroquant", "fp8"])
@pytest.mark.parametrize("family", ["gpt2", "falcon"])
def test_rounded_inputs_that_no_file_can_hold_are_refused(family: str, method: str, context: Context) -> None:
    chosen = methods.get(f"quantize/{method}")
    given: dict[str, JsonValue] = {"activations": "token"} if method != "zeroquant" else {"group_size": 32}
    with pytest.raises(BadModel, match="cannot say that inputs are rounded"):
        chosen.apply(in_memory(FAMILIES[family]), chosen.check(given), context)


@pytest.mark.parametrize("family", MIXTURES)
def test_mixtures_of_experts_are_refused_before_work_by_name(family: str, tmp_path: Path) -> None:
    model = in_memory(MIXTURES[family])
    model.network.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    recipe = Recipe.model_validate({"model": str(tmp_path / "model"), "steps": [{"quantize/rtn": {}}]})
    with pytest.raises(BadModel, match=rf"mixture of 4 experts \({family}\)"):
        preflight.check(recipe)
