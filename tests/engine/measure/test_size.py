"""Size names the family of a model, so that runs of one family can be drawn together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from engine import artifacts
from engine.measure import size
from engine.methods import Context
from engine.models import load
from engine.places import DEMO
from engine.quantize import gptq
from engine.records import Recipe


def test_a_compressed_model_stays_in_its_family(context: Context, tmp_path: Path) -> None:
    model = load(DEMO / "model")
    gptq.apply(model, gptq.Params(samples=2, targets="*.mlp.*"), context)
    artifacts.write(model, Recipe(), tmp_path / "artifact")
    found = {m.name: m for m in size.measure(tmp_path / "artifact")}
    original = size.family(DEMO / "model")
    assert found["size.parameters"].details == original
    assert original["architecture"] == "llama"


def test_another_vocabulary_is_another_family(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(DEMO / "model" / name, tmp_path / name)
    body = json.loads((tmp_path / "tokenizer.json").read_text())
    body["truncation"] = {"max_length": 5}  # how a tokenizer is used is not what it knows
    (tmp_path / "tokenizer.json").write_text(json.dumps(body))
    assert size.family(tmp_path) == size.family(DEMO / "model")
    body["model"]["vocab"]["one more"] = len(body["model"]["vocab"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(body))
    assert size.family(tmp_path)["vocabulary"] != size.family(DEMO / "model")["vocabulary"]


@pytest.mark.parametrize("content", ["", "[]", "null", '{"model": "x"}', '{"model_type": null}'])
def test_files_that_say_nothing_of_a_family_do_no_harm(tmp_path: Path, content: str) -> None:
    assert size.family(tmp_path) == {}
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text(content)
    assert size.family(tmp_path) == {}
