"""Every decoder family, from weights in memory to a folder that stock transformers and the packed runtime read."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from pydantic import JsonValue
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from engine import artifacts, export, headers, models, places, preflight, runtime, sizes, verify
from engine.errors import BadArtifact, BadModel, BadParams
from engine.methods import Context
from engine.models import LoadedModel, blocks, linears, load_tokenizer
from engine.origin import FolderOrigin
from engine.packing import QuantizedWeight
from engine.quantize import awq, gptq, rtn
from engine.records import Recipe
from engine.verify import distance_of
from tests.conftest import Recorder, in_memory
from tests.families import FAMILIES, MIXTURES

IDS = torch.randint(3, 1280, (2, 24), generator=torch.Generator().manual_seed(7))


@torch.inference_mode()
def logits(network: PreTrainedModel) -> torch.Tensor:
    found: torch.Tensor = network(input_ids=IDS, use_cache=False).logits
    return found


def of_blocks(model: LoadedModel) -> list[str]:
    prefix, modules = blocks(model.network)
    return [f"{prefix}.{n}.{path}" for n, module in enumerate(modules) for path, _ in linears(module)]


@pytest.mark.parametrize("family", FAMILIES | MIXTURES)
def test_stock_transformers_computes_the_same_logits(family: str, context: Context, tmp_path: Path) -> None:
    model = rtn.apply(in_memory((FAMILIES | MIXTURES)[family]), rtn.Params(bits=4, group_size=32), context)
    assert list(model.quantized) == of_blocks(model)
    artifacts.write(model, Recipe(), tmp_path / "artifact")
    folder = tmp_path / "artifact"
    if headers.is_own(json.loads((folder / "config.json").read_text())):
        folder = tmp_path / "dense"
        export.exporter("dense")(tmp_path / "artifact", folder)
    assert (folder.name == "dense") == (family in ("gpt2", "falcon"))
    stranger = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", attn_implementation=model.network.config._attn_implementation
    )
    if family in FAMILIES:
        torch.testing.assert_close(logits(stranger), logits(model.network), rtol=0, atol=0)
    else:  # fused experts sum in another order
        ours, theirs = logits(model.network).flatten(0, 1), logits(stranger).flatten(0, 1)
        assert distance_of(theirs, ours, mixture=True) < 0.01


@pytest.mark.parametrize("family", FAMILIES | MIXTURES)
def test_gptq_reaches_every_linear_and_the_runtime_reads_it(family: str, context: Context, tmp_path: Path) -> None:
    params = gptq.Params(bits=4, group_size=32, samples=4, sequence_length=32)
    model = gptq.apply(in_memory((FAMILIES | MIXTURES)[family]), params, context)
    assert list(model.quantized) == of_blocks(model)
    assert all(isinstance(weight, QuantizedWeight) for weight in model.quantized.values())
    artifacts.write(model, Recipe(), tmp_path / "artifact")
    loaded = runtime.load(tmp_path / "artifact")
    ours, dense = logits(loaded.network).double(), logits(model.network).double()
    assert distance_of(ours.flatten(0, 1), dense.flatten(0, 1), mixture=family in MIXTURES) < 0.03
    assert set(loaded.kernels) == set(model.quantized)
    assert not any("simulated" in kernel for kernel in loaded.kernels.values())


def mixture(tmp_path: Path, family: str = "mixtral", **changes: object) -> Path:
    """A folder with a tiny mixture as `transformers` writes it."""
    config = copy.deepcopy(MIXTURES[family])
    config.update(changes)
    stock = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    stock.save_pretrained(tmp_path / "model")
    load_tokenizer(places.DEMO / "model").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    "grid", [{"bits": 3}, {"granularity": "channel"}, {"bits": 8, "granularity": "tensor"}], ids=str
)
@pytest.mark.parametrize("family", MIXTURES)
def test_transformers_fuses_the_packed_experts_again(
    family: str, grid: dict[str, object], context: Context, tmp_path: Path
) -> None:
    model = models.stream(mixture(tmp_path, family))
    rtn.apply(model, rtn.Params.model_validate({"group_size": 32} | grid), context)
    artifacts.write(model, Recipe(), tmp_path / "artifact")
    stranger = AutoModelForCausalLM.from_pretrained(tmp_path / "artifact", dtype="auto")
    ours, theirs = logits(model.network).flatten(0, 1), logits(stranger).flatten(0, 1)
    assert distance_of(theirs, ours, mixture=True) < 0.01


def test_every_expert_is_calibrated_or_reported(context: Context, recorder: Recorder, tmp_path: Path) -> None:
    model = models.stream(mixture(tmp_path))
    router = model.network.get_submodule("model.layers.0.mlp.gate")

    def never_the_last(module: nn.Module, args: object, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (*output[:2], output[2] % 3)

    router.register_forward_hook(never_the_last)
    gptq.apply(model, gptq.Params(group_size=32, samples=8, sequence_length=64), context)
    notes = {str(data["name"]): data["note"] for kind, data in recorder.said if kind == "linear"}
    assert len(notes) == 3 * (4 + 4 * 3)
    unseen = {name for name, note in notes.items() if note == "rounded to nearest instead, no token reached it"}
    assert unseen == {f"model.layers.0.mlp.experts.3.{leaf}" for leaf in ("w1", "w2", "w3")}


def test_experts_that_compute_every_token_are_announced_with_what_it_takes(tmp_path: Path) -> None:
    folder = mixture(tmp_path)
    steps = ({"prune/wanda": {"experts": "all"}}, {"quantize/gptq": {"experts": "all", "group_size": 32}})
    for step in steps:
        notes = preflight.estimate(Recipe.model_validate({"model": str(folder), "steps": [step]})).notes
        assert "Each expert calibrates on 2 times the tokens that it gets on average." in " ".join(notes)
    shape = headers.inspect(FolderOrigin(folder))
    assert sizes.readers(shape) == [128] * 4 + [64] * (2 + 4)  # of each expert its down; its gate and up; q, k, v; o
    assert sizes.readers(shape, together=True) == [128] * 4 + [64] * (2 + 1)


def test_awq_scales_experts_and_keeps_every_note_on_them(context: Context, recorder: Recorder, tmp_path: Path) -> None:
    model = models.stream(mixture(tmp_path))
    before = logits(model.network)
    awq.apply(model, awq.Params(bits=8, group_size=32, samples=4, sequence_length=32), context)
    assert distance_of(logits(model.network).flatten(0, 1), before.flatten(0, 1), mixture=True) < 0.02
    found = [data for kind, data in recorder.said if kind == "linear" and ".experts." in str(data["name"])]
    assert len(found) == 3 * 4 * 3
    assert all(str(each["note"]).endswith(f"only {each['tokens']} tokens reached it") for each in found)
    scaled = {str(each["name"])[-2:] for each in found if not str(each["note"]).startswith("no scale: ")}
    assert scaled == {"w1", "w2", "w3"}  # what reads the norm, and what reads its product


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ({"quantize/rtn": {"symmetric": False}}, "experts are stored without zero points"),
        ({"quantize/rtn": {"ignore": "*.experts.1.*"}}, r"27 of 36 linears of experts .* Select them all"),
        ({"quantize/gptq": {"ignore": "*.experts.*"}}, r"0 of 36 linears of experts .* Select them all"),
        ({"quantize/smoothquant": {}}, "inputs of experts are rounded"),
        ({"quantize/zeroquant": {"group_size": 32}}, "inputs of experts are rounded"),
        ({"quantize/fp8": {"activations": "token"}}, "inputs of experts are rounded"),
        ({"quantize/mixed": {}}, r"the same bits.* use another method"),
        ({"quantize/bitsandbytes": {"scheme": "int8"}}, "linears only"),
    ],
    ids=str,
)
def test_what_no_file_can_say_of_experts_is_refused(step: dict[str, object], words: str, tmp_path: Path) -> None:
    recipe = Recipe.model_validate({"model": str(mixture(tmp_path)), "steps": [step]})
    with pytest.raises(BadParams, match=words) as caught:
        preflight.check(recipe)
    assert "\n" not in str(caught.value)


def test_experts_can_be_left_as_they_are_by_a_library(tmp_path: Path) -> None:
    step = {"quantize/bitsandbytes": {"scheme": "int8", "ignore": "*.experts.*"}}
    preflight.check(Recipe.model_validate({"model": str(mixture(tmp_path)), "steps": [step], "measure": ["size"]}))


def test_mixtures_of_an_unknown_layout_are_refused_by_name(tmp_path: Path) -> None:
    folder = mixture(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt_oss"}))
    with pytest.raises(BadModel, match=r"mixture of 4 experts of the type gpt_oss"):
        preflight.check(Recipe.model_validate({"model": str(folder), "steps": [{"quantize/rtn": {}}]}))


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("family", MIXTURES)
def test_an_expert_or_a_router_that_is_not_the_saved_one_is_found(
    family: str, streamed: bool, context: Context, tmp_path: Path
) -> None:
    model = models.stream(mixture(tmp_path, family))
    rtn.apply(model, rtn.Params(group_size=32), context)
    artifact = tmp_path / "artifact"
    artifacts.write(model, Recipe(), artifact)
    expected = verify.probe(model)
    request: dict[str, JsonValue] = {
        "folder": str(artifact), "expected": str(tmp_path / "expected"), "device": "cpu", "streamed": streamed,
        "bytes": (1 << 50) * streamed,
    }  # fmt: skip
    save_file(expected, tmp_path / "expected")
    assert "read back" in verify.verify(request)
    file = sorted(artifact.glob("model-*"))[2]  # a block
    saved = load_file(file)
    for part, words in (("experts.2.", "Number 2 of the experts of model.layers."), (".gate.weight", "the router of")):
        name = next(key for key in saved if part in key and key.endswith(("weight_scale", ".gate.weight")))
        save_file(saved | {name: -saved[name]}, file, metadata={"format": "pt"})
        (artifact / artifacts.MANIFEST).unlink()
        artifacts.write_manifest(artifact, Recipe())
        with pytest.raises(BadArtifact, match=words):
            verify.verify(request)
