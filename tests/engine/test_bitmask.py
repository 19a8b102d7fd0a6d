"""Sparse storage: exact, read by everything of ours, refused loudly by stock `transformers`, and truly smaller."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from engine import artifacts, headers, models, runtime, verify
from engine.bitmask import pack_bitmask, packed_bytes, unpack_bitmask
from engine.errors import BadModel
from engine.measure import size
from engine.methods import Context
from engine.models import LoadedModel
from engine.prune import magnitude
from engine.quantize import gptq
from engine.records import Recipe
from tests.conftest import Recorder, in_memory, tiny_config
from tests.families import FAMILIES, MIXTURES

Maker = Callable[..., Path]
IDS = torch.arange(3, 20)[None]
HALF = magnitude.Params(sparsity=0.5, storage="bitmask")


@torch.inference_mode()
def logits(model: LoadedModel) -> Tensor:
    found: Tensor = model.network(input_ids=IDS, use_cache=False).logits
    return found


def saved(model: LoadedModel, folder: Path) -> Path:
    artifacts.write(model, Recipe(), folder)
    return folder


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 7), (5, 16), (4, 65)])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_a_weight_survives(rows: int, columns: int, share: float) -> None:
    dice = torch.Generator().manual_seed(rows)
    weight = (torch.randn(rows, columns, generator=dice) * (torch.rand(rows, columns, generator=dice) < share)).half()
    stored = pack_bitmask(weight)
    parts = (stored["weight_bitmask"], stored["weight_values"], stored["weight_shape"])
    torch.testing.assert_close(unpack_bitmask(*parts), weight, rtol=0, atol=0)
    assert sum(part.nbytes for part in parts) == packed_bytes(weight)


def test_the_bits_are_those_of_the_document() -> None:
    stored = pack_bitmask(torch.tensor([[0.0, 2.0, 0.0, 3.0]]))
    assert stored["weight_bitmask"].tolist() == [[0b1010]]
    assert stored["weight_values"].tolist() == [2.0, 3.0]
    with pytest.raises(ValueError, match="2 bits set, there are 1"):
        unpack_bitmask(stored["weight_bitmask"], torch.ones(1), stored["weight_shape"])
    with pytest.raises(ValueError, match="does not fit a weight of 1 x 9"):
        unpack_bitmask(stored["weight_bitmask"], torch.ones(2), torch.tensor([1, 9]))


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "falcon", "bloom", "mixtral", "gemma2"])
def test_every_reader_of_ours_reads_it(family: str, context: Context, tmp_path: Path) -> None:
    model = magnitude.apply(in_memory((FAMILIES | MIXTURES)[family]), HALF, context)
    folder = saved(model, tmp_path / "artifact")
    expected = logits(model)
    readers = (models.load(folder), models.stream(folder), runtime.load(folder))
    for read in readers:
        torch.testing.assert_close(logits(read), expected, rtol=0, atol=0)
    assert readers[0].pruned == readers[1].pruned == model.pruned
    shape = headers.inspect(folder)
    assert shape.parameters == sum(p.numel() for p in {id(p): p for p in model.network.parameters()}.values())
    assert shape.bytes < 2 * shape.parameters
    if family in FAMILIES:
        assert set(shape.linears) >= model.pruned


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_stock_transformers_refuses_it_loudly(family: str, context: Context, tmp_path: Path) -> None:
    folder = saved(magnitude.apply(in_memory((FAMILIES | MIXTURES)[family]), HALF, context), tmp_path / "artifact")
    with pytest.raises((RuntimeError, ValueError, IndexError), match=r"mismatch|conversion|shape|dimension"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_the_size_is_that_of_the_files(context: Context, tmp_path: Path) -> None:
    found = {}
    for storage in ("dense", "bitmask"):
        model = in_memory(tiny_config())
        params = magnitude.Params.model_validate({"sparsity": 0.75, "storage": storage})
        magnitude.apply(model, params, Context("cpu", 0, tmp_path / storage, tmp_path, context.calibration,
                                               context.emit, context.check_cancelled))  # fmt: skip
        found[storage] = {m.name: m.value for m in size.measure(saved(model, tmp_path / f"{storage}-artifact"))}
    dense, sparse = found["dense"], found["bitmask"]
    assert dense["size.parameters"] == sparse["size.parameters"]
    assert dense["size.sparsity"] == sparse["size.sparsity"] == 0.75
    linears = 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)
    # One bit for each weight and 16 for each fourth, in place of 16; and the shape of each linear.
    expected = dense["size.bits_per_weight"] * dense["size.parameters"] - linears * (16 - 5) + 21 * 128
    assert sparse["size.bits_per_weight"] * sparse["size.parameters"] == pytest.approx(expected)
    assert sparse["size.bytes"] < dense["size.bytes"] - linears * 10 / 8


def test_a_weight_with_few_zeros_stays_dense(context: Context, tmp_path: Path) -> None:
    few = magnitude.Params(sparsity=0.05, storage="bitmask")
    folder = saved(magnitude.apply(in_memory(tiny_config()), few, context), tmp_path / "artifact")
    assert not headers.is_own(json.loads((folder / "config.json").read_text()))
    AutoModelForCausalLM.from_pretrained(folder)


def test_it_is_verified_resumed_and_quantized(
    tiny_folder: Maker, context: Context, recorder: Recorder, tmp_path: Path
) -> None:
    source = tiny_folder()
    model = magnitude.apply(models.stream(source), HALF, context)
    folder = saved(model, tmp_path / "artifact")
    expected = tmp_path / "expected.safetensors"
    save_file(verify.probe(model), expected)
    asked = {"folder": str(folder), "device": "cpu", "expected": str(expected), "streamed": True, "bytes": 0}
    assert verify.verify(asked) == ("read back by Maquette's own reader, for the format is its own: logits 0.00% apart")
    again = saved(magnitude.apply(models.stream(source), HALF, context), tmp_path / "again")
    assert "reused 3 finished blocks" in recorder.logs()
    assert (again / artifacts.MANIFEST).read_bytes() == (folder / artifacts.MANIFEST).read_bytes()
    pruned = models.stream(folder)
    later = dataclasses.replace(context, folder=tmp_path / "later")
    gptq.apply(pruned, gptq.Params(samples=4, sequence_length=16, group_size=32), later)
    packed = saved(pruned, tmp_path / "packed")
    assert not headers.is_own(json.loads((packed / "config.json").read_text()))
    assert len(runtime.load(packed).kernels) == 21
    zeros = {m.name: m.value for m in size.measure(folder)}["size.sparsity"]
    assert zeros == 0.5


def test_damage_is_one_line(context: Context, tmp_path: Path) -> None:
    folder = saved(magnitude.apply(in_memory(tiny_config()), HALF, context), tmp_path / "artifact")
    file = sorted(folder.glob("*.safetensors"))[-1]
    tensors = load_file(file)
    name = next(key for key in tensors if key.endswith("weight_values"))
    for broken, words in (
        (tensors | {name: tensors[name][1:].clone()}, "bits set"),
        ({key: each for key, each in tensors.items() if key != name}, "incomplete"),
    ):
        save_file(broken, file, metadata={"format": "pt"})
        with pytest.raises(BadModel, match=words):
            models.load(folder)
