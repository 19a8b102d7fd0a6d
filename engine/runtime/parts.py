"""The parts of a decoder, looked up once so that a decode step asks nothing: norms, products, rotations.

Families of Llama's kind stand here, elder ones in `engine.runtime.classic`. They differ in where norms stand, in what
they norm and how, in how far back a block sees, and in what turns:

    Llama, Mistral, Phi-3, Qwen 2, SmolLM3, Gemma 1   x + attend(norm x), then x + mlp(norm x)
    Mixtral, Qwen2-MoE                                the same, with a mixture for the MLP (`engine.runtime.mlp`)
    StableLM                                          the same with layer norms; a part of each head turns
    Qwen 3, Qwen3-MoE                                 the same; each head of queries and keys has a norm
    OLMoE                                             the same; all heads of queries have one norm, all of keys, too
    OLMo 2                                            x + norm(attend x); all heads of queries have one norm
    Gemma 2, 3                                        x + norm(attend(norm x))
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from engine.runtime.mlp import Function, Side, feed_forward
from engine.wide import bare, is_plain

CAPPED_SCORES = ("Gemma2ForCausalLM",)  # Gemma 3's config has a cap, which `transformers` does not read
CAPPED_LOGITS = ("Gemma2ForCausalLM", "Gemma3ForCausalLM")
ROUNDS_ONCE = ("Olmo2RMSNorm",)
ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # the ones that do not change with the length


Finish = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Norm:
    """An RMS norm of the last dimension, as one operation.

    rounds: whether `transformers` rounds the quotient before it multiplies. distances: of the weights from 1, where the
    family keeps those.
    """

    weight: Tensor
    epsilon: float
    rounds: bool = True
    distances: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.epsilon)


@dataclass(frozen=True)
class LayerNorm:
    """A layer norm of the last dimension without its module; some have no weight, some no bias."""

    shape: tuple[int, ...]
    weight: Tensor | None
    bias: Tensor | None
    epsilon: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.shape, self.weight, self.bias, self.epsilon)


def norm(module: nn.Module | None) -> Function:
    """What a norm computes; nothing where there is none."""
    if module is None:
        return unchanged
    if isinstance(module, nn.LayerNorm):
        return LayerNorm(module.normalized_shape, module.weight, module.bias, module.eps)
    own, weight = vars(module), module.get_parameter("weight")
    if "eps" in own:  # Gemma's
        return Norm((1 + weight.float()).to(weight.dtype), float(own["eps"]), False, weight)
    return Norm(weight, float(own["variance_epsilon"]), type(module).__name__ not in ROUNDS_ONCE)


def unchanged(x: Tensor) -> Tensor:
    """What stands where there is nothing to compute."""
    return x


@dataclass(frozen=True)
class Then:
    """One function after the other."""

    first: Function
    second: Function

    def __call__(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


@dataclass(frozen=True)
class Cap:
    """Numbers bent into -limit .. limit."""

    limit: float

    def __call__(self, x: Tensor) -> Tensor:
        return torch.tanh(x / self.limit) * self.limit


@dataclass(frozen=True)
class Rounding:
    """Numbers as another dtype has them."""

    dtype: torch.dtype

    def __call__(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).to(x.dtype)


@dataclass(frozen=True)
class BentAttention:
    """`scaled_dot_product_attention` of one token with scores bent by a function, which no kernel of torch's knows."""

    bend: Function

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *, scale: float) -> Tensor:
        """q (B, shared, heads of each, D) of all k and v (B, shared, n, D); bias (1, shared, heads of each, n)."""
        scores = q @ k.transpose(2, 3) * scale
        scores = self.bend(scores if bias is None else scores + bias)
        return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v


@dataclass(frozen=True)
class EachHead:
    """Norms of each head of queries and keys."""

    q: Function
    k: Function

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        """q (B, heads, D) and k (B, shared, D) as one (B, heads + shared, D)."""
        return torch.cat((self.q(q), self.k(k)), dim=1)


