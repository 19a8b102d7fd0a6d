"""What quantization has left as it is, is listed: every module with a matrix, folded where only numbers differ."""

import pytest

from engine.methods import Context
from engine.models import LoadedModel
from engine.quantize import bitsandbytes, rtn
from engine.untouched import fold, kept
from tests.conftest import in_memory
from tests.families import MIXTURES

EVERY = ["head", *(f"h.{block}.{leaf}" for block in range(7) for leaf in ("up", "e.0.x", "e.1.x"))]


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        (["head", *(f"h.{n}.up" for n in range(7))], ["head", "h.*.up"]),
        ([f"h.{n}.up" for n in (6, 0, 2, 1, 4)], ["h.{0-2,4,6}.up"]),
        (["h.3.up"], ["h.3.up"]),
        (["h.0.e.0.x", "h.0.e.1.x", "h.1.e.1.x"], ["h.0.e.0.x", "h.{0-1}.e.1.x"]),
        ([], []),
    ],
)
def test_names_that_differ_in_their_numbers_become_one(names: list[str], folded: list[str]) -> None:
    assert list(fold(names, EVERY)) == folded


def test_routers_embeddings_and_what_is_ignored_are_listed(context: Context) -> None:
    model = in_memory(MIXTURES["mixtral"])
    rtn.apply(model, rtn.Params(group_size=32, ignore="*.0.self_attn.q_proj *.2.self_attn.q_proj"), context)
    assert kept(model) == {
        "modules": {
            "16": ["model.embed_tokens", "model.layers.{0,2}.self_attn.q_proj", "model.layers.*.mlp.gate", "lm_head"]
        }
    }


def test_what_a_library_holds_is_not_left(tiny: LoadedModel, context: Context) -> None:
    bitsandbytes.apply(tiny, bitsandbytes.Params(targets="*.mlp.*"), context)
    attention = [f"model.layers.*.self_attn.{each}_proj" for each in "qkvo"]
    assert kept(tiny) == {"modules": {"16": ["model.embed_tokens", *attention, "lm_head"]}}
