"""The audit of each linear: its error, its histogram, and whatever was unusual."""

import pytest
import torch

from engine.methods import Context
from engine.models import LoadedModel
from engine.packing import QuantizedWeight
from engine.quantize import gptq, rtn
from engine.quantize._place import BINS, histogram, levels, relative_error
from tests.conftest import Recorder, in_memory, tiny_config


def audits(recorder: Recorder) -> list[dict]:
    return [data for kind, data in recorder.said if kind == "linear"]


def test_every_linear_is_told_of_once(tiny: LoadedModel, context: Context, recorder: Recorder) -> None:
    gptq.apply(tiny, gptq.Params(bits=3, group_size=32, samples=16, sequence_length=32), context)
    found = audits(recorder)
    assert [each["name"] for each in found] == list(tiny.quantized)
    for each in found:
        assert each["bits"] == 3
        assert each["group_size"] == 32
        assert each["bits_per_weight"] == pytest.approx(3.5)
        assert 0 < each["error"] < 0.1
        assert each["of"] == "output"
        assert each["tokens"] == 16 * 32
        assert each["weights"] == sum(each["histogram"]["before"]) == tiny.quantized[each["name"]].codes.numel()
        assert len(each["histogram"]["levels"]) == 8
        assert each["note"] == ""
        assert sum(each["histogram"]["before"]) == sum(each["histogram"]["after"])


def test_few_tokens_are_a_quarter_of_the_inputs_where_these_are_many(context: Context, recorder: Recorder) -> None:
    model = in_memory(tiny_config(intermediate_size=2048))
    gptq.apply(model, gptq.Params(group_size=32, samples=12, sequence_length=32), context)
    noted = {each["name"].rpartition(".")[2] for each in audits(recorder) if each["note"]}
    assert noted == {"down_proj"}  # 384 tokens for 2,048 inputs


def test_fewer_bits_give_a_larger_error_and_few_tokens_are_noted(
    tiny: LoadedModel, context: Context, recorder: Recorder
) -> None:
    params = gptq.Params(group_size=32, samples=2, sequence_length=16)
    gptq.solve(tiny, params, context, lambda name: rtn.Params(bits=2 if "mlp" in name else 8, group_size=32))
    found = {each["name"]: each for each in audits(recorder)}
    worst = max(each["error"] for name, each in found.items() if "mlp" not in name)
    assert all(each["error"] > 10 * worst for name, each in found.items() if "mlp" in name)
    assert {each["note"] for each in found.values()} == {"only 32 tokens reached it"}
    assert {tiny.quantized[name].bits for name in found if "mlp" in name} == {2}


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_levels_are_those_of_the_median_scale(symmetric: bool) -> None:
    scale = torch.tensor([[0.5, 4.0], [1.0, 2.0], [8.0, 16.0]])  # the median is 2, of row 1, group 1
    zero = torch.full((3, 2), 2, dtype=torch.uint8) if symmetric else torch.tensor([[0, 0], [0, 1], [0, 0]]).byte()
    weight = QuantizedWeight(torch.zeros(3, 8, dtype=torch.uint8), scale, zero, 2, symmetric)
    assert levels(weight) == ([-4, -2, 0, 2] if symmetric else [-2, 0, 2, 4])
    eight = QuantizedWeight(torch.zeros(3, 8, dtype=torch.uint8), scale, zero, 8, symmetric)
    assert levels(eight) == []


def test_error_and_histogram_by_hand() -> None:
    before, after = torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 3.0]]).__getitem__
    assert relative_error(before, after, None) == pytest.approx(1 / 25)
    assert relative_error(before, after, torch.tensor([[1.0, 1.0], [1.0, 0.0]])) == pytest.approx(1 / 58)
    counts = histogram(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 2.0]]).__getitem__)
    assert counts["before"] == counts["after"] == [1, *[0] * (BINS - 2), 1]
    assert sum(histogram(torch.ones(2, 2), torch.ones(2, 2).__getitem__)["before"]) == 4  # type: ignore[arg-type]
