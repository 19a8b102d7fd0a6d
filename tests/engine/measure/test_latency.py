"""Latency: what is reported and from which values; no assertion about how long anything takes."""

from __future__ import annotations

import statistics

import pytest
import torch

from engine.measure import latency
from engine.models import LoadedModel
from tests.conftest import Recorder, in_memory, tiny_config


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Generation takes the seconds of a script; the list notes the batch sizes it was asked for."""
    asked: list[int] = []

    def generate(model: LoadedModel, prompt: list[int], new_tokens: int, batch: int) -> list[float]:
        asked.append(batch)
        repetition = asked.count(batch)  # the first is the warm-up
        return [1.0, *[0.1 * repetition] * (new_tokens - 1)]

    monkeypatch.setattr(latency, "_generate", generate)
    return asked


def test_values_errors_and_the_warm_up(tiny: LoadedModel, scripted: list[int], recorder: Recorder) -> None:
    found = {m.name: m for m in latency.measure(tiny, [1, 2], emit=recorder, new_tokens=11, repetitions=3)}
    assert list(found) == ["latency.ttft", "latency.tpot", "throughput.b1", "throughput.b8"]
    assert scripted == [1] * 4 + [8] * 4
    tpot = found["latency.tpot"]  # repetitions of 0.2, 0.3 and 0.4; the warm-up's 0.1 does not count
    assert tpot.value == pytest.approx(0.3)
    assert tpot.error == pytest.approx(statistics.stdev([0.2, 0.3, 0.4]) / 3**0.5)
    assert tpot.details["p95"] == pytest.approx(0.4)
    assert (tpot.details["count"], tpot.details["largest"]) == (30, 0.4)
    assert found["latency.ttft"].value == 1.0
    assert found["latency.ttft"].error == 0.0
    assert found["throughput.b1"].value == pytest.approx(1 / 0.3)
    assert found["throughput.b8"].value == pytest.approx(8 / 0.3)
    assert found["throughput.b8"].higher_is_better
    assert found["throughput.b8"].details["tpot"] == pytest.approx(0.3)  # a step of eight, as a step of one
    assert found["throughput.b8"].details["tpot_error"] == tpot.error
    assert not tpot.higher_is_better
    series = [data["series"] for kind, data in recorder.said if kind == "sample"]
    assert series == ["latency.tpot.b1"] * 3 + ["latency.tpot.b8"] * 3


def test_stalls_of_a_busy_machine_are_not_the_throughput(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    step, stall = 0.003, 3.0
    rows = iter([[0.01] + [step] * 10] + [[0.01, stall] + [step] * 9] * 3 + [[0.01] + [step * 1.1] * 10] * 2)
    monkeypatch.setattr(latency, "_generate", lambda *_: next(rows))
    monkeypatch.setattr(latency, "warm_up", lambda *_: next(rows))
    (found,) = latency.measure(tiny, [1], new_tokens=11, repetitions=5, batches=(8,))
    assert found.value == pytest.approx(8 / step)
    assert found.error is not None
    assert 0 < found.error < 0.05 * found.value


def test_the_protocol_is_told(tiny: LoadedModel) -> None:
    found = latency.measure(tiny, [1, 2, 3], new_tokens=3, repetitions=2, batches=(1, 2))
    for measurement in found:
        details = measurement.details
        assert details["prompt_tokens"] == 3
        assert details["new_tokens"] == 3
        assert details["threads"] == torch.get_num_threads()
        assert details["device"] == "cpu"
        assert details["repetitions"] == 2
        assert details["kernels"] == "dense bfloat16 x 22"
        assert measurement.value > 0
    assert [m.details["batch"] for m in found] == [1, 1, 1, 2]


def test_kernels_are_named_with_their_number() -> None:
    model = in_memory(tiny_config(num_hidden_layers=1))
    model.kernels = {f"model.layers.0.self_attn.{p}_proj": "int4pack-cpu" for p in "qkvo"}
    model.kernels["model.layers.0.mlp.up_proj"] = "simulated: dense bfloat16"
    assert latency.kernels(model) == "int4pack-cpu x 4, dense bfloat16 x 3, simulated: dense bfloat16 x 1"


def test_an_impossible_protocol_is_refused(tiny: LoadedModel) -> None:
    with pytest.raises(ValueError, match="2 new tokens"):
        latency.measure(tiny, [1], new_tokens=1)