@dataclass(frozen=True)
class AllHeads:
    """Norms of all queries' heads together, and of all keys'."""

    q: Function
    k: Function

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        """As `EachHead`."""
        return torch.cat((self.q(q.flatten(1)), self.k(k.flatten(1))), dim=1).view(q.shape[0], -1, q.shape[2])


class Place(NamedTuple):
    """What a token at some place attends to: those `seen` from `first` on, of which it is the last, and how.

    cos, sin: (D,), for heads that turn. bias: (1, shared, heads of each, seen) that is added to its scores.
    """

    cos: Tensor
    sin: Tensor
    first: int
    seen: int
    bias: Tensor | None


@dataclass(frozen=True)
class Sight:
    """How far back blocks see, and how their queries and keys turn: cos and signed sin (room, D).

    bias: (1, shared, heads of each, room), by the places of what is seen; in families whose scores have one.
    """

    cos: Tensor
    sin: Tensor
    window: int = sys.maxsize
    bias: Tensor | None = None

    def at(self, position: int) -> Place:
        """What a token sees."""
        first = max(0, position + 1 - self.window)
        seen = position + 1 - first
        bias = None if self.bias is None else self.bias.narrow(-1, first, seen)
        return Place(self.cos[position], self.sin[position], first, seen, bias)


