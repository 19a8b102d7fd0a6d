"""bitsandbytes: what is written is what a stranger computes, sizes are counted right, damage is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from pydantic import JsonValue
from safetensors.torch import load_file, save_file
from torch.nn import Linear
from transformers import AutoModelForCausalLM

from engine import artifacts, headers, models, preflight, runtime, verify
from engine.calibration import walk_blocks
from engine.errors import BadParams
from engine.measure import size
from engine.methods import Context
from engine.models import LoadedModel, blocks
from engine.observing import stretches
from engine.quantize import bitsandbytes
from engine.quantize.bitsandbytes import Params
from engine.records import EventKind, Recipe
from engine.runtime.load import library_kernels
from engine.sizes import Holding
from engine.stranger import Stranger
from tests.conftest import Recorder, in_memory, tiny_config
from tests.engine.quantize.test_smoothquant import apart, logits
from tests.families import FAMILIES

SMALL: dict[str, JsonValue] = {"samples": 4, "sequence_length": 32}
SETTINGS: list[dict[str, JsonValue]] = [
    {}, {"scheme": "fp4", "double_quant": False}, {"scheme": "nf4", "head": True}, {"scheme": "int8", "head": True},
]  # fmt: skip


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


@pytest.mark.parametrize(("threshold", "share"), [(6.0, 0.25), (2.0, 0.78125)])
def test_outliers_are_those_of_the_original_and_told(
    threshold: float, share: float, context: Context, recorder: Recorder
) -> None:
    model = in_memory(tiny_config())
    with torch.no_grad():
        model.network.model.layers[0].input_layernorm.weight[:16] = 50
    params = Params.model_validate(SMALL | {"scheme": "int8", "threshold": threshold})
    found = {
        linear.name: bitsandbytes.outliers(linear, params.threshold)
        for block in walk_blocks(model, context, params, "norm", keep_blocks=False)
        for linear in block.linears
    }
    assert found["model.layers.0.self_attn.q_proj"] == share
    bitsandbytes.apply(model, params, context)
    told = {data["name"]: data["outliers"] for kind, data in recorder.said if kind == "linear"}
    assert told == found
    mean = sum(filter(None, found.values())) / len(found)
    assert any(f"{mean:.2%} of the input channels have outliers" in line for line in recorder.logs())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("settings", [*SETTINGS, {"scheme": "fp4"}, {"double_quant": False}])
def test_in_stretches_a_weight_becomes_what_the_library_makes_of_it_at_once(
    settings: dict[str, JsonValue], dtype: torch.dtype
) -> None:
    params = Params.model_validate(settings)
    weight, bias = 0.02 * torch.randn(1024, 1100).to(dtype).t(), torch.randn(1100, dtype=dtype)
    assert len([*stretches(weight)]) > 1
    theirs: Any
    if params.scheme == "int8":
        theirs = Linear8bitLt(1024, 1100, has_fp16_weights=False)
        theirs.weight = Int8Params(weight.half().contiguous(), requires_grad=False)
    else:
        theirs = Linear4bit(1024, 1100, compress_statistics=params.double_quant, quant_type=params.scheme)
        theirs.weight = Params4bit(
            weight.contiguous(), quant_type=params.scheme, compress_statistics=params.double_quant, module=theirs
        )
    theirs.bias.data = bias
    theirs.to("cpu")
    expected, made = theirs.state_dict(), bitsandbytes.make(weight, bias, params).state_dict()
    assert list(made) == list(expected)
    torch.testing.assert_close(made, expected, rtol=0, atol=0)


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_stream_is_read_once_and_gives_the_tensors_of_a_model_in_memory(
    settings: dict[str, JsonValue], tiny_folder: Callable[..., Path], context: Context, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    params = Params.model_validate(SMALL | settings)
    folder = tiny_folder(tie_word_embeddings=False)
    whole = models.stream(folder)
    whole.load_all()
    bitsandbytes.apply(whole, params, replace(context, folder=tmp_path / "other"))
    artifacts.write(whole, Recipe(), tmp_path / "whole")
    streamed = models.stream(folder)
    read: list[str] = []
    fill = models.Parts.fill
    monkeypatch.setattr(models.Parts, "fill", lambda self, model, part: (read.append(part), fill(self, model, part))[1])
    bitsandbytes.apply(streamed, params, context)
    assert read.count("model.layers.2") == read.count("model.layers.1") == 1
    assert all(parameter.is_meta for parameter in streamed.network.parameters())
    artifacts.write(streamed, Recipe(), tmp_path / "streamed")
    assert tensors(tmp_path / "streamed") == tensors(tmp_path / "whole")
    assert (tmp_path / "streamed/config.json").read_bytes() == (tmp_path / "whole/config.json").read_bytes()
    linked = {file.stat().st_ino for file in (tmp_path / "streamed").glob("*.safetensors")}
    assert {file.stat().st_ino for file in context.folder.glob("block-*")} <= linked
    mine = logits(streamed.network)
    assert logits(streamed.network).equal(mine)  # what a product repacks is not computed with again
    torch.testing.assert_close(logits(whole.network), mine, rtol=0, atol=0)
    assert all(parameter.is_meta for parameter in streamed.network.parameters())
    streamed.load_all()
    torch.testing.assert_close(logits(streamed.network), mine, rtol=0, atol=0)


@pytest.mark.parametrize("settings", SETTINGS)
def test_an_interrupted_one_ends_with_the_same_bytes(
    settings: dict[str, JsonValue], tiny_folder: Callable[..., Path], context: Context, tmp_path: Path
) -> None:
    class Killed(Exception):
        pass

    def end_in_the_third(kind: EventKind, data: dict[str, JsonValue]) -> None:
        if kind == "linear" and data["name"] == "model.layers.2.mlp.up_proj":
            raise Killed

    params = Params.model_validate(SMALL | settings)
    folder = tiny_folder(tie_word_embeddings=False)
    at_once = bitsandbytes.apply(models.stream(folder), params, replace(context, folder=tmp_path / "other"))
    artifacts.write(at_once, Recipe(), tmp_path / "at-once")
    with pytest.raises(Killed):
        bitsandbytes.apply(models.stream(folder), params, replace(context, emit=end_in_the_third))
    assert len(list(context.folder.glob("block-*.safetensors"))) == 2
    said = Recorder()
    resumed = bitsandbytes.apply(models.stream(folder), params, replace(context, emit=said))
    told = [str(data["name"]) for kind, data in said.said if kind == "linear"]
    assert {name.rpartition(".self_attn.")[0] or name.rpartition(".mlp.")[0] for name in told} <= {"model.layers.2", ""}
    artifacts.write(resumed, Recipe(), tmp_path / "resumed")
    manifests = [(tmp_path / name / artifacts.MANIFEST).read_bytes() for name in ("at-once", "resumed")]
    assert manifests[0] == manifests[1]
    assert resumed.kernels == at_once.kernels
    torch.testing.assert_close(logits(resumed.network), logits(at_once.network), rtol=0, atol=0)


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_nothing_computes_on_the_librarys_modules_before_they_are_written(
    scheme: str, tiny_folder: Callable[..., Path], context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    def computes(self: object, x: object) -> None:
        raise AssertionError("a product before it was written")

    for name in ("Linear4bit", "Linear8bitLt"):
        monkeypatch.setattr(f"bitsandbytes.nn.{name}.forward", computes)
    params = Params.model_validate(SMALL | {"scheme": scheme, "head": True})
    bitsandbytes.apply(models.stream(tiny_folder(tie_word_embeddings=False)), params, context)


@pytest.mark.parametrize("settings", [*SETTINGS, {"scheme": "fp4", "ignore": "*.down_proj *.0.*"}])
def test_a_stranger_reads_it_part_by_part(
    settings: dict[str, JsonValue], tiny_folder: Callable[..., Path], context: Context, tmp_path: Path
) -> None:
    model = models.stream(tiny_folder(tie_word_embeddings=False))
    bitsandbytes.apply(model, Params.model_validate(SMALL | settings), context)
    artifacts.write(model, Recipe(), tmp_path / "artifact")
    stranger = models.stream(tmp_path / "artifact", "bfloat16", "cpu", Stranger)
    torch.testing.assert_close(logits(stranger.network), logits(model.network), rtol=0, atol=0)
    assert library_kernels(stranger.network).keys() == model.kernels.keys()
    save_file(verify.probe(model), tmp_path / "expected.safetensors")
    request: dict[str, JsonValue] = {
        "folder": str(tmp_path / "artifact"), "expected": str(tmp_path / "expected.safetensors"), "device": "cpu",
        "streamed": True,
    }  # fmt: skip
    assert "with transformers" in verify.verify({**request, "bytes": 0})
    assert "part by part" in verify.verify({**request, "bytes": 1 << 50})


def tensors(folder: Path) -> dict[str, tuple[torch.dtype, bytes]]:
    """The tensors of a folder's files by name, with every byte."""
    found = {name: each for file in folder.glob("*.safetensors") for name, each in load_file(file).items()}
    return {name: (each.dtype, each.reshape(-1).view(torch.uint8).numpy().tobytes()) for name, each in found.items()}


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
