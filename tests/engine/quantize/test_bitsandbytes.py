"""bitsandbytes: what is written is what a stranger computes, sizes are counted right, damage is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import Linear
from transformers import AutoModelForCausalLM

from engine import artifacts, headers, models, preflight, runtime
from engine.errors import BadParams
from engine.measure import size
from engine.methods import Context
from engine.models import LoadedModel, blocks
from engine.quantize import bitsandbytes
from engine.quantize.bitsandbytes import Params
from engine.records import Recipe
from engine.sizes import Holding
from tests.conftest import Recorder, in_memory, tiny_config
from tests.engine.quantize.test_smoothquant import apart, logits
from tests.families import FAMILIES

SMALL = {"samples": 4, "sequence_length": 32}


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("scheme", ["nf4", "fp4", "int8"])
def test_strangers_and_the_runtime_compute_the_same(
    scheme: str, double_quant: bool, tiny: LoadedModel, context: Context, tmp_path: Path
) -> None:
    before = logits(in_memory(tiny_config()).network)
    params = Params.model_validate(SMALL | {"scheme": scheme, "double_quant": double_quant})
    model = bitsandbytes.apply(tiny, params, context)
    artifacts.write(model, Recipe(), tmp_path / "artifact")  # before the first product, as a run does
    mine = logits(model.network)
    assert 0 < apart(mine, before) < 0.3
    stranger = AutoModelForCausalLM.from_pretrained(tmp_path / "artifact", dtype="auto")
    assert apart(logits(stranger), mine) < 0.01
    loaded = runtime.load(tmp_path / "artifact")
    assert set(loaded.kernels.values()) == {f"bitsandbytes {scheme}"}
    assert len(loaded.kernels) == 3 * 7
    assert apart(logits(loaded.network), mine) < 0.01


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_strangers_read_a_head_that_is_quantized_too(
    scheme: str, tiny_folder: Callable[..., Path], context: Context, tmp_path: Path
) -> None:
    folder = tiny_folder(tie_word_embeddings=False)
    params = Params.model_validate(SMALL | {"scheme": scheme, "head": True})
    model = bitsandbytes.apply(models.stream(folder), params, context)
    artifacts.write(model, Recipe(), tmp_path / "artifact")
    mine = logits(model.network)
    stranger = AutoModelForCausalLM.from_pretrained(tmp_path / "artifact", dtype="auto")
    assert type(stranger.lm_head) is type(model.network.lm_head) is not Linear
    assert apart(logits(stranger), mine) < 0.01
    assert runtime.load(tmp_path / "artifact").kernels["lm_head"] == f"bitsandbytes {scheme}"
    stored = headers.inspect(tmp_path / "artifact").bytes  # tables of 4 bits weigh much beside a tiny model
    assert Holding(headers.inspect(folder), 2).after(params).file_bytes() == pytest.approx(stored, rel=0.1)


def test_a_head_that_is_the_embeddings_is_refused(tiny_folder: Callable[..., Path]) -> None:
    steps = [{"quantize/bitsandbytes": {"head": True}}]
    with pytest.raises(BadParams, match="Turn head off"):
        preflight.check(Recipe.model_validate({"model": str(tiny_folder()), "steps": steps, "measure": ["size"]}))


@pytest.mark.parametrize(("scheme", "bits"), [("nf4", 4.2), ("int8", 8.3)])
def test_every_byte_and_every_parameter_is_counted(
    scheme: str, bits: float, tiny: LoadedModel, context: Context, tmp_path: Path
) -> None:
    dense = sum(p.numel() for p in tiny.network.parameters())
    inside = sum(p.numel() for p in blocks(tiny.network)[1].parameters() if p.dim() == 2)
    bitsandbytes.apply(tiny, Params.model_validate(SMALL | {"scheme": scheme}), context)
    artifacts.write(tiny, Recipe(), tmp_path / "artifact")
    found = {m.name: m.value for m in size.measure(tmp_path / "artifact")}
    assert found["size.parameters"] == dense
    # The rest stays 16 bit; tables and names of the tiny model weigh more than those of a real one.
    stored = found["size.bits_per_weight"] * dense - 16 * (dense - inside)
    assert bits <= stored / inside < bits + 3


def test_outliers_are_measured_and_told(context: Context, recorder: Recorder) -> None:
    model = in_memory(tiny_config())
    with torch.no_grad():
        model.network.model.layers[0].input_layernorm.weight[:16] = 50
    found = bitsandbytes.outliers(model, Params.model_validate(SMALL | {"scheme": "int8"}), context)
    assert found["model.layers.0.self_attn.q_proj"] == pytest.approx(16 / 64)
    assert found["model.layers.0.mlp.down_proj"] == 0
    bitsandbytes.apply(model, Params.model_validate(SMALL | {"scheme": "int8"}), context)
    told = {data["name"]: data["outliers"] for kind, data in recorder.said if kind == "linear"}
    assert told == found
    mean = sum(found.values()) / len(found)
    assert any(f"{mean:.2%} of the input channels have outliers" in line for line in recorder.logs())


@pytest.mark.parametrize(("scheme", "double", "bits"), [("nf4", True, 4.13), ("fp4", False, 4.5), ("int8", True, 8)])
def test_each_linear_is_audited_with_every_byte(
    scheme: str, double: bool, bits: float, tiny: LoadedModel, context: Context, recorder: Recorder
) -> None:
    before = {
        name: module.weight.clone() for name, module in tiny.network.named_modules() if isinstance(module, Linear)
    }
    params = Params.model_validate(SMALL | {"scheme": scheme, "double_quant": double, "targets": "*.mlp.*"})
    bitsandbytes.apply(tiny, params, context)
    told = [data for kind, data in recorder.said if kind == "linear"]
    assert len(told) == 3 * 3
    for each in told:
        assert each["weights"] == before[each["name"]].numel()
        # Tables of a few hundred bytes weigh much on the tiny model's linears.
        tables = 8 * (16 * 4 + (256 * 4 if double else 0) + 300) / each["weights"]
        assert bits <= each["bits_per_weight"] < bits + (1 if scheme == "int8" else tables)
        assert 0 < each["error"] < (0.001 if scheme == "int8" else 0.05)
        assert ("outliers" in each) == (scheme == "int8")
        assert len(each["histogram"]["levels"]) == (0 if scheme == "int8" else 16)
        assert sum(each["histogram"]["after"]) == each["weights"]


@pytest.mark.parametrize("shape", [(48, 64), (64, 96)])
def test_shapes_that_four_bits_damage_are_refused_by_name(shape: tuple[int, int]) -> None:
    with pytest.raises(BadParams, match=r"nf4 needs inputs divisible by 64 and outputs by 32; mlp\.up has"):
        Params().check_model({"mlp.up": shape}, 10_000)
    Params(scheme="int8").check_model({"mlp.up": shape}, 10_000)


def test_what_is_left_out_is_named_in_the_config(tiny: LoadedModel, context: Context, tmp_path: Path) -> None:
    model = bitsandbytes.apply(tiny, Params.model_validate(SMALL | {"ignore": "*.down_proj"}), context)
    artifacts.write(model, Recipe(), tmp_path / "artifact")
    config = json.loads((tmp_path / "artifact" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "bitsandbytes"
    assert "model.layers.1.mlp.down_proj" in config["llm_int8_skip_modules"]
    assert "lm_head" in config["llm_int8_skip_modules"]
    mine = logits(model.network)
    stranger = AutoModelForCausalLM.from_pretrained(tmp_path / "artifact", dtype="auto")
    assert apart(logits(stranger), mine) < 0.01


def test_families_whose_linears_are_their_own(context: Context, tmp_path: Path) -> None:
    with pytest.raises(BadParams, match="cannot load Falcon's own linears"):
        Params().check_config({"model_type": "falcon"})
    model = bitsandbytes.apply(
        in_memory(FAMILIES["gpt2"]), Params.model_validate(SMALL | {"ignore": "*.c_proj"}), context
    )
    artifacts.write(model, Recipe(), tmp_path / "artifact")
    mine = logits(model.network)
    assert apart(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "artifact", dtype="auto")), mine) < 0.01