@dataclass(frozen=True)
class Sights:
    """Those of a network's blocks for `room` tokens: `of` them all, and each block's number among them.

    turns: how many numbers of a head turn, the first half of these with the second. partner: of each number of a head
    the one with which it turns. Where heads of `size` numbers turn in part, the others have cos 1 and sin 0, and are
    their own.
    """

    of: list[Sight]
    numbers: list[int]
    partner: Function
    turns: int

    @classmethod
    def turning(cls, network: PreTrainedModel, size: int, room: int, dtype: torch.dtype) -> Sights:
        """Of a network whose heads turn, all of them in a way that does not change with the length."""
        rotary: nn.Module = network.base_model.get_submodule("rotary_emb")
        positions = torch.arange(room, device=network.device)[None]
        empty = torch.empty(0, dtype=dtype, device=network.device)
        spans = windows(network)
        kinds = network.config.layer_types if isinstance(vars(rotary).get("rope_type"), dict) else [None] * len(spans)
        each = [(kind, sys.maxsize if span is None else span) for kind, span in zip(kinds, spans, strict=True)]
        distinct = list(dict.fromkeys(each))
        found = []
        for kind, window in distinct:
            cos, sin = (
                rotary(empty, positions) if kind is None else rotary(empty, positions, kind)
            )  # (1, room, turning)
            cos, sin = cos[0].to(dtype), sin[0].to(dtype)
            turning = cos.shape[-1]
            # The rotation of a pair (a, b) is (a cos - b sin, b cos + a sin): signed here once.
            signed = torch.cat((-sin[:, : turning // 2], sin[:, turning // 2 :]), dim=-1)
            still = size - turning
            found.append(Sight(F.pad(cos, (0, still), value=1.0), F.pad(signed, (0, still)), window))
        partner: Function = functools.partial(torch.roll, shifts=size // 2, dims=-1)
        if turning < size:
            order = torch.arange(size, device=network.device)
            order[:turning] = order[:turning].roll(turning // 2)
            partner = functools.partial(torch.index_select, dim=-1, index=order)
        return cls(found, [distinct.index(pair) for pair in each], partner, turning)


@dataclass(frozen=True)
class InTurn:
    """What follows attention in most blocks: h = x + attended, then h + mlp(norm h)."""

    before_mlp: Function
    mlp: Function

    def __call__(self, x: Tensor, attended: Tensor) -> Tensor:
        """All (B, hidden)."""
        x = x + attended
        return x + self.mlp(self.before_mlp(x))


@dataclass(frozen=True)
class Block:
    """The parts of one decoder block; in some (of SmolLM3) queries and keys do not rotate.

    q_k_v: gives (B, (heads + 2 shared) D), or with the heads apart; queries first. o: with the norm that follows it,
    where one does. finish: the block's output, of its input and what attention gave. dense: no product has packed
    weights.
    """

    before_attention: Function
    q_k_v: Function
    head_norms: EachHead | AllHeads | None
    o: Function
    finish: Finish
    scale: float
    rotates: bool
    sight: int
    dense: bool

    @classmethod
    def of(cls, layer: nn.Module, sight: int) -> Block:
        """Of a layer of Llama's kind."""
        part, norms = layer.get_submodule, dict(layer.named_children())
        attention, mlp = part("self_attn"), feed_forward(part("mlp"))
        q_k_v = ["qkv_proj"] if hasattr(attention, "qkv_proj") else ["q_proj", "k_proj", "v_proj"]  # Phi-3 has it whole
        asking, last = [attention.get_submodule(n) for n in q_k_v], part("self_attn.o_proj")
        o = bare(last)
        after_mlp = norms.get("post_feedforward_layernorm")
        between = norms["post_attention_layernorm"]  # before the MLP, unless that has norms of its own
        before_mlp = between if after_mlp is None else norms.get("pre_feedforward_layernorm")
        return cls(
            norm(norms.get("input_layernorm")), Side.of(asking), _head_norms(attention),
            o if after_mlp is None else Then(o, norm(between)),
            InTurn(norm(before_mlp), mlp if after_mlp is None else Then(mlp, norm(after_mlp))),
            float(vars(attention)["scaling"]), rotates(attention), sight,
            mlp.dense and all(is_plain(linear) for linear in [*asking, last]),
        )  # fmt: skip


@dataclass(frozen=True)
class Frame:
    """All parts of a decoder but its head.

    embed: of token ids (B,). positions: (n, hidden) that are added to it, where they are learned. heads: of queries,
    and of keys and values. bend: what is done to the scores of attention before their softmax, in some families.
    """

    embed: Function
    positions: Tensor | None
    sights: Sights
    blocks: list[Block]
    norm: Function
    heads: tuple[int, int]
    bend: Function | None

    @classmethod
    def of(cls, network: PreTrainedModel, size: int, room: int, dtype: torch.dtype) -> Frame:
        """Of a network of Llama's kind; heads of `size` numbers, `room` for tokens, attention in `dtype`."""
        part, config = network.base_model.get_submodule, network.config
        sights = Sights.turning(network, size, room, dtype)
        return cls(
            part("embed_tokens"), None, sights,
            [Block.of(layer, number) for layer, number in zip(part("layers").children(), sights.numbers, strict=True)],
            norm(part("norm")), (config.num_attention_heads, config.num_key_value_heads), _score_cap(network),
        )  # fmt: skip


def logit_cap(network: PreTrainedModel) -> Cap | None:
    """What bends the logits of a family that bends them."""
    cap = getattr(network.config, "final_logit_softcapping", None)
    return None if cap is None or type(network).__name__ not in CAPPED_LOGITS else Cap(float(cap))


def _score_cap(network: PreTrainedModel) -> Cap | None:
    config = network.config
    cap = getattr(config, "attn_logit_softcapping", None)
    if cap is None or type(network).__name__ not in CAPPED_SCORES or config._attn_implementation == "sdpa":
        return None
    return Cap(float(cap))


def _head_norms(attention: nn.Module) -> EachHead | AllHeads | None:
    if not hasattr(attention, "q_norm"):
        return None
    q, k = (attention.get_submodule(f"{name}_norm") for name in "qk")
    each = q.get_parameter("weight").numel() == vars(attention)["head_dim"]
    return (EachHead if each else AllHeads)(norm(q), norm(k))


def rotates(attention: nn.Module) -> bool:
    """Whether a block's queries and keys turn with their positions."""
    return bool(vars(attention).get("use_rope", True))


def windows(network: PreTrainedModel) -> list[int | None]:
    """How many tokens each block attends to, the newest included; None: to all."""
    config = network.config
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]
