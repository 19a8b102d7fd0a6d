"""The parts of decoders that are older than Llama: layer norms with biases, plain MLPs, all heads from one linear.

They differ in what says where a token stands, and in how a block adds up:

    GPT-2       learned positions        x + attend(norm x), then x + mlp(norm x)
    OPT         learned positions        the same; or norm(x + attend x), then norm(x + mlp x)
    GPT-NeoX    a part of a head turns   x + attend(norm x) + mlp(norm x), each with its own norm; or as GPT-2
    Falcon      heads turn; or alibi     the same, with norms of their own or one for both
    BLOOM       alibi                    as GPT-2, behind a norm of the embeddings

A new part has to be one of `engine.runtime.native.forms` as well, or our kernels leave its family to torch.

Alibi (Press et al., 2021, arXiv 2108.12409) adds to each score a slope of its head times the place of what is seen.
"""

from __future__ import annotations

import functools
import importlib
import math
import sys
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from engine.runtime.mlp import ACTIVATIONS, Function, PlainMlp, Side
from engine.runtime.parts import (
    ROPE_TYPES,
    Block,
    Finish,
    Frame,
    InTurn,
    Rounding,
    Sight,
    Sights,
    Then,
    norm,
    unchanged,
)
from engine.wide import bare, is_falcons, is_plain


@dataclass(frozen=True)
class Names:
    """Where a family keeps its parts: those of its body, then those of each block.

    embed, norm: one after the other, those that are there. before_attention, before_mlp: the first that is there.
    """

    embed: tuple[str, ...]
    blocks: str
    norm: tuple[str, ...]
    before_attention: tuple[str, ...]
    q_k_v: tuple[str, ...]
    o: str
    before_mlp: tuple[str, ...]
    up: str
    activation: str
    down: str
    positions: str | None = None


MEGATRON = {"up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"}  # as three families name them
FAMILIES = {
    "GPT2LMHeadModel": Names(
        embed=("wte",), blocks="h", norm=("ln_f",), positions="wpe", before_attention=("ln_1",),
        q_k_v=("attn.c_attn",), o="attn.c_proj", before_mlp=("ln_2",), up="mlp.c_fc", activation="mlp.act",
        down="mlp.c_proj",
    ),
    "OPTForCausalLM": Names(
        embed=("decoder.embed_tokens", "decoder.project_in"), blocks="decoder.layers",
        norm=("decoder.final_layer_norm", "decoder.project_out"), positions="decoder.embed_positions",
        before_attention=("self_attn_layer_norm",), q_k_v=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        o="self_attn.out_proj", before_mlp=("final_layer_norm",), up="fc1", activation="activation_fn", down="fc2",
    ),
    "GPTNeoXForCausalLM": Names(
        embed=("embed_in",), blocks="layers", norm=("final_layer_norm",), before_attention=("input_layernorm",),
        q_k_v=("attention.query_key_value",), o="attention.dense", before_mlp=("post_attention_layernorm",),
        activation="mlp.act", **MEGATRON,
    ),
    "FalconForCausalLM": Names(
        embed=("word_embeddings",), blocks="h", norm=("ln_f",), before_attention=("ln_attn", "input_layernorm"),
        q_k_v=("self_attention.query_key_value",), o="self_attention.dense",
        before_mlp=("ln_mlp", "post_attention_layernorm", "input_layernorm"), activation="mlp.act", **MEGATRON,
    ),
    "BloomForCausalLM": Names(
        embed=("word_embeddings", "word_embeddings_layernorm"), blocks="h", norm=("ln_f",),
        before_attention=("input_layernorm",), q_k_v=("self_attention.query_key_value",), o="self_attention.dense",
        before_mlp=("post_attention_layernorm",), activation="mlp.gelu_impl", **MEGATRON,
    ),
}  # fmt: skip
UNKNOWN = (  # what a config may ask for, and is not computed here
    "add_cross_attention", "apply_residual_connection_post_layernorm", "attention_chunk_size", "layer_types",
    "sliding_window", "slow_but_exact",
)  # fmt: skip


def supports(network: PreTrainedModel) -> bool:
    """Whether a network of one of the families is built of exactly the parts that are computed here."""
    names, config = FAMILIES[type(network).__name__], network.config
    first = network.base_model.get_submodule(f"{names.blocks}.0")
    return (
        not any(getattr(config, key, None) for key in UNKNOWN)
        and (not _turns(network) or config.rope_parameters["rope_type"] in ROPE_TYPES)
        and type(first.get_submodule(names.activation)).__name__ in ACTIVATIONS
    )


def places(network: PreTrainedModel) -> int:
    """How many tokens a text can have: as many as there are learned positions, where positions are learned."""
    positions = _positions(network)
    return sys.maxsize if positions is None else len(positions)


def frame(network: PreTrainedModel, size: int, room: int, dtype: torch.dtype) -> Frame:
    """The parts of a network; heads of `size` numbers, `room` for tokens, attention in `dtype`."""
    names, body = FAMILIES[type(network).__name__], network.base_model
    layers = list(body.get_submodule(names.blocks).children())
    heads, order = _heads(network)
    turns, alibi = _turns(network), _has_alibi(network)
    if turns:
        sights = Sights.turning(network, size, room, dtype)
    else:
        nothing = torch.empty(room, 0, dtype=dtype, device=network.device)
        bias = _alibi(network, heads, size, room).to(dtype) if alibi else None
        sights = Sights([Sight(nothing, nothing, bias=bias)], [0] * len(layers), unchanged, 0)
    # BLOOM adds scores and alibi in the network's dtype, which has few digits left for either far into a text.
    coarse = type(network).__name__ == "BloomForCausalLM" and network.dtype != torch.float32
    return Frame(
        _chain(body, names.embed), _positions(network), sights,
        [_block(layer, names, size, order, turns) for layer in layers], _chain(body, names.norm), heads,
        Rounding(network.dtype) if coarse else None,
    )  # fmt: skip


