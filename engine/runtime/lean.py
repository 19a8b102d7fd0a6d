"""Decode steps of a network in torch: the modules of `transformers`, preallocated keys and values, no more.

It takes every kind of linear: dense ones, and packed ones, which know how to join what reads the same input.
`engine.runtime.parts` and `engine.runtime.classic` say what the families' blocks are made of, and say it for the
`NativeDecoder`, too: `engine.runtime.native.forms` makes structs of the same parts where our kernels know all of them.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from engine.kv_cache import PackedCache, PackedLayer
from engine.runtime import classic
from engine.runtime.mlp import activation
from engine.runtime.parts import ROPE_TYPES, BentAttention, Block, Frame, Place, Then, logit_cap, windows

FAMILIES = (
    "GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "LlamaForCausalLM", "MistralForCausalLM",
    "MixtralForCausalLM", "Olmo2ForCausalLM", "OlmoeForCausalLM", "Phi3ForCausalLM", "Qwen2ForCausalLM",
    "Qwen2MoeForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "SmolLM3ForCausalLM", "StableLmForCausalLM",
)  # fmt: skip
TURN_IN_PART = ("Phi3ForCausalLM", "StableLmForCausalLM")
OF_KINDS = (  # whose blocks slide where `layer_types` says so; elsewhere all of them do
    "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Qwen2ForCausalLM", "Qwen2MoeForCausalLM", "Qwen3ForCausalLM",
    "SmolLM3ForCausalLM",
)  # fmt: skip


class LeanDecoder:
    """Decode steps of a network without what surrounds its products in `transformers`.

    On a CPU, attention and its cache are float32: torch's bfloat16 attention for one query is 3 to 7 times
    slower, and the cache is small beside the weights. Starts with the prompt's cache less its last token.

    A packed cache is used as it is, with its last token, and unpacked for each block's attention.
    """

    @staticmethod
    def supports(network: PreTrainedModel, read: int) -> bool:
        """Whether the network is built of exactly the parts that `step` computes, after a prompt of `read` tokens.

        Of a prompt that fills a sliding window the cache has lost what the repeated last token attends to.
        """
        config, name = network.config, type(network).__name__
        if not type(network).__module__.startswith("transformers.models."):
            return False
        if name in classic.FAMILIES:
            return classic.supports(network)
        if name not in FAMILIES:
            return False
        ropes = config.rope_parameters or {}
        ropes = list(ropes.values()) if config.model_type == "gemma3_text" else [ropes]
        kinds = getattr(config, "layer_types", None)
        return (
            all(rope.get("rope_type") in ROPE_TYPES for rope in ropes)
            and (name in TURN_IN_PART or all(rope.get("partial_rotary_factor", 1.0) == 1.0 for rope in ropes))
            and set(kinds or []) <= {"full_attention", "sliding_attention"}
            and (name in OF_KINDS or kinds is None or getattr(config, "sliding_window", None) is None)
            and all(window is None or read < window for window in windows(network))
            and not any(
                getattr(config, key, None)
                for key in ("use_bidirectional_attention", "use_parallel_residual", "qk_layernorm", "clip_qkv")
            )
            and activation(network.base_model.get_submodule("layers.0.mlp")) is not None
        )

    @staticmethod
    def places(network: PreTrainedModel) -> int:
        """How many tokens a text can have at all, for a network that is supported."""
        return classic.places(network) if type(network).__name__ in classic.FAMILIES else sys.maxsize

    @torch.inference_mode()
    def __init__(self, network: PreTrainedModel, cache: Cache, room: int) -> None:
        dtype = torch.float32 if network.device.type == "cpu" else network.dtype
        self._packed = cache if isinstance(cache, PackedCache) else None
        self._length = cache.get_seq_length() - (0 if self._packed else 1)
        self._caches: Sequence[_Exact | _Packed] = (
            [_Packed(layer, network.dtype, dtype) for layer in self._packed.blocks]
            if self._packed
            else _exact(cache, self._length, room, dtype)
        )
        self._size = self._caches[0].size
        frame = frame_of(network, self._size, room, dtype)
        self._embed, self._positions, self._blocks = frame.embed, frame.positions, frame.blocks
        self._sights, self._partner = frame.sights.of, frame.sights.partner
        self._norm, self._heads = frame.norm, frame.heads
        self._dense = all(block.dense for block in self._blocks)
        head, cap = network.get_submodule("lm_head"), logit_cap(network)
        self._head = head if cap is None else Then(head, cap)
        self._attention: Callable[..., Tensor] = F.scaled_dot_product_attention
        if frame.bend is not None:
            self._attention = BentAttention(frame.bend)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values that are held, room for later ones included."""
        return sum(states.nbytes for states in self._caches)

    @torch.inference_mode()
    def step(self, ids: Tensor) -> Tensor:
        """Logits (B, V) after one more token (B, 1)."""
        at = self._length
        self._length += 1
        x = self._embed(ids[:, 0])  # (B, hidden)
        if self._positions is not None:
            x = x + self._positions[at]
        places = [sight.at(at) for sight in self._sights]
        with _one_row_products(x.shape[0] if self._dense else 0):
            for block, cache in zip(self._blocks, self._caches, strict=True):
                x = block.finish(x, self._attend(block, cache, block.before_attention(x), places[block.sight]))
        with _one_row_products(x.shape[0]):
            logits: Tensor = self._head(self._norm(x))
        return logits

    def glance(self, ids: Tensor) -> Tensor:
        """`step` with a token that is forgotten again."""
        with contextlib.nullcontext() if self._packed is None else self._packed.glance():
            logits = self.step(ids)
        self._length -= 1
        return logits

    def _attend(self, block: Block, cache: _Exact | _Packed, x: Tensor, place: Place) -> Tensor:
        """Attention of one token (B, hidden) to those up to itself."""
        heads, shared = self._heads
        batch, size = x.shape[0], self._size
        q_k_v = block.q_k_v(x).view(batch, heads + 2 * shared, size)
        both = q_k_v.narrow(1, 0, heads + shared)
        if block.head_norms is not None:
            both = block.head_norms(both.narrow(1, 0, heads), both.narrow(1, heads, shared))
        both = both.to(place.cos.dtype)
        if block.rotates:
            both = torch.addcmul(both * place.cos, self._partner(both), place.sin)
        keys, values = cache.extend(
            both.narrow(1, heads, shared), q_k_v.narrow(1, heads + shared, shared), place.first, place.seen
        )  # fmt: skip
        # Heads that share their keys stand where other queries would, which see all of them, too: twice as fast as
        # `enable_gqa` (one core of Zen 3).
        q = both.narrow(1, 0, heads).reshape(batch, shared, -1, size)
        out = self._attention(q, keys, values, place.bias, scale=block.scale)
        return block.o(out.to(x.dtype).reshape(batch, heads * size))


