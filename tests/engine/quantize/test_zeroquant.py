"""ZeroQuant: grouped weights with rounded inputs, and a distillation that brings a block nearer to its original."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine import artifacts, flow, runtime
from engine.calibration import walk_blocks
from engine.flow import run_block
from engine.methods import Context
from engine.models import LoadedModel, quantize_inputs
from engine.quantize import zeroquant
from engine.quantize._grid import round_to_nearest
from engine.quantize.zeroquant import Params
from engine.records import Recipe
from engine.runtime.native.library import available
from tests.conftest import in_memory, tiny_config
from tests.engine.quantize.test_smoothquant import apart, logits
from tests.families import FAMILIES

SMALL = {"samples": 8, "sequence_length": 32, "group_size": 32}


@pytest.mark.parametrize("bits", [4, 8])
def test_strangers_and_the_runtime_compute_the_same(
    bits: int, tiny: LoadedModel, context: Context, tmp_path: Path
) -> None:
    model = zeroquant.apply(tiny, Params.model_validate(SMALL | {"bits": bits}), context)
    artifacts.write(model, Recipe(), tmp_path / "artifact")
    stranger = AutoModelForCausalLM.from_pretrained(tmp_path / "artifact", dtype="auto")
    assert apart(logits(stranger), logits(model.network)) < 1e-6
    loaded = runtime.load(tmp_path / "artifact")
    (kernel,) = set(loaded.kernels.values())
    ours = f"int{bits}-{available()}" if available() else "int4pack-cpu"
    assert kernel == f"{ours}, inputs rounded to 8 bits"
    assert apart(logits(loaded.network), logits(model.network)) < 0.02


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_distillation_brings_a_block_nearer_to_its_original(family: str, context: Context) -> None:
    params = Params.model_validate(SMALL | {"bits": 2, "distill_steps": 30, "learning_rate": 1e-3})
    model = in_memory(FAMILIES[family])
    before, after = zeroquant.distill(next(walk_blocks(model, context, params, "norm")), params, context)
    assert 0 < after < 0.9 * before


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_distances_are_those_of_the_rounded_block(family: str, context: Context) -> None:
    """Of GPT-2, too, whose square matrices look the same either way round."""
    params = Params.model_validate(SMALL | {"bits": 2, "distill_steps": 30, "learning_rate": 1e-3})
    block = next(walk_blocks(in_memory(FAMILIES[family]), context, params, "norm"))
    exact = [linear.weight.clone() for linear in block.linears]
    targets = [run_block(block.module, *batch).float() for batch in block.batches]
    found = zeroquant.distill(block, params, context)
    learned = [linear.weight.clone() for linear in block.linears]
    assert any(not torch.equal(old, new) for old, new in zip(exact, learned, strict=True))
    for linear in block.linears:
        quantize_inputs(linear.module, zeroquant.INPUTS)
    for weights, distance in zip((exact, learned), found, strict=True):
        for linear, weight in zip(block.linears, weights, strict=True):
            linear.weight.copy_(round_to_nearest(weight, params, linear.name, weight.dtype).dequantize())
        losses = []
        for (states, call), target in zip(block.batches, targets, strict=True):
            missed = (run_block(block.module, states, call).float() - target).square().mean()
            losses.append(float(missed / (target - states.float()).square().mean()))
        assert sum(losses) / len(losses) == pytest.approx(distance, rel=0.05)  # what was learned is stored in 16 bit


def test_weights_stay_where_training_does_not_help(tiny: LoadedModel, context: Context) -> None:
    params = Params.model_validate(SMALL | {"bits": 8, "distill_steps": 2, "learning_rate": 1.0})
    block = next(walk_blocks(tiny, context, params, "norm"))
    weights = [linear.weight.clone() for linear in block.linears]
    before, after = zeroquant.distill(block, params, context)
    assert after == before
    for linear, weight in zip(block.linears, weights, strict=True):
        torch.testing.assert_close(linear.weight, weight, rtol=0, atol=0)


def test_what_the_original_gave_stands_in_files_where_it_is_much(
    tiny: LoadedModel, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = Params.model_validate(SMALL | {"bits": 2, "distill_steps": 4})
    distances, files = [], []
    original = zeroquant._Student.distance

    def distance(student: zeroquant._Student, targets: flow.States) -> float:
        files.append(len(list(context.folder.rglob("targets/*.safetensors"))))
        return original(student, targets)

    monkeypatch.setattr(zeroquant._Student, "distance", distance)
    for held in (flow.HELD, 0):
        monkeypatch.setattr(flow, "HELD", held)
        distances.append(zeroquant.distill(next(walk_blocks(tiny, context, params, "norm")), params, context)[0])
        tiny = in_memory(tiny_config())
    assert distances[0] == distances[1]
    assert files == [0, 0, 1, 1]
    assert not list(context.folder.rglob("targets/*"))
