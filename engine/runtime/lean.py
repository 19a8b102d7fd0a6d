"""Decode steps of a Llama-like network in torch: the modules of `transformers`, preallocated keys and values, no more.

It takes every kind of linear: dense ones, and packed ones, which know how to join what reads the same input.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

FAMILIES = (
    "LlamaForCausalLM", "MistralForCausalLM", "Phi3ForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
    "SmolLM3ForCausalLM",
)  # fmt: skip
ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # the ones that do not change with the length


class LeanDecoder:
    """Decode steps of a Llama-like network without what surrounds its products in `transformers`.

    On a CPU, attention and its cache are float32: torch's bfloat16 attention for one query is 3 to 7 times
    slower, and the cache is small beside the weights. Starts with the prompt's cache less its last token.
    """

    @staticmethod
    def supports(network: PreTrainedModel, tokens: int) -> bool:
        """Whether the network is built of exactly the parts that `step` computes, for sequences of `tokens` at most.

        Within a sliding window attention is that to all tokens.
        """
        config = network.config
        window = getattr(config, "sliding_window", None)
        rope = getattr(getattr(network.base_model, "rotary_emb", None), "rope_type", None)
        return (
            type(network).__name__ in FAMILIES
            and type(network).__module__.startswith("transformers.models.")
            and config.hidden_act == "silu"
            and rope in ROPE_TYPES
            and (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0) == 1.0
            and set(getattr(config, "layer_types", None) or []) <= {"full_attention", "sliding_attention"}
            and (window is None or tokens < window)
        )

    @torch.inference_mode()
    def __init__(self, network: PreTrainedModel, cache: Cache, room: int) -> None:
        body: nn.Module = network.base_model
        config, device = network.config, network.device
        dtype = torch.float32 if device.type == "cpu" else network.dtype
        self._embed, self._norm = body.get_submodule("embed_tokens"), _Norm.of(body.get_submodule("norm"))
        self._head = network.get_submodule("lm_head")
        self._blocks = [_Block.of(layer) for layer in body.get_submodule("layers").children()]
        self._dense = all(type(part) is nn.Linear for block in self._blocks for part in block.linears())
        self._heads = (config.num_attention_heads, config.num_key_value_heads)
        positions = torch.arange(room, device=device)[None]
        rotary = body.get_submodule("rotary_emb")
        cos, sin = rotary(torch.empty(0, dtype=dtype, device=device), positions)  # (1, room, D)
        half = sin.shape[-1] // 2
        self._cos = cos[0]
        # The rotation of a pair (a, b) is (a cos - b sin, b cos + a sin): signed once here, rolled in `step`.
        self._sin = torch.cat((-sin[0, :, :half], sin[0, :, half:]), dim=-1)
        self._length = cache.get_seq_length() - 1
        self._caches = [
            (with_room(layer.keys, self._length, room, dtype), with_room(layer.values, self._length, room, dtype))
            for layer in cache.layers
            if isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None
        ]

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values that are held, room for later ones included."""
        return sum(states.nbytes for pair in self._caches for states in pair)

    @torch.inference_mode()
    def step(self, ids: Tensor) -> Tensor:
        """Logits (B, V) after one more token (B, 1)."""
        at = self._length
        self._length += 1
        x = self._embed(ids[:, 0])  # (B, hidden)
        cos, sin = self._cos[at], self._sin[at]
        with _one_row_products(x.shape[0] if self._dense else 0):
            for block, (keys, values) in zip(self._blocks, self._caches, strict=True):
                x = x + self._attend(block, keys, values, block.before_attention(x), cos, sin)
                y = block.before_mlp(x)
                gate, up = block.gate_up(y).chunk(2, dim=-1)
                x = x + block.down(F.silu(gate).mul_(up))
        with _one_row_products(x.shape[0]):
            logits: Tensor = self._head(self._norm(x))
        return logits

    def _attend(self, block: _Block, keys: Tensor, values: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attention of one token (B, hidden) to all before it and itself; keys and values (B, shared, room, D)."""
        heads, shared = self._heads
        batch, size = x.shape[0], cos.shape[-1]
        q_k_v = block.q_k_v(x).view(batch, heads + 2 * shared, size)
        both = q_k_v.narrow(1, 0, heads + shared)
        if block.head_norms is not None:
            q, k = both.narrow(1, 0, heads), both.narrow(1, heads, shared)
            both = torch.cat((block.head_norms[0](q), block.head_norms[1](k)), dim=1)
        both = both.to(keys.dtype)
        if block.rotates:
            both = torch.addcmul(both * cos, both.roll(size // 2, -1), sin)
        end = self._length
        keys.select(2, end - 1).copy_(both.narrow(1, heads, shared))
        values.select(2, end - 1).copy_(q_k_v.narrow(1, heads + shared, shared))
        out = F.scaled_dot_product_attention(
            both.narrow(1, 0, heads).unsqueeze(2), keys.narrow(2, 0, end), values.narrow(2, 0, end),
            scale=block.scale, enable_gqa=heads != shared,
        )  # fmt: skip
        y: Tensor = block.o(out.to(x.dtype).view(batch, heads * size))
        return y


@dataclass(frozen=True)
class _Norm:
    """An RMS norm of the last dimension, as one operation."""

    weight: Tensor
    epsilon: float

    @classmethod
    def of(cls, module: nn.Module) -> _Norm:
        return cls(module.get_parameter("weight"), float(vars(module)["variance_epsilon"]))

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.epsilon)


@dataclass(frozen=True)
class _Side:
    """Linears side by side that read the same input: one product where their weights are, or can be, joined."""

    parts: tuple[nn.Module, ...]
    joined: nn.Module | None

    @classmethod
    def of(cls, parts: list[nn.Module]) -> _Side:
        if len(parts) == 1:
            return cls(tuple(parts), parts[0])
        kinds = {type(part) for part in parts}
        join = getattr(kinds.pop(), "joined", None) if len(kinds) == 1 else None  # packed linears can
        return cls(tuple(parts), join(parts) if join is not None else None)

    def __call__(self, x: Tensor) -> Tensor:
        """The outputs (B, n) of all parts in a row."""
        if self.joined is None:
            return torch.cat([part(x) for part in self.parts], dim=-1)
        outputs: Tensor = self.joined(x)
        return outputs


@dataclass(frozen=True)
class _Block:
    """The parts of one decoder block, looked up once; in some (of SmolLM3) queries and keys do not rotate."""

    before_attention: _Norm
    q_k_v: _Side
    o: nn.Module
    before_mlp: _Norm
    gate_up: _Side
    down: nn.Module
    head_norms: tuple[_Norm, _Norm] | None
    scale: float
    rotates: bool

    def linears(self) -> tuple[nn.Module, ...]:
        """All products of the block."""
        return (*self.q_k_v.parts, self.o, *self.gate_up.parts, self.down)

    @classmethod
    def of(cls, layer: nn.Module) -> _Block:
        part = layer.get_submodule
        attention = part("self_attn")
        normed = hasattr(attention, "q_norm")
        q_k_v = ["qkv_proj"] if hasattr(attention, "qkv_proj") else ["q_proj", "k_proj", "v_proj"]  # Phi-3 has it whole
        gate_up = ["gate_up_proj"] if hasattr(part("mlp"), "gate_up_proj") else ["gate_proj", "up_proj"]
        return cls(
            _Norm.of(part("input_layernorm")),
            _Side.of([part(f"self_attn.{name}") for name in q_k_v]), part("self_attn.o_proj"),
            _Norm.of(part("post_attention_layernorm")),
            _Side.of([part(f"mlp.{name}") for name in gate_up]), part("mlp.down_proj"),
            (_Norm.of(part("self_attn.q_norm")), _Norm.of(part("self_attn.k_norm"))) if normed else None,
            float(vars(attention)["scaling"]), rotates(attention),
        )  # fmt: skip


def rotates(attention: nn.Module) -> bool:
    """Whether a block's queries and keys turn with their positions."""
    return bool(vars(attention).get("use_rope", True))


def with_room(states: Tensor, length: int, room: int, dtype: torch.dtype) -> Tensor:
    """The first `length` of keys or values (B, heads, n, D) in a tensor (B, heads, room, D) of zeros."""
    batch, heads, _, size = states.shape
    roomy = torch.zeros(batch, heads, room, size, dtype=dtype, device=states.device)
    roomy[:, :, :length] = states[:, :, :length]
    return roomy


@contextlib.contextmanager
def _one_row_products(rows: int) -> Iterator[None]:
    """Products of a dense bfloat16 weight with one row without oneDNN, which moves the weights at half the speed.

    Integer products need oneDNN: blocks that hold some pass 0 rows, which changes nothing.
    (Head of 32,000 x 1,024 on two Zen 4 cores: 4.3 ms with, 1.7 ms without; from two rows on it is the reverse.)
    """
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(before and rows != 1)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)
