"""Where a family's tensors hold feed-forward neurons, attention heads and channels, and what its config calls them.

Along each dimension of each tensor, `units` says which neuron, which attention unit or which channel stands at each
place. That is all that one needs to cut a network narrower, to zero a part of it, or to sum a score by structure,
whether queries, keys and values are three linears, stacked in one, or interleaved head by head.

An attention unit is a group of query heads with the key-value head that they share. Where all heads share a single
one (multi-query), it is a query head, and the keys and values stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import JsonValue
from torch import Tensor
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from engine.errors import BadModel
from engine.experts import NAMES

Axis = Literal["neurons", "heads", "channels"]
AXES: tuple[Axis, ...] = ("neurons", "heads", "channels")

SEPARATE = frozenset(  # families with a head size of their own, and nothing else that ties widths to each other
    "llama mistral qwen2 qwen3 phi3 smollm3 olmo2 gemma gemma2 gemma3_text mixtral qwen2_moe qwen3_moe olmoe".split()
)
COUPLED = frozenset("stablelm gpt2 gpt_neox opt falcon".split())  # whose head size is hidden size / heads
NEURONS = {"gpt2": "n_inner", "opt": "ffn_dim", "falcon": "ffn_hidden_size"}  # else intermediate_size
OFFSET_NORMS = frozenset("gemma gemma2 gemma3_text".split())  # norms that multiply by 1 + weight

# Leaf modules by what their outputs (rows) or inputs (columns) are; the other side are channels.
QUERIES, KEYS, FUSED = ("q_proj",), ("k_proj", "v_proj"), ("qkv_proj", "c_attn", "query_key_value")
ATTENTION_OUT = ("o_proj", "out_proj", "dense", "attn.c_proj")
WIDENING = ("gate_proj", "up_proj", "gate_up_proj", "fc1", "dense_h_to_4h", "c_fc")
NARROWING = ("down_proj", "fc2", "dense_4h_to_h", "mlp.c_proj")
HEAD_NORMS = ("q_norm", "k_norm", "q_layernorm", "k_layernorm")


@dataclass(frozen=True)
class Anatomy:
    """The widths of a model, and why some of them cannot change.

    heads: query heads; groups: heads of keys and values; head_size: numbers of a head.
    fused: how `query_key_value` holds its rows: head by head (`heads`), or group by group with the queries first
        (`groups`).
    fixed: for an axis that cannot be made narrower, the reason.
    """

    family: str
    blocks: int
    channels: int
    neurons: int
    heads: int
    groups: int
    head_size: int
    fused: Literal["heads", "groups"]
    fixed: Mapping[Axis, str]

    @property
    def attention_units(self) -> int:
        """How many parts attention can be cut into."""
        return self.groups if self.groups > 1 else self.heads

    @property
    def heads_of_unit(self) -> int:
        """Query heads of an attention unit."""
        return self.heads // self.attention_units

    @property
    def coupled(self) -> bool:
        """Whether the config knows no head size: then channels = heads x head size must hold."""
        return self.family in COUPLED

    def size(self, axis: Axis) -> int:
        """How many units there are along an axis (of one block)."""
        return {"neurons": self.neurons, "heads": self.attention_units, "channels": self.channels}[axis]


def of_dict(config: Mapping[str, JsonValue]) -> Anatomy:
    """The anatomy of a model with this config.json.

    Raises:
        BadModel: the family is none of those that are known.
    """
    return of(read(config))


def read(config: Mapping[str, JsonValue]) -> PretrainedConfig:
    """The config of a config.json."""
    found: PretrainedConfig = CONFIG_MAPPING[str(config["model_type"])].from_dict(dict(config))
    return found


def of(config: PretrainedConfig) -> Anatomy:
    """The anatomy of a model with this config.

    Raises:
        BadModel: the family is none of those that are known.
    """
    text = config.get_text_config()
    family = str(text.model_type)
    if family == "bloom":
        raise BadModel(
            "A bloom model cannot get other widths: its feed-forward width follows from its hidden size, and its "
            "positions from its number of heads. Remove blocks instead (prune/depth)."
        )
    if family not in SEPARATE | COUPLED:
        known = ", ".join(sorted(SEPARATE | COUPLED))
        raise BadModel(
            f"A {family} model cannot get other widths here; {known} can. Remove blocks instead (prune/depth)."
        )
    hidden, heads = int(text.hidden_size), int(text.num_attention_heads)
    groups = int(getattr(text, "num_key_value_heads", None) or heads)
    fused: Literal["heads", "groups"] = "heads"
    if family == "falcon":
        groups = text.num_kv_heads if text.new_decoder_architecture else 1 if text.multi_query else heads
        fused = "groups" if text.new_decoder_architecture or text.multi_query else "heads"
    size = hidden // heads if family in COUPLED else int(getattr(text, "head_dim", None) or hidden // heads)
    neurons = int(getattr(text, NEURONS.get(family, "intermediate_size"), None) or 4 * hidden)
    return Anatomy(
        family, int(text.num_hidden_layers), hidden, neurons, heads, groups, size, fused, _fixed(family, text)
    )


def _fixed(family: str, config: PretrainedConfig) -> dict[Axis, str]:
    found: dict[Axis, str] = {}
    if family in ("olmo2", "olmoe"):
        found["heads"] = f"{family} normalises the queries of all heads together"
    if family == "stablelm" and config.qk_layernorm:
        found["heads"] = "this stablelm has a norm for each head"
    if family == "falcon" and config.alibi:
        found["heads"] = "the positions of this falcon follow from its number of heads (ALiBi)"
    if family == "opt" and config.word_embed_proj_dim != config.hidden_size:
        found["channels"] = "this opt projects its embeddings to another size"
    if family == "opt" and not (config.do_layer_norm_before and config.layer_norm_elementwise_affine):
        found["channels"] = "this opt has norms that cannot be corrected for fewer channels"
    if family in NAMES:
        found["neurons"] = found["channels"] = f"{family} is a mixture of experts"
    if family in COUPLED and "heads" in found:
        found.setdefault("channels", found["heads"])
    return found


def units(anatomy: Anatomy, name: str, shape: tuple[int, ...]) -> list[tuple[Axis, Tensor] | None]:
    """For each dimension of the tensor of that name: the axis, and the unit at each place; -1 where all units share it.

    None where a dimension is along no axis (tokens, positions, the numbers of one head), or channels are fixed.
    """
    module = name.rpartition(".")[0]
    if any(part in HEAD_NORMS for part in module.split(".")) or ".experts." in name or "shared_expert" in name:
        return [None] * len(shape)
    inside = _inside(anatomy, module)
    outside: tuple[Axis, Tensor] | None = ("channels", torch.arange(anatomy.channels))
    if "channels" in anatomy.fixed:  # and may not be all of one size
        outside = None
    if inside is None or not ends(module, ATTENTION_OUT + NARROWING):
        rows, columns = inside or outside, outside
    else:
        rows, columns = outside, inside
    found: list[tuple[Axis, Tensor] | None]
    if len(shape) == 1:
        found = [rows]
    elif inside is None:  # embeddings, positions, head, router: only what they read or give is along an axis
        found = [None, outside]
    else:  # GPT-2's `Conv1D` is transposed
        found = [columns, rows] if anatomy.family == "gpt2" else [rows, columns]
    assert len(found) == len(shape), name
    for entry, size in zip(found, shape, strict=True):
        assert entry is None or len(entry[1]) == size, f"{name}: {shape}"
    return found


def _inside(anatomy: Anatomy, module: str) -> tuple[Axis, Tensor] | None:
    """What a linear of a block has on the side that are no channels; None where both are, or it is no such linear."""
    if ends(module, WIDENING + NARROWING):
        places = torch.arange(anatomy.neurons)
        return "neurons", places.repeat(2) if module.endswith("gate_up_proj") else places
    queries = torch.arange(anatomy.heads) // anatomy.heads_of_unit
    keys = torch.arange(anatomy.groups) if anatomy.groups > 1 else torch.tensor([-1])
    if ends(module, QUERIES + ATTENTION_OUT):
        order = queries
    elif ends(module, KEYS):
        order = keys
    elif not ends(module, FUSED):
        return None
    elif not module.endswith("query_key_value"):
        order = torch.cat([queries, keys, keys])
    elif anatomy.fused == "heads":  # (heads, 3, head_size)
        order = queries.repeat_interleave(3)
    else:  # (groups, queries of a group + 2, head_size)
        order = torch.cat([queries.view(anatomy.groups, -1), keys[:, None].expand(-1, 2)], 1).flatten()
    return "heads", order.repeat_interleave(anatomy.head_size)


def ends(module: str, names: tuple[str, ...]) -> bool:
    """Whether the last parts of a module's name are one of these."""
    return f".{module}".endswith(tuple(f".{name}" for name in names))


def is_norm(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is the weight of a norm over all channels."""
    module, _, leaf = name.rpartition(".")
    last = module.rpartition(".")[2]
    return leaf == "weight" and len(shape) == 1 and last not in HEAD_NORMS and "norms" not in module.split(".")
