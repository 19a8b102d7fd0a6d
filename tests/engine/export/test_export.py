"""Exports: read by a slow, obvious reader of each format, they hold exactly the values of the artifact."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.peers import products
from engine import artifacts, export
from engine.errors import BadArtifact, InputError, UnknownName
from engine.export import _folder, awq, gptq
from engine.methods import Context
from engine.models import LoadedModel
from engine.packing import QuantizedWeight
from engine.quantize import gptq as gptq_method
from engine.quantize import rtn, smoothquant
from engine.records import Recipe
from engine.shards import TensorFiles
from tests.conftest import in_memory, tiny_config
from tests.families import MIXTURES

STRANGER = "MAQUETTE_GPTQMODEL_PYTHON"  # the interpreter of an environment that has gptqmodel
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def fields(words: Tensor, bits: int, count: int) -> list[int]:
    """`count` numbers of `bits` bits from a row of int32 words, dense from the lowest bit."""
    whole = sum((word & 0xFFFFFFFF) << (32 * number) for number, word in enumerate(words.tolist()))
    return [(whole >> (bits * i)) & (2**bits - 1) for i in range(count)]


def read_gptq(stored: dict[str, Tensor], bits: int, version: int) -> tuple[Tensor, Tensor]:
    """Codes (N, K) and zero points (N, G), one by one."""
    columns, (groups, rows) = len(stored["g_idx"]), stored["scales"].shape
    codes = torch.tensor([fields(stored["qweight"][:, n], bits, columns) for n in range(rows)])
    zero = torch.tensor([fields(stored["qzeros"][g], bits, rows) for g in range(groups)]).t()
    return codes, zero + (1 if version == 1 else 0)


def read_awq(stored: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Codes (N, K) and zero points (N, G): nibble i of word c is output 8 c + AWQ_ORDER[i]."""

    def rows_of(words: Tensor) -> Tensor:
        found = torch.zeros(words.shape[1] * 8, words.shape[0], dtype=torch.int64)
        for i, output in enumerate(AWQ_ORDER):
            found[output::8] = ((words >> (4 * i)) & 15).t()
        return found

    return rows_of(stored["qweight"]), rows_of(stored["qzeros"])


def values(codes: Tensor, zero: Tensor, stored: dict[str, Tensor], index: Tensor) -> Tensor:
    """w[n, k] = (q[n, k] - z[n, g]) s[g, n] with g the group that `index` gives k."""
    return (codes - zero[:, index]) * stored["scales"].float().t()[:, index]


def random_weight(bits: int, symmetric: bool, lowest: int = 0) -> QuantizedWeight:
    """Every code, and every zero point from `lowest`, somewhere in a (32, 64) weight with groups of 16."""
    dice = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (32, 64), generator=dice, dtype=torch.uint8)
    zero = torch.randint(lowest, 2**bits, (32, 4), generator=dice, dtype=torch.uint8)
    scale = torch.rand(32, 4, generator=dice).add_(0.01).bfloat16()
    return QuantizedWeight(codes, scale, torch.full_like(zero, 2 ** (bits - 1)) if symmetric else zero, bits, symmetric)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", gptq.BITS)
def test_gptq_holds_every_code(bits: int, symmetric: bool, version: int) -> None:
    weight = random_weight(bits, symmetric, lowest=version % 2)
    stored = gptq.tensors(weight, version)
    codes, zero = read_gptq(stored, bits, version)
    torch.testing.assert_close(codes.to(torch.uint8), weight.codes, rtol=0, atol=0)
    torch.testing.assert_close(zero.to(torch.uint8), weight.zero, rtol=0, atol=0)
    dense = values(codes, zero, stored, stored["g_idx"]).to(torch.bfloat16)
    torch.testing.assert_close(dense, weight.dequantize(), rtol=0, atol=0)