def _positions(network: PreTrainedModel) -> Tensor | None:
    """Learned positions (n, hidden), from the first token's on: OPT's stand behind two others."""
    name = FAMILIES[type(network).__name__].positions
    if name is None:
        return None
    embedding = network.base_model.get_submodule(name)
    return embedding.get_parameter("weight")[int(vars(embedding).get("offset", 0)) :]


def _turns(network: PreTrainedModel) -> bool:
    return hasattr(network.base_model, "rotary_emb") and not _has_alibi(network)


def _has_alibi(network: PreTrainedModel) -> bool:
    name = type(network).__name__
    return name == "BloomForCausalLM" or (name == "FalconForCausalLM" and bool(network.config.alibi))


def _alibi(network: PreTrainedModel, heads: tuple[int, int], size: int, room: int) -> Tensor:
    """(1, shared, heads of each, room) in the network's dtype, rounded where the family rounds it."""
    build = importlib.import_module(type(network).__module__).build_alibi_tensor
    alibi: Tensor = build(torch.ones(1, room, dtype=torch.long, device=network.device), heads[0], dtype=network.dtype)
    if type(network).__name__ == "FalconForCausalLM":  # scales it as it scales scores
        alibi = alibi / math.sqrt(size)
    return alibi.view(1, heads[1], -1, room)


def _heads(network: PreTrainedModel) -> tuple[tuple[int, int], Tensor | None]:
    """How many heads of queries there are, and of keys and values; and where what a block's linear gives has all of
    them, queries first. None: in this order."""
    config, name = network.config, type(network).__name__
    heads: int = config.num_attention_heads
    if name in ("GPT2LMHeadModel", "OPTForCausalLM"):
        return (heads, heads), None
    groups = heads
    if name == "FalconForCausalLM":
        if config.new_decoder_architecture:
            groups = config.num_kv_heads
        elif config.multi_query:
            return (heads, 1), None
    each = heads // groups
    # Each group's queries, its key and its value; the key and the value stand in the cache once for each query.
    rows = torch.arange(groups * (each + 2), device=network.device).view(groups, each + 2)
    keys, values = (rows[:, place, None].expand(groups, each) for place in (each, each + 1))
    return (heads, heads), torch.cat([rows[:, :each].flatten(), keys.flatten(), values.flatten()])


def _chain(body: nn.Module, names: tuple[str, ...]) -> Function:
    """Parts one after the other, those that are there."""
    found = dict(body.named_modules())
    parts = [norm(found[name]) if isinstance(found[name], nn.LayerNorm) else bare(found[name])
             for name in names if name in found]  # fmt: skip
    return functools.reduce(Then, parts) if parts else unchanged


@dataclass(frozen=True)
class Ordered:
    """Heads of `size` numbers in another order."""

    order: Tensor
    size: int

    def __call__(self, x: Tensor) -> Tensor:
        """x (B, heads D) to (B, heads, D)."""
        return x.view(x.shape[0], -1, self.size).index_select(1, self.order)


@dataclass(frozen=True)
class SideBySide:
    """What follows attention where the MLP does not wait for it: x + attended + mlp(norm x)."""

    before_mlp: Function
    mlp: Function

    def __call__(self, x: Tensor, attended: Tensor) -> Tensor:
        """All (B, hidden)."""
        return x + (self.mlp(self.before_mlp(x)) + attended)


@dataclass(frozen=True)
class NormedAfter:
    """What follows attention where norms stand behind the sums: h = norm(x + attended), then norm(h + mlp h)."""

    after_attention: Function
    mlp: Function
    after_mlp: Function

    def __call__(self, x: Tensor, attended: Tensor) -> Tensor:
        """All (B, hidden)."""
        x = self.after_attention(x + attended)
        return self.after_mlp(x + self.mlp(x))


def _block(layer: nn.Module, names: Names, size: int, order: Tensor | None, turns: bool) -> Block:
    part, there = layer.get_submodule, dict(layer.named_children())
    asking, o, up, down = [part(name) for name in names.q_k_v], part(names.o), part(names.up), part(names.down)
    mlp = PlainMlp(bare(up), ACTIVATIONS[type(part(names.activation)).__name__], bare(down))
    first, own = (next(n for n in each if n in there) for each in (names.before_attention, names.before_mlp))
    before, after = norm(there[first]), norm(there[own])
    # Falcon's layers do not say it: those that go in turn have a norm between.
    parallel = vars(layer).get("use_parallel_residual", own in ("ln_mlp", "input_layernorm"))
    finish: Finish = (SideBySide if parallel else InTurn)(after, mlp)
    if not vars(layer).get("do_layer_norm_before", True):
        before, finish = unchanged, NormedAfter(before, mlp, after)
    side = Side.of(asking)
    return Block(
        before, side if order is None else Then(side, Ordered(order, size)), None, bare(o), finish,
        float(vars(part(names.o.rpartition(".")[0])).get("scaling", size**-0.5)), turns, 0,
        all(is_plain(linear) or is_falcons(linear) for linear in [*asking, o, up, down]),
    )  # fmt: skip
