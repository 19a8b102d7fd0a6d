"""Every family and every method from a recipe to an artifact that was read back, through the pipeline itself.

What single tests of methods and formats leave out is what stands between them: loading, saving, verifying, measuring.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import JsonValue

from engine import methods, pipeline
from engine.records import Recipe
from tests.conftest import Recorder, saved
from tests.families import FAMILIES, MIXTURES

Maker = Callable[..., Path]
FEW: dict[str, JsonValue] = {
    "samples": 4,
    "sequence_length": 32,
    "steps": 2,
    "batch": 2,
    "group_size": 16,
    "multiple": 8,
}
TOGETHER: dict[str, dict[str, JsonValue]] = {  # what these methods cannot go without, on a model this small
    "prune/low_rank": {"ratio": 0.9},
    "quantize/kv_cache": {"bits": 8},
}


def through(folder: Path, steps: list[JsonValue], recorder: Recorder, where: Path, *measure: str) -> Path:
    """The artifact of a run in this process, verified."""
    wanted = Recipe.model_validate({"model": str(folder), "steps": steps, "measure": measure})
    (where / "attempt").mkdir()
    artifact = pipeline.run(wanted, where / "attempt", recorder, lambda: None, alone=True)
    assert any("read back" in str(data.get("text")) for kind, data in recorder.said if kind == "log")
    return artifact


@pytest.mark.parametrize("family", FAMILIES | MIXTURES)
def test_every_family(family: str, recorder: Recorder, tmp_path: Path) -> None:
    folder = saved((FAMILIES | MIXTURES)[family], tmp_path / "model")
    as_wide_as_a_block: JsonValue = {"quantize/rtn": {"bits": 4, "group_size": 64, "ignore": "*.shared_expert.*"}}
    through(folder, [as_wide_as_a_block], recorder, tmp_path)


def test_embeddings_as_wide_as_a_group(tiny_folder: Maker, recorder: Recorder, tmp_path: Path) -> None:
    whole: JsonValue = {"quantize/rtn": {"group_size": 64, "head": True, "embeddings": True}}
    through(tiny_folder(), [whole], recorder, tmp_path)


@pytest.mark.parametrize("name", methods.methods())
def test_every_method(name: str, tiny_folder: Maker, recorder: Recorder, tmp_path: Path) -> None:
    known = methods.get(name).params.model_fields
    given = {field: value for field, value in FEW.items() if field in known} | TOGETHER.get(name, {})
    artifact = through(tiny_folder(), [{name: given}], recorder, tmp_path, "size")
    assert (artifact / "config.json").exists()
    assert {"size.bytes", "size.bits_per_weight"} <= {
        str(data["name"]) for kind, data in recorder.said if kind == "measurement"
    }
