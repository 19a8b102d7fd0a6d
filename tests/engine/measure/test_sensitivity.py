"""The sensitivity of blocks against the methods that it foretells, and that it leaves the model as it was."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from engine.calibration import token_rows, walk_blocks
from engine.errors import BadText
from engine.flow import run_block
from engine.measure import sensitivity, suite
from engine.methods import Calibrated, Context
from engine.models import blocks
from engine.observing import BlockLinear
from engine.prune import wanda
from engine.prune._masks import SparsityParams, keep_largest
from engine.quantize import rtn
from engine.records import MEASURES, USUAL_MEASURES, Recipe
from engine.surgery import keep_blocks
from tests.conftest import Recorder, in_memory, tiny_config


@pytest.fixture(autouse=True)
def little_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "ROWS", 4)
    monkeypatch.setattr(sensitivity, "LENGTH", 32)


def test_the_damage_is_that_of_wanda_and_of_rounding() -> None:
    dice = torch.Generator().manual_seed(0)
    inputs = torch.randn(50, 96, generator=dice) @ torch.randn(96, 96, generator=dice)
    linear = BlockLinear("w", torch.nn.Linear(96, 5, bias=False))
    linear.input_norm = inputs.norm(dim=0)
    mask = keep_largest(wanda.score(linear.weight, linear.input_norm), SparsityParams(sparsity=0.5), "w")
    torch.testing.assert_close(sensitivity.half_by_wanda(linear), linear.weight * mask, rtol=0, atol=0)
    found = sensitivity.to_few_bits(linear)
    scale = linear.weight.reshape(5, 3, 32).abs().amax(-1) / 3.5
    for row in range(5):
        for column in range(96):
            step = float(scale[row, column // 32])
            weight, rounded = float(linear.weight[row, column]), float(found[row, column])
            assert abs(weight - rounded) == pytest.approx(min(abs(weight - c * step) for c in range(-4, 4)), abs=1e-6)
            assert rounded / step == pytest.approx(round(rounded / step), abs=1e-4)


def test_the_table_equals_slow_ways_and_nothing_changes(context: Context) -> None:
    model = in_memory(tiny_config(), torch.float32)
    before = {name: weight.clone() for name, weight in model.network.state_dict().items()}
    found = sensitivity.measure(model, context)
    torch.testing.assert_close(model.network.state_dict(), before, rtol=0, atol=0)
    table = found.details["blocks"]
    assert isinstance(table, list)
    assert [row["block"] for row in table] == [0, 1, 2]  # type: ignore[index,call-overload]
    rows = token_rows(model.tokenizer, context.calibration, sensitivity.LENGTH, sensitivity.ROWS)
    assert found.details["tokens"] == rows.numel()
    with torch.no_grad():
        logits = keep_blocks(model, [0, 2]).network(input_ids=rows).logits[:, :-1]
        expected = math.exp(float(functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())))
        assert table[1]["perplexity"] == pytest.approx(expected, rel=1e-4)  # type: ignore[index,call-overload]
        pruned = in_memory(tiny_config(), torch.float32)
        params = Calibrated(samples=sensitivity.ROWS, sequence_length=sensitivity.LENGTH)
        for block in walk_blocks(model, context, params, "norm", keep_blocks=False):
            if block.number == 1:
                other = blocks(pruned.network)[1][1]
                for linear in block.linears:
                    module = other.get_submodule(linear.name.removeprefix("model.layers.1."))
                    score = wanda.score(linear.weight, linear.input_norm)
                    module.weight.mul_(keep_largest(score, SparsityParams(sparsity=0.5), linear.name))
                moved = added = 0.0
                for states, call in block.batches:
                    after = run_block(block.module, states, call)
                    moved += float((run_block(other, states, call) - after).square().sum())
                    added += float((after - states).square().sum())
        assert table[1]["error_half"] == pytest.approx(math.sqrt(moved / added), rel=1e-3)  # type: ignore[index,call-overload]
    assert 0 < table[1]["error_3_bits"] < 1  # type: ignore[index,call-overload,operator]


def test_it_is_measured_on_demand_of_dense_models_alone(
    tiny_folder: Callable[..., Path], recorder: Recorder, context: Context, tmp_path: Path
) -> None:
    from engine import artifacts

    assert "sensitivity" in MEASURES
    assert "sensitivity" not in USUAL_MEASURES
    assert Recipe().measure == USUAL_MEASURES
    suite.measure(tiny_folder(), ("sensitivity",), None, "cpu", recorder)
    (found,) = (data for kind, data in recorder.said if kind == "measurement" and data["name"] == "sensitivity")
    assert len(found["details"]["blocks"]) == 3  # type: ignore[arg-type,index,call-overload]
    packed = rtn.apply(in_memory(tiny_config()), rtn.Params(group_size=32), context)
    artifacts.write(packed, Recipe(), tmp_path / "artifact")
    suite.measure(tmp_path / "artifact", ("sensitivity",), None, "cpu", recorder)
    assert any("before quantizing" in line for line in recorder.logs())


def test_a_text_that_is_too_short_is_one_line(context: Context, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("The lamp.")
    with pytest.raises(BadText, match="one sequence needs 32"):
        sensitivity.measure(
            in_memory(tiny_config()),
            Context("cpu", 0, tmp_path, tmp_path, short, context.emit, lambda: None),
        )