def frame_of(network: PreTrainedModel, size: int, room: int, dtype: torch.dtype) -> Frame:
    """The parts of a supported network; heads of `size` numbers, `room` for tokens, attention in `dtype`."""
    build = classic.frame if type(network).__name__ in classic.FAMILIES else Frame.of
    return build(network, size, room, dtype)


@dataclass(frozen=True)
class _Exact:
    """Keys and values (B, shared, room, D) of one block."""

    keys: Tensor
    values: Tensor

    @property
    def size(self) -> int:
        return self.keys.shape[-1]

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def extend(self, keys: Tensor, values: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Keep those of a new token (B, shared, D); the `count` from `first` on, of which it is the last."""
        self.keys.select(2, first + count - 1).copy_(keys)
        self.values.select(2, first + count - 1).copy_(values)
        return self.keys.narrow(2, first, count), self.values.narrow(2, first, count)


def _exact(cache: Cache, length: int, room: int, dtype: torch.dtype) -> list[_Exact]:
    return [
        _Exact(with_room(layer.keys, length, room, dtype), with_room(layer.values, length, room, dtype))
        for layer in cache.layers
        if isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None
    ]


@dataclass(frozen=True)
class _Packed:
    """A block's part of a packed cache, which holds the newest tokens as `held`; attention takes them as `wanted`."""

    layer: PackedLayer
    held: torch.dtype
    wanted: torch.dtype

    @property
    def size(self) -> int:
        return self.layer.head_size

    @property
    def nbytes(self) -> int:
        return self.layer.nbytes

    def extend(self, keys: Tensor, values: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
        """As `_Exact`; the layer knows itself how far back its block sees."""
        return self.layer.update_as(keys.unsqueeze(2).to(self.held), values.unsqueeze(2).to(self.held), self.wanted)


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
