"""The parts of decoders that are older than Llama: layer norms with biases, plain MLPs, all heads from one linear.

They differ in what says where a token stands, and in how a block adds up:

    GPT-2       learned positions        x + attend(norm x), then x + mlp(norm x)
    OPT         learned positions        the same; or norm(x + attend x), then norm(x + mlp x)
    GPT-NeoX    a part of a head turns   x + attend(norm x) + mlp(norm x), each with its own norm; or as GPT-2
    Falcon      heads turn; or alibi     the same, with norms of their own or one for both
    BLOOM       alibi                    as GPT-2, behind a norm of the embeddings

Alibi (Press et al., 2021, arXiv 2108.12409) adds to each score a slope of its head times the place of what is seen.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from engine.runtime.mlp import ACTIVATIONS, PlainMlp, Side
from engine.runtime.parts import Block, Frame, InTurn, Sight, Sights, norm
from engine.wide import bare, is_falcons, is_plain


@dataclass(frozen=True)
class Names:
    """Where a family keeps its parts: three of its body, then those of each block."""

    embed: str
    blocks: str
    norm: str
    before_attention: str
    q_k_v: tuple[str, ...]
    o: str
    before_mlp: str
    up: str
    activation: str
    down: str


FAMILIES = {
    "GPT2LMHeadModel": Names(
        "wte", "h", "ln_f", "ln_1", ("attn.c_attn",), "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.act", "mlp.c_proj"
    ),
}  # fmt: skip
UNKNOWN = (  # what a config may ask for, and is not computed here
    "add_cross_attention", "attention_chunk_size", "layer_types", "sliding_window",
)  # fmt: skip


def supports(network: PreTrainedModel) -> bool:
    """Whether a network of one of the families is built of exactly the parts that are computed here."""
    names, config = FAMILIES[type(network).__name__], network.config
    first = network.base_model.get_submodule(f"{names.blocks}.0")
    return (
        not any(getattr(config, key, None) for key in UNKNOWN)
        and type(first.get_submodule(names.activation)).__name__ in ACTIVATIONS
    )


def places(network: PreTrainedModel) -> int:
    """How many tokens a text can have: as many as there are learned positions, where positions are learned."""
    positions = _positions(network)
    return sys.maxsize if positions is None else len(positions)


def frame(network: PreTrainedModel, size: int, room: int, dtype: torch.dtype) -> Frame:
    """The parts of a network; heads of `size` numbers, `room` for tokens, attention in `dtype`."""
    names, part, config = FAMILIES[type(network).__name__], network.base_model.get_submodule, network.config
    heads = (config.num_attention_heads, config.num_attention_heads)
    layers = list(part(names.blocks).children())
    nothing = torch.empty(room, 0, dtype=dtype, device=network.device)
    sights = Sights([Sight(nothing, nothing)], [0] * len(layers), lambda x: x)
    blocks = [_block(layer, names, size) for layer in layers]
    return Frame(part(names.embed), _positions(network), sights, blocks, norm(part(names.norm)), heads)


def _positions(network: PreTrainedModel) -> Tensor | None:
    """Learned positions (n, hidden), from the first on."""
    return network.base_model.get_submodule("wpe").get_parameter("weight")


def _block(layer: nn.Module, names: Names, size: int) -> Block:
    part = layer.get_submodule
    asking, o, up, down = [part(name) for name in names.q_k_v], part(names.o), part(names.up), part(names.down)
    mlp = PlainMlp(bare(up), ACTIVATIONS[type(part(names.activation)).__name__], bare(down))
    attention = part(names.o.rpartition(".")[0])
    return Block(
        norm(part(names.before_attention)), Side.of(asking), None, bare(o), InTurn(norm(part(names.before_mlp)), mlp),
        float(vars(attention).get("scaling", size**-0.5)), False, 0,
        all(is_plain(linear) or is_falcons(linear) for linear in [*asking, o, up, down]),
    )  # fmt: skip
