"""Recipes by name, from the mildest to the smallest: what the page offers, and `python -m engine preset` prints."""

from __future__ import annotations

from pydantic import JsonValue

from engine.errors import UnknownName
from engine.records import Step

_FEWER_BLOCKS = Step(method="prune/depth", params={"share": 0.3})
_NARROWER = Step(method="prune/width", params={"neurons": 0.33, "channels": 0.5, "multiple": 64})
_HEAL = Step(method="distill/logits", params={"student": "current"})
_BESIDE: dict[str, JsonValue] = {"head": True, "embeddings": True}  # their share grows as the blocks become smaller
_ALL_4_BIT = Step(method="quantize/gptq", params={"bits": 4, **_BESIDE})
_ALL_3_BIT = Step(method="quantize/gptq", params={"bits": 3, **_BESIDE})
_HEAL_CODES = Step(method="distill/repair")
PRESETS: dict[str, tuple[Step, ...]] = {
    "gptq4": (Step(method="quantize/gptq", params={"bits": 4, "group_size": 64}),),
    "mixed": (Step(method="quantize/mixed", params={"budget": 3.25}),),
    "w8a8": (Step(method="quantize/smoothquant"),),
    "half": (_FEWER_BLOCKS, _HEAL, Step(method="quantize/gptq", params={"bits": 8})),
    "quarter": (_FEWER_BLOCKS, _HEAL, _ALL_4_BIT),
    "tenth": (_FEWER_BLOCKS, _NARROWER, _HEAL, _ALL_3_BIT, _HEAL_CODES),
}


def preset(name: str) -> tuple[Step, ...]:
    """The steps of the preset with that name.

    Raises:
        UnknownName: there is none.
    """
    if name not in PRESETS:
        raise UnknownName("preset", name, PRESETS)
    return PRESETS[name]