def test_the_words_of_the_first_version_are_those_of_the_documents() -> None:
    weight = random_weight(4, symmetric=True)
    for version, word in ((1, 0x77777777), (2, 0x88888888)):
        words = gptq.tensors(weight, version)["qzeros"]
        assert words.shape == (4, 32 * 4 // 32)
        assert {int(number) & 0xFFFFFFFF for number in words.flatten()} == {word}


@pytest.mark.parametrize("symmetric", [True, False])
def test_awq_holds_every_code(symmetric: bool) -> None:
    weight = random_weight(4, symmetric)
    stored = awq.tensors(weight)
    codes, zero = read_awq(stored)
    torch.testing.assert_close(codes.to(torch.uint8), weight.codes, rtol=0, atol=0)
    torch.testing.assert_close(zero.to(torch.uint8), weight.zero, rtol=0, atol=0)
    example = awq.interleave(torch.arange(8)[None])[0].tolist()
    assert sum(code << (4 * i) for i, code in enumerate(example)) == 0x75316420


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_mixtrals_experts_are_named_as_its_checkpoints_name_them(name: str, context: Context, tmp_path: Path) -> None:
    model = in_memory(MIXTURES["mixtral"])
    rtn.apply(model, rtn.Params(group_size=32, ignore="*.o_proj"), context)
    folder = exported(model, name, tmp_path)
    files = TensorFiles.of_folder(folder)
    experts = {key for key in files.names if ".experts." in key}
    assert len({key.rpartition(".")[0] for key in experts}) == 3 * 4 * 3
    assert all(".block_sparse_moe.experts." in key and ".mlp." not in key for key in experts)
    assert any(key.endswith(".block_sparse_moe.gate.weight") for key in files.names)
    dynamic = json.loads((folder / "config.json").read_text())["quantization_config"]["dynamic"]
    left = {key for key in files.names if any(re.match(p[2:], key.removesuffix(".weight")) for p in dynamic)}
    assert {key.split(".")[-2] for key in left} == {"o_proj", "gate"}


def exported(model: LoadedModel, name: str, tmp_path: Path) -> Path:
    artifacts.write(model, Recipe(), tmp_path / "artifact")
    export.exporter(name)(tmp_path / "artifact", tmp_path / name)
    return tmp_path / name


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    assert set(found) == set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"])
    return found


def check_values(folder: Path, model: LoadedModel, bits: Callable[[str], int], version: int) -> None:
    """Every packed linear decodes to what was in memory; every other tensor is there as it was."""
    tensors = stored_tensors(folder)
    state = model.network.state_dict()
    for name in model.quantized:
        parts = ("qweight", "qzeros", "scales", "g_idx")
        stored = {part: tensors.pop(f"{name}.{part}") for part in parts if f"{name}.{part}" in tensors}
        codes, zero = read_gptq(stored, bits(name), version) if "g_idx" in stored else read_awq(stored)
        columns = codes.shape[1]
        index = stored.get("g_idx", torch.arange(columns) // (columns // zero.shape[1]))
        dense = values(codes, zero, stored, index).to(torch.bfloat16)
        torch.testing.assert_close(dense, state[f"{name}.weight"], rtol=0, atol=0)
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=0)
    assert {n for n in state if n.removesuffix(".weight") not in model.quantized} - set(tensors) <= {"lm_head.weight"}


GRIDS = [
    *({"bits": bits, "group_size": 32, "symmetric": s} for bits in gptq.BITS for s in (True, False)),
    *({"bits": 4, "granularity": kind, "symmetric": s} for kind in ("channel", "tensor") for s in (True, False)),
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_gptq_folders_hold_the_artifact(
    grid: dict[str, object], tiny: LoadedModel, context: Context, tmp_path: Path
) -> None:
    rtn.apply(tiny, rtn.Params.model_validate(grid), context)
    folder = exported(tiny, "gptq_v2", tmp_path)
    check_values(folder, tiny, lambda name: int(str(grid["bits"])), 2)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config == json.loads((folder / "quantize_config.json").read_text())
    assert config["checkpoint_format"] == "gptq_v2"
    assert (config["bits"], config["sym"], config["dynamic"]) == (grid["bits"], grid["symmetric"], None)
    assert config["group_size"] == (32 if "group_size" in grid else -1)
    artifacts.verify(folder)


def test_the_codes_of_the_demo(demo: LoadedModel, context: Context, tmp_path: Path) -> None:
    params = gptq_method.Params(bits=3, group_size=128, samples=4, sequence_length=32, targets="*.0.*.[kv]_proj")
    gptq_method.apply(demo, params, context)
    folder = exported(demo, "gptq", tmp_path)
    check_values(folder, demo, lambda name: 3, 1)


@pytest.mark.parametrize("symmetric", [True, False])
def test_awq_folders_hold_the_artifact(symmetric: bool, tiny: LoadedModel, context: Context, tmp_path: Path) -> None:
    rtn.apply(tiny, rtn.Params(bits=4, group_size=64, symmetric=symmetric, ignore="*.1.mlp.up_proj"), context)
    folder = exported(tiny, "awq", tmp_path)
    check_values(folder, tiny, lambda name: 4, 2)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["modules_to_not_convert"] == ["model.layers.1.mlp.up_proj"]
    assert (config["bits"], config["group_size"], config["version"]) == (4, 64, "gemm")  # 64 is all of some rows


def test_what_differs_from_the_rest_stands_in_dynamic(tiny: LoadedModel, context: Context, tmp_path: Path) -> None:
    rtn.apply(tiny, rtn.Params(bits=4, group_size=32, targets="*.0.*", ignore="*.0.mlp.up_proj"), context)
    elsewhere = dataclasses.replace(context, folder=tmp_path / "second")
    rtn.apply(tiny, rtn.Params(bits=8, group_size=64, targets="*.2.mlp.down_proj"), elsewhere)
    folder = exported(tiny, "gptq", tmp_path)
    check_values(folder, tiny, lambda name: 8 if ".2." in name else 4, 1)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    dynamic = config["dynamic"]
    assert dynamic.pop(r"+:^model\.layers\.2\.mlp\.down_proj$") == {"bits": 8, "group_size": 64}
    assert dynamic.pop(r"-:^model\.layers\.0\.mlp\.up_proj$") == {}
    assert len([key for key in dynamic if key.startswith(r"-:^model\.layers\.1")]) == 7
    assert len(dynamic) == 13


def refusal(artifact: Path, name: str) -> str:
    """The one line; nothing is left behind."""
    with pytest.raises(InputError) as caught:
        export.exporter(name)(artifact, artifact.parent / "out")
    assert [path.name for path in artifact.parent.iterdir() if "out" in path.name] == []
    assert "\n" not in str(caught.value)
    return str(caught.value)


def saved(model: LoadedModel, tmp_path: Path) -> Path:
    artifacts.write(model, Recipe(), tmp_path / "artifact")
    return tmp_path / "artifact"


def test_bits_that_no_reader_has(tiny: LoadedModel, context: Context, tmp_path: Path) -> None:
    rtn.apply(tiny, rtn.Params(bits=5, group_size=32), context)
    assert "5 bits" in refusal(saved(tiny, tmp_path), "gptq")
    assert "5 bits" in refusal(tmp_path / "artifact", "awq")


def test_zero_points_of_zero(tiny: LoadedModel, context: Context, tmp_path: Path) -> None:
    tiny.network.model.layers[1].mlp.up_proj.weight.data[3].abs_()
    rtn.apply(tiny, rtn.Params(bits=8, group_size=32, symmetric=False), context)
    assert "gptq_v2" in refusal(saved(tiny, tmp_path), "gptq")
    export.exporter("gptq_v2")(tmp_path / "artifact", tmp_path / "second")
    check_values(tmp_path / "second", tiny, lambda name: 8, 2)


def test_mixed_group_sizes_are_not_awq(tiny: LoadedModel, context: Context, tmp_path: Path) -> None:
    rtn.apply(tiny, rtn.Params(bits=4, group_size=32, ignore="*.down_proj"), context)
    elsewhere = dataclasses.replace(context, folder=tmp_path / "second")
    rtn.apply(tiny, rtn.Params(bits=4, group_size=64, targets="*.down_proj"), elsewhere)
    assert "groups of 64" in refusal(saved(tiny, tmp_path), "awq")


def test_rounded_inputs(tiny: LoadedModel, context: Context, tmp_path: Path) -> None:
    smoothquant.apply(tiny, smoothquant.Params(samples=2, sequence_length=16), context)
    assert "int-quantized" in refusal(saved(tiny, tmp_path), "gptq")


def test_scales_that_are_not_halves(context: Context, tmp_path: Path) -> None:
    model = in_memory(tiny_config(), torch.float32)
    rtn.apply(model, rtn.Params(bits=4, group_size=32), context)
    assert "float16" in refusal(saved(model, tmp_path), "gptq")
    assert "float16" in refusal(tmp_path / "artifact", "awq")


def test_rows_that_fill_no_words(context: Context, tmp_path: Path) -> None:
    model = in_memory(tiny_config(intermediate_size=40))
    rtn.apply(model, rtn.Params(bits=4, group_size=8), context)
    assert "64 x 40" in refusal(saved(model, tmp_path), "gptq")


def test_what_is_no_artifact(tiny: LoadedModel, context: Context, tiny_folder, tmp_path: Path) -> None:
    assert "no artifact of a run" in refusal(tiny_folder(), "gptq")
    assert "no quantized weights" in refusal(saved(tiny, tmp_path), "gptq")
    with pytest.raises(UnknownName, match="gptq_v2"):
        export.exporter("gptq2")
    rtn.apply(tiny, rtn.Params(bits=4, group_size=32), context)
    file = saved(tiny, tmp_path) / "model-00002-of-00004.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x55")
    with pytest.raises(BadArtifact):
        export.exporter("gptq")(tmp_path / "artifact", tmp_path / "out")


def test_an_export_replaces_nothing_and_leaves_nothing(
    tiny: LoadedModel, context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rtn.apply(tiny, rtn.Params(bits=4, group_size=32), context)
    artifact = saved(tiny, tmp_path)
    with pytest.raises(InputError, match="exists already"):
        gptq.export(artifact, artifact)
    with pytest.raises(InputError, match="no folder"):
        gptq.export(artifact, tmp_path / "a" / "b")

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_folder.artifacts, "write_manifest", full)
    with pytest.raises(OSError, match="No space"):
        gptq.export(artifact, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artifact", "blocks"]


READER = """
import sys, torch
from gptqmodel import BACKEND, GPTQModel
for folder in sys.argv[1:]:
    backend = BACKEND.AWQ_TORCH if folder.endswith("awq") else BACKEND.GPTQ_TORCH
    model = GPTQModel.load(folder, device="cpu", backend=backend, dtype=torch.bfloat16)
    with torch.inference_mode():
        found = model.model(input_ids=torch.arange(5, 45)[None], use_cache=False).logits[0].float()
    torch.save(found, folder + ".logits")
"""


@pytest.mark.skipif(STRANGER not in os.environ, reason=f"{STRANGER} names no Python that has gptqmodel")
@pytest.mark.timeout(900)
def test_gptqmodel_computes_the_same(context: Context, tmp_path: Path) -> None:
    four: dict[str, object] = {"bits": 4, "group_size": 64}
    recipes: dict[str, list[dict[str, object]]] = {
        **{f"{bits}-gptq": [{"bits": bits, "group_size": 128}] for bits in gptq.BITS},
        **{f"{bits}-gptq_v2": [{"bits": bits, "group_size": 32, "symmetric": False}] for bits in gptq.BITS},
        "rows-gptq": [{"bits": 4, "granularity": "channel"}],
        "mixed-gptq": [four | {"targets": "*.0.*"}, {"bits": 8, "group_size": 128, "targets": "*.2.*"}],
        "4-awq": [four], "asymmetric-awq": [four | {"symmetric": False, "ignore": "*.1.mlp.up_proj"}],
    }  # fmt: skip
    expected: dict[str, Tensor] = {}
    for name, steps in recipes.items():
        model = in_memory(tiny_config(hidden_size=256, intermediate_size=384, num_hidden_layers=4))
        for number, step in enumerate(steps):
            place = dataclasses.replace(context, folder=tmp_path / f"{name}-blocks-{number}")
            rtn.apply(model, rtn.Params.model_validate(step), place)
        artifacts.write(model, Recipe(), tmp_path / f"{name}-artifact")
        export.exporter(name.rpartition("-")[2])(tmp_path / f"{name}-artifact", tmp_path / name)
        with torch.inference_mode():
            expected[name] = model.network(torch.arange(5, 45)[None], use_cache=False).logits[0].float()
    command = [os.environ[STRANGER], "-c", READER, *(str(tmp_path / name) for name in recipes)]
    subprocess.run(command, check=True, cwd=tmp_path, env={**os.environ, "GPTQMODEL_CPU_WORKERS": "2"})
    for name, logits in expected.items():
        torch.testing.assert_close(torch.load(tmp_path / f"{name}.logits"), logits, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("bits", gptq.BITS)
def test_the_benchmarks_read_what_is_written(bits: int, tiny: LoadedModel, context: Context, tmp_path: Path) -> None:
    rtn.apply(tiny, rtn.Params.model_validate({"bits": bits, "group_size": 32}), context)
    folder = exported(tiny, "gptq", tmp_path)
    original = tmp_path / "original"
    tiny.network.save_pretrained(original)
    for product in (folder, tmp_path / "artifact"):
        read = TensorFiles.of_folder(products.measurable(product, original, tmp_path / "dense"))
        for name in tiny.quantized:
            weight = tiny.network.get_submodule(name).weight.data
            torch.testing.assert_close(read.read(f"{name}.weight"), weight, rtol=0, atol=0)


def test_a_packed_head_is_refused_by_name(context: Context, tmp_path: Path) -> None:
    model = in_memory(tiny_config(tie_word_embeddings=False))
    rtn.apply(model, rtn.Params(group_size=32, head=True), context)
    artifacts.write(model, Recipe(), tmp_path / "artifact")
    with pytest.raises(InputError, match=r"beside its blocks \(lm_head\)"):
        export.exporter("gptq")(tmp_path / "artifact", tmp_path / "out")
