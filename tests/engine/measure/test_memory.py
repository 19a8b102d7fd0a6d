"""Memory against allocations of a known size, by every way of looking."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.measure import memory
from engine.records import Measurement

MIB = 1 << 20
SLACK = 6 * MIB


def block(mebibytes: int) -> torch.Tensor:
    return torch.ones(mebibytes * MIB, dtype=torch.uint8)


def at_zero() -> Measurement:
    return Measurement(name="memory.loaded", value=0, unit="B", details={"kind": "resident"})


def test_loading_counts_what_stays_and_not_what_is_freed_or_done_once() -> None:
    kept_once: list[torch.Tensor] = []

    def load() -> torch.Tensor:
        if not kept_once:
            kept_once.append(block(50))  # as imported code is
        block(100)
        return block(40)

    model, measurement = memory.loading(load, "cpu")
    assert model.numel() == 40 * MIB
    assert measurement.name == "memory.loaded"
    assert measurement.details["kind"] == "resident"
    assert abs(measurement.value - 40 * MIB) < SLACK


@pytest.mark.parametrize("kernel_keeps_peak", [True, False])
def test_generating_finds_a_peak_that_is_gone_at_the_end(
    kernel_keeps_peak: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernel_keeps_peak:
        monkeypatch.setattr(memory, "CLEAR", Path("/nonexistent/clear_refs"))
    elif not memory._kernel_keeps_peak():
        pytest.skip("this kernel keeps no peak that can be set back")
    before = block(64)  # an earlier peak, which must not count
    del before

    def work() -> str:
        for _ in range(3 if kernel_keeps_peak else 30):  # often enough to be looked at
            block(48)
        return "done"

    loaded = at_zero().model_copy(update={"value": 10.0 * MIB})
    result, peak = memory.generating(work, loaded)
    assert result == "done"
    assert abs(peak.value - 58 * MIB) < SLACK
    assert ("kernel" in str(peak.details["protocol"])) == kernel_keeps_peak


def test_generating_nothing_costs_nothing() -> None:
    _, peak = memory.generating(lambda: None, at_zero())
    assert 0 <= peak.value < SLACK


def test_resident_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    by_proc = memory.resident()
    monkeypatch.setattr(Path, "read_text", _missing)
    assert abs(memory.resident() - by_proc) < SLACK


def _missing(self: Path) -> str:
    raise FileNotFoundError(self)


def test_a_packed_model_takes_less_than_the_dense_one(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    """In a fresh process, as measuring does it: packed weights take what their files take, also while they load."""
    from engine import artifacts
    from engine.models import load
    from engine.quantize._grid import GridParams, round_to_nearest
    from engine.records import Recipe

    dense = tiny_folder(hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8)
    model = load(dense)
    for name, module in list(model.network.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            model.quantized[name] = round_to_nearest(module.weight, GridParams(), name, torch.bfloat16)
    artifacts.write(model, Recipe(), tmp_path / "artifact")
    size, dense_size = (_bytes(folder) for folder in (tmp_path / "artifact", dense))
    loaded, peak = _in_a_fresh_process(tmp_path / "artifact")
    assert abs(loaded - size) < 0.15 * size + SLACK
    assert peak < 0.95 * dense_size, "a dense copy of everything existed for a moment"


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _in_a_fresh_process(folder: Path) -> tuple[float, float]:
    """(memory.loaded, peak of loading) of a model folder, in bytes."""
    program = (
        "import sys; from pathlib import Path; from engine import runtime; from engine.measure import memory\n"
        "from engine.records import Measurement\n"
        "folder = Path(sys.argv[1])\n"
        "_, loaded = memory.loading(lambda: runtime.load(folder), 'cpu')\n"
        "del _\n"
        "nothing = loaded.model_copy(update={'value': 0.0})\n"
        "_, peak = memory.generating(lambda: runtime.load(folder), nothing)\n"
        "print(loaded.value, peak.value)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)], env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    loaded, peak = done.stdout.split()[-2:]
    return float(loaded), float(peak)
