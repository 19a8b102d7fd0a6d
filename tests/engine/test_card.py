"""The model card: front matter that the hub takes, honest loading lines, and nothing of this machine."""

from __future__ import annotations

import pytest
from huggingface_hub import ModelCard

from engine import card
from engine.headers import OWN_KEYS
from engine.own_packed import PACKED_KEY
from engine.records import Recipe

GPTQ = [{"quantize/gptq": {"bits": 4, "group_size": 64}}]


def made(source: str, steps: list[object], config: dict | None = None, results: str = "") -> ModelCard:
    recipe = Recipe.model_validate({"model": source, "steps": steps})
    return ModelCard(card.text(recipe, config or {}, results))


def test_the_hub_reads_the_front_matter() -> None:
    config = {"quantization_config": {"quant_method": "compressed-tensors"}}
    found = made("meta/llama-1b", GPTQ, config, "## What was measured\n\nPerplexity 4.2")
    data = found.data.to_dict()
    assert data["base_model"] == "meta/llama-1b"
    assert data["base_model_relation"] == "quantized"
    assert data["library_name"] == "transformers"
    assert {"maquette", "quantize-gptq", "4-bit", "compressed-tensors"} <= set(data["tags"])
    assert "license" not in data
    for words in ("from_pretrained", "pip install transformers torch compressed-tensors", "Perplexity 4.2", "bits: 4"):
        assert words in found.text


@pytest.mark.parametrize(
    ("source", "base"),
    [
        ("demo", None), ("/models/llama", None), ("~/x/y", None), ("./a/b", None), ("a/b/c", None), ("", None),
        ("org/name", "org/name"), ("org/name@0123abcd", "org/name"), ("org/na.me-1", "org/na.me-1"),
    ],
)  # fmt: skip
def test_only_a_name_of_the_hub_is_a_base_model(source: str, base: str | None) -> None:
    assert card.base_model(source) == base


def test_paths_of_this_machine_keep_their_last_part() -> None:
    steps = [{"distill/logits": {"teacher": "/home/anna/secret/big", "student": "current"}}]
    recipe = Recipe.model_validate(
        {"model": "/home/anna/runs/0a1b/attempt-1/artifact", "steps": steps, "calibration": "/home/anna/text.txt"}
    )
    text = card.text(recipe, {})
    assert "anna" not in text
    assert "secret" not in text
    shared = card.shareable(recipe)
    assert (shared.model.source, shared.calibration) == ("run-0a1b", "text.txt")
    assert shared.steps[0].params == {"teacher": "big", "student": "current"}
    assert "base_model" not in made("/home/anna/llama", GPTQ).data.to_dict()


@pytest.mark.parametrize(
    ("teachers", "shared"),
    [
        ("demo /home/anna/secret/big", "demo big"), ("/home/anna/a /home/anna/b", "a b"),
        ("'/home/anna/my models/big' org/name", "big org/name"), ("org/name@0123abcd", "org/name@0123abcd"),
    ],
)  # fmt: skip
def test_each_of_several_teachers_keeps_its_last_part(teachers: str, shared: str) -> None:
    recipe = Recipe.model_validate({"model": "demo", "steps": [{"distill/logits": {"teachers": teachers}}]})
    assert card.shareable(recipe).steps[0].params == {"teachers": shared}
    assert "anna" not in card.text(recipe, {})


def test_what_stock_transformers_cannot_load_is_said() -> None:
    own = made("demo", [{"prune/wanda": {}}], dict.fromkeys(OWN_KEYS, "any"))
    assert own.data.to_dict()["library_name"] == "maquette"
    assert "stock `transformers` refuses" in own.text
    assert "from_pretrained" not in own.text
    rounded = {PACKED_KEY: {"config_groups": {"group_0": {"input_activations": {"num_bits": 8}}}}}
    assert "which also says that inputs are rounded" in made("demo", GPTQ, rounded).text
    assert made("demo", [{"prune/wanda": {}}]).data.to_dict().get("base_model_relation") is None
    assert "a `b`" not in made("demo", GPTQ).text


@pytest.mark.parametrize(
    ("step", "zeros"),
    [
        ({"prune/magnitude": {"sparsity": 0.5}}, True), ({"prune/wanda": {}}, True), ({"prune/l1": {}}, True),
        ({"quantize/gptq": {"sparsity": 0.5}}, True), ({"quantize/gptq": {}}, False), ({"prune/depth": {}}, False),
        ({"prune/width": {}}, False), ({"prune/vocabulary": {}}, False), ({"prune/low_rank": {}}, False),
    ],
)  # fmt: skip
def test_zeros_are_spoken_of_where_there_are_some(step: object, zeros: bool) -> None:
    assert ("Zeros among the weights make nothing faster" in made("demo", [step]).text) is zeros
