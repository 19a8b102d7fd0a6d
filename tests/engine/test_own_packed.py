"""Packed GPT-2 and Falcon: truly small, computed by kernels, read by all of ours, refused by stock `transformers`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from pydantic import JsonValue
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from engine import artifacts, export, headers, methods, models, preflight, runtime, verify
from engine.bitmask import SPARSE_KEY
from engine.errors import BadModel, Cancelled, InputError
from engine.measure import size
from engine.methods import Context
from engine.models import LoadedModel
from engine.own_packed import BEGUN, PACKED_KEY
from engine.own_packed import FAMILIES as OWN
from engine.prune import low_rank, magnitude
from engine.quantize import rtn
from engine.records import Recipe
from engine.runtime.linear import PackedLinear
from engine.runtime.native.library import SWITCH
from engine.sizes import Holding
from tests.conftest import Recorder, in_memory, saved
from tests.families import FAMILIES

IDS = torch.arange(3, 27)[None]
FOUR = rtn.Params(bits=4, group_size=32)
TESTED = ("gpt2", "falcon")
SMALL = {
    "vocab_size": 1280, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "head_dim": 16, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "lru_width": 64, "cls_token_id": 0, "sep_token_id": 0,
}  # fmt: skip


@torch.inference_mode()
def logits(model: LoadedModel) -> Tensor:
    found: Tensor = model.network(input_ids=IDS, use_cache=False).logits
    return found


def written(model: LoadedModel, folder: Path) -> Path:
    artifacts.write(model, Recipe(), folder)
    return folder


def verified(model: LoadedModel, folder: Path) -> str:
    """What reading back an artifact says."""
    save_file(verify.probe(model), folder.with_suffix(".expected"))
    return verify.verify({
        "folder": str(folder), "expected": str(folder.with_suffix(".expected")), "device": "cpu", "streamed": False,
        "bytes": 0,
    })  # fmt: skip


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("family", TESTED)
def test_it_is_small_and_kernels_compute_it(
    family: str, ours: bool, context: Context, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if not ours:
        monkeypatch.setenv(SWITCH, "0")
    original = headers.inspect(saved(FAMILIES[family], tmp_path / "model"))
    model = rtn.apply(in_memory(FAMILIES[family]), FOUR, context)
    folder = written(model, tmp_path / "artifact")
    weights = sum(weight.codes.numel() for weight in model.quantized.values())
    # 4 bits and a 16-bit scale per 32 weights in the place of 16 bits, and two int64 of shape for each linear.
    expected = original.bytes - weights * (16 - 4.5) / 8 + 16 * len(model.quantized)
    assert headers.inspect(folder).bytes == expected
    assert Holding(original, 2).after(FOUR).file_bytes() == pytest.approx(expected, rel=0.01)
    counted = {each.name: each.value for each in size.measure(folder)}
    assert counted["size.parameters"] == model.network.num_parameters()
    loaded = runtime.load(folder)
    packed = [loaded.network.get_submodule(name) for name in model.quantized]
    assert ours or {type(each) for each in packed} == {PackedLinear}
    assert loaded.kernels == {
        name: str(getattr(each, "kernel", "")) for name, each in zip(model.quantized, packed, strict=True)
    }
    assert all("int4" in kernel for kernel in loaded.kernels.values())
    assert loaded.network.num_parameters() <= model.network.num_parameters() - weights
    assert float((logits(loaded) - logits(model)).norm() / logits(model).norm()) < 0.03
    assert verified(model, folder).startswith("read back by Maquette's own reader")


@pytest.mark.parametrize("family", TESTED)
def test_stock_transformers_refuses_it_loudly(family: str, context: Context, tmp_path: Path) -> None:
    for name, params in (("a", FOUR), ("b", rtn.Params(bits=8, granularity="channel", head=True, embeddings=True))):
        folder = written(
            rtn.apply(in_memory(FAMILIES[family]), params, dataclasses.replace(context, folder=tmp_path / f"{name}-b")),
            tmp_path / name,
        )
        with pytest.raises(RuntimeError, match="mismatch"):
            AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("method", "given", "kernel"),
    [
        ("rtn", {"bits": 3, "group_size": 32, "symmetric": False}, "int4"),
        ("rtn", {"bits": 8, "granularity": "tensor"}, "int8"),
        ("fp8", {"activations": "token"}, "simulated"),
        ("smoothquant", {"activations": "tensor"}, "int8-int8"),
        ("zeroquant", {"bits": 4, "group_size": 32}, "inputs rounded to 8 bits"),
    ],
)
@pytest.mark.parametrize("family", TESTED)
def test_every_kind_of_grid_is_read_back(
    family: str, method: str, given: dict[str, JsonValue], kernel: str, context: Context, tmp_path: Path
) -> None:
    chosen = methods.get(f"quantize/{method}")
    few: dict[str, JsonValue] = {"samples": 4, "sequence_length": 32}
    params = chosen.check(given | {key: few[key] for key in few if key in chosen.params.model_fields})
    model = chosen.apply(models.stream(saved(FAMILIES[family], tmp_path / "model")), params, context)
    folder = written(model, tmp_path / "artifact")
    assert verified(model, folder).endswith("logits 0.00% apart")
    loaded, again = runtime.load(folder), runtime.load_dense(folder)
    assert set(loaded.kernels) == set(model.quantized)
    assert all(kernel in each for each in loaded.kernels.values())
    assert float((logits(loaded) - logits(model)).norm() / logits(model).norm()) < 0.05
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)
    assert written(again, tmp_path / "again").joinpath(artifacts.MANIFEST).exists()
    assert headers.inspect(tmp_path / "again").bytes == headers.inspect(folder).bytes
    if params.rounds_inputs():
        with pytest.raises(BadModel, match="inputs of its linears are rounded to 8 bits"):
            export.exporter("dense")(folder, tmp_path / "dense")
        return
    export.exporter("dense")(folder, tmp_path / "dense")
    assert "from_pretrained" in (tmp_path / "dense" / "README.md").read_text()
    stock = models.load(tmp_path / "dense")
    torch.testing.assert_close(logits(stock), logits(model), rtol=0, atol=0)


@pytest.mark.parametrize("family", TESTED)
def test_a_resumed_run_writes_the_same_bytes(family: str, context: Context, recorder: Recorder, tmp_path: Path) -> None:
    source, params = saved(FAMILIES[family], tmp_path / "model"), rtn.Params(bits=3, group_size=32, symmetric=False)

    def run(kept: Path, stop_at: int = 99) -> bytes:
        def check() -> None:
            if len(list(kept.glob("block-*.safetensors"))) == stop_at:
                raise Cancelled("stopped")

        given = dataclasses.replace(context, folder=kept, check_cancelled=check)
        folder = written(rtn.apply(models.stream(source), params, given), kept.with_suffix(".artifact"))
        return (folder / artifacts.MANIFEST).read_bytes()

    whole = run(tmp_path / "whole")
    with pytest.raises(Cancelled):
        run(tmp_path / "broken", stop_at=2)
    assert run(tmp_path / "broken") == whole
    assert "reused 2 finished blocks" in recorder.logs()


def test_steps_before_and_after_it(context: Context, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(context.calibration.read_text()[:6000])
    steps: dict[str, dict[str, JsonValue]] = {
        "prune/magnitude": {"sparsity": 0.6, "storage": "bitmask"},
        "quantize/rtn": {"group_size": 32, "targets": "*.mlp.*"},
        "distill/repair": {
            "scope": "norms and scales", "steps": 2, "batch": 2, "sequence_length": 16, "text": str(text),
        },
    }  # fmt: skip
    model = models.stream(saved(FAMILIES["gpt2"], tmp_path / "model"))
    for name, given in steps.items():
        method, at = methods.get(name), dataclasses.replace(context, folder=tmp_path / name.replace("/", "-"))
        with torch.no_grad():
            model = method.apply(model, method.check(given), at)
    folder = written(model, tmp_path / "artifact")
    assert set(runtime.load(folder).kernels) == {
        f"transformer.h.{n}.mlp.{leaf}" for n in range(3) for leaf in ("c_fc", "c_proj")
    }
    assert json.loads((folder / "config.json").read_text()).keys() >= {PACKED_KEY, SPARSE_KEY}
    torch.testing.assert_close(logits(runtime.load_dense(folder)), logits(model), rtol=0, atol=0)
    export.exporter("dense")(folder, tmp_path / "dense")
    torch.testing.assert_close(logits(models.load(tmp_path / "dense")), logits(model), rtol=0, atol=0)


def test_products_are_packed_too(context: Context, tmp_path: Path) -> None:
    some = low_rank.Params(ratio=0.8, multiple=32, samples=4, sequence_length=32, targets="*.mlp.*")
    model = low_rank.apply(in_memory(FAMILIES["gpt2"]), some, context)
    rtn.apply(model, FOUR, dataclasses.replace(context, folder=tmp_path / "packed"))
    folder = written(model, tmp_path / "artifact")
    assert any(name.endswith(".down") for name in model.quantized)
    assert set(runtime.load(folder).kernels) == set(model.quantized)
    assert "own reader" in verified(model, folder)
    export.exporter("dense")(folder, tmp_path / "dense")
    found, expected = logits(models.load(tmp_path / "dense")), logits(model)
    assert float((found - expected).norm() / expected.norm()) < 0.02


def test_it_is_a_quantized_model_to_whoever_reads_its_config(context: Context, tmp_path: Path) -> None:
    folder = written(rtn.apply(in_memory(FAMILIES["gpt2"]), FOUR, context), tmp_path / "artifact")
    assert headers.inspect(folder).config.keys() & headers.QUANTIZED == {PACKED_KEY}
    asked: dict[str, JsonValue] = {"model": str(folder), "measure": ["size"]}
    preflight.check(Recipe.model_validate(asked))
    with pytest.raises(InputError, match="already quantized"):
        preflight.check(Recipe.model_validate(asked | {"steps": ["quantize/rtn"]}))
    for name in ("gptq", "gptq_v2", "awq"):
        with pytest.raises(BadModel, match=r"holds linears of gpt2.* Export it as dense"):
            export.exporter(name)(folder, tmp_path / name)


def test_zeros_alone_need_no_format_of_ours(context: Context, tmp_path: Path) -> None:
    folder = written(magnitude.apply(in_memory(FAMILIES["gpt2"]), magnitude.Params(), context), tmp_path / "artifact")
    assert not headers.is_own(json.loads((folder / "config.json").read_text()))
    AutoModelForCausalLM.from_pretrained(folder)


def test_damage_is_one_line(context: Context, tmp_path: Path) -> None:
    folder = written(rtn.apply(in_memory(FAMILIES["gpt2"]), FOUR, context), tmp_path / "artifact")
    file = sorted(folder.glob("*.safetensors"))[-1]
    tensors = load_file(file)
    name = next(key for key in tensors if key.endswith("c_fc.weight_packed"))
    without = {key: each for key, each in tensors.items() if key != name}
    for each in ({**without, name: tensors[name][1:].clone()}, without):
        save_file(each, file, metadata={"format": "pt"})
        for read in (runtime.load, runtime.load_dense):
            with pytest.raises(BadModel, match="do not fit 256 x 64") as caught:
                read(folder)
            assert "\n" not in str(caught.value)
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {PACKED_KEY: {"format": "zip"}}))
    with pytest.raises(BadModel, match="does not say how"):
        runtime.load_dense(folder)


def test_the_families_that_are_named_are_those_that_need_it() -> None:
    from engine.shards import needs_own_format

    assert {family for family in FAMILIES if needs_own_format(in_memory(FAMILIES[family]).network)} == set(OWN) & set(
        FAMILIES
    )


@pytest.mark.parametrize("family", BEGUN)
def test_families_that_begin_with_numbers_of_their_own_are_read_back(
    family: str, context: Context, tmp_path: Path
) -> None:
    kind = type(AutoConfig.for_model(family))
    model = in_memory(kind(**{key: value for key, value in SMALL.items() if hasattr(kind(), key)}))
    rtn.apply(model, FOUR, context)
    folder = written(model, tmp_path / "artifact")
    assert "by Maquette's own reader" in verified(model, folder)
    torch.testing.assert_close(logits(runtime.load(folder)), logits(model), rtol=0.05, atol=0.05)
