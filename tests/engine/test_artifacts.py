"""Artifacts: stock `transformers` loads exactly what was in memory; the manifest notices every change."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine import artifacts, files
from engine.errors import BadArtifact
from engine.methods import Context
from engine.models import LoadedModel
from engine.quantize import gptq, rtn
from engine.records import Recipe
from tests.conftest import in_memory, tiny_config

GRIDS = [
    *({"bits": bits, "group_size": 32, "symmetric": symmetric} for bits in range(2, 9) for symmetric in (True, False)),
    *({"bits": 4, "granularity": kind, "symmetric": s} for kind in ("channel", "tensor") for s in (True, False)),
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_stranger_loads_what_was_in_memory(
    grid: dict[str, object], tiny: LoadedModel, context: Context, tmp_path: Path
) -> None:
    rtn.apply(tiny, rtn.Params.model_validate(grid), context)
    artifacts.write(tiny, Recipe(), tmp_path / "artifact")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "artifact", dtype="auto")
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        torch.testing.assert_close(loaded(ids).logits, tiny.network(ids).logits, rtol=0, atol=0)


def test_the_files_are_as_small_as_the_bits_say(tiny: LoadedModel, context: Context, tmp_path: Path) -> None:
    gptq.apply(tiny, gptq.Params(bits=4, group_size=32, samples=4, sequence_length=16), context)
    artifacts.write(tiny, Recipe(), tmp_path / "artifact")
    index = json.loads((tmp_path / "artifact" / "model.safetensors.index.json").read_text())
    linears = sum(weight.codes.numel() for weight in tiny.quantized.values())
    others = sum(p.numel() for n, p in tiny.network.named_parameters() if "proj" not in n)
    # 4 bits and a 16-bit scale per 32 weights; two int64 of shape for each of 21 linears.
    assert index["metadata"]["total_size"] == linears * 4.5 / 8 + others * 2 + 21 * 16


def test_tied_weights_are_stored_once(tiny: LoadedModel, tmp_path: Path) -> None:
    artifacts.write(tiny, Recipe(), tmp_path / "artifact")
    index = json.loads((tmp_path / "artifact" / "model.safetensors.index.json").read_text())
    assert "lm_head.weight" not in index["weight_map"]
    assert "model.embed_tokens.weight" in index["weight_map"]
    assert "quantization_config" not in json.loads((tmp_path / "artifact" / "config.json").read_text())


def test_the_same_model_gives_the_same_manifest(tmp_path: Path) -> None:
    for name in ("a", "b"):
        artifacts.write(in_memory(tiny_config()), Recipe(), tmp_path / name)
    first, second = ((tmp_path / name / artifacts.MANIFEST).read_bytes() for name in ("a", "b"))
    assert first == second


@pytest.mark.parametrize("damage", ["change", "remove", "add", "no manifest"])
def test_verify_notices_damage(damage: str, tiny: LoadedModel, tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    artifacts.write(tiny, Recipe(), folder)
    artifacts.verify(folder)
    file = folder / "model-00002-of-00004.safetensors"
    if damage == "change":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "remove":
        file.unlink()
    elif damage == "add":
        (folder / "more.bin").touch()
    else:
        (folder / artifacts.MANIFEST).unlink()
    with pytest.raises(BadArtifact):
        artifacts.verify(folder)


def test_writing_again_replaces_what_was_half_done(tiny: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "artifact.tmp").mkdir()
    (tmp_path / "artifact.tmp" / "leftover").touch()
    artifacts.write(tiny, Recipe(), tmp_path / "artifact")
    artifacts.verify(tmp_path / "artifact")
    assert not (tmp_path / "artifact.tmp").exists()


def test_weights_can_be_read_by_whoever_reads_the_rest(tmp_path: Path) -> None:
    file, other = tmp_path / "weights", tmp_path / "other"
    file.touch(0o600)
    other.touch()
    files.as_usual(file)
    assert file.stat().st_mode == other.stat().st_mode
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "weights"]
