"""Tokens of one model, streamed with their log-probabilities; and a given text as the model sees it.

A token of a packed model costs a few milliseconds, so what surrounds the products counts. The prompt runs
through `transformers` as always. For the Llama family the tokens after it run through `LeanDecoder`: the
same modules, with preallocated keys and values and nothing else around them; or, where our own kernels
know all products of the blocks, through their `NativeDecoder`. The first step repeats the last token of the
prompt and is compared with what `transformers` said; where the two disagree, and for every other family,
`transformers` goes on with its own cache. So it does for models that hold keys and values packed, with the
cache of `engine.kv_cache`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from engine.kv_cache import PackedCache, read_on
from engine.models import LoadedModel
from engine.packing import CacheGrid
from engine.runtime.native.decoder import NativeDecoder

log = logging.getLogger(__name__)

LEAN_FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # the ones that do not change with the length
# Largest relative distance of two bfloat16 logit vectors that differ in rounding only: seen up to 0.01.
AGREEMENT = 0.05


@dataclass(frozen=True)
class Generated:
    """One new token and the distribution (V,), float32 log-probabilities at temperature 1, that it came from."""

    token_id: int
    logprobs: Tensor


@dataclass(frozen=True)
class Draw:
    """How a token is taken from its distribution: at temperature 0 the likeliest, else drawn.

    Only the `top_k` likeliest are drawn from (0: all), of these the fewest whose odds reach `top_p` together (1: all).
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    dice: torch.Generator | None = None


GREEDY = Draw()


def generate(
    model: LoadedModel, prompt_ids: list[int], *, max_new_tokens: int, temperature: float = 0.0, seed: int = 0,
    top_p: float = 1.0, top_k: int = 0,
) -> Iterator[Generated]:  # fmt: skip
    """New tokens after a prompt, the end-of-text token included, which ends them.

    Temperature 0 takes the likeliest token; else tokens are drawn with `seed`, as `Draw` says. Closing stops it.

    Raises:
        ValueError: the prompt is empty.
    """
    stops = end_tokens(model.network)
    draw = Draw(temperature, top_p, top_k, torch.Generator().manual_seed(seed))
    for step in decode(model.network, prompt_ids, max_new_tokens, kv_cache=model.kv_cache, draw=draw):
        yield Generated(int(step.tokens[0]), step.logprobs[0])
        if int(step.tokens[0]) in stops:
            return


@dataclass(frozen=True)
class Step:
    """One new token for each sequence of a batch: tokens (B,) and float32 log-probabilities (B, V)."""

    tokens: Tensor
    logprobs: Tensor


def decode(
    network: PreTrainedModel,
    prompt_ids: list[int],
    max_new_tokens: int,
    *,
    batch: int = 1,
    kv_cache: CacheGrid | None = None,
    draw: Draw = GREEDY,
) -> Iterator[Step]:
    """`max_new_tokens` steps of `batch` sequences that begin with the same prompt; no token ends them.

    With `kv_cache`, keys and values are held packed.

    Raises:
        ValueError: the prompt is empty.
    """
    if not prompt_ids:
        raise ValueError("a prompt of no tokens has no continuation")
    if max_new_tokens < 1:
        return
    ids = torch.tensor([prompt_ids] * batch, device=network.device)
    logits, cache = _read_prompt(network, ids, kv_cache)
    step = _choose(logits, draw)
    yield step
    decoder: _Decoder | None = None
    for _ in range(max_new_tokens - 1):
        decoder = decoder or _decoder(network, cache, ids, logits, len(prompt_ids) + max_new_tokens)
        step = _choose(decoder.step(step.tokens[:, None]), draw)
        yield step


@torch.inference_mode()
def score(model: LoadedModel, ids: list[int], start: int) -> Tensor:
    """Log-probabilities (len(ids) - start, V), float32, with which the model predicts `ids[start:]`.

    Raises:
        ValueError: `start` is below 1, where nothing comes before, or beyond the text.
    """
    if not 1 <= start <= len(ids):
        raise ValueError(f"start {start} is outside 1..{len(ids)}")
    if model.kv_cache is not None:
        return _score_packed(model.network, ids, start, model.kv_cache)
    logits: Tensor = model.network(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits
    return logits[0, start - 1 : len(ids) - 1].float().log_softmax(-1)


def _score_packed(network: PreTrainedModel, ids: list[int], start: int, grid: CacheGrid) -> Tensor:
    """`score` with every prediction from the packed cache that `decode` would have at its place.

    Tokens that see the same packed groups are read at once.
    """
    cache = PackedCache(network.config, grid)
    parts = []
    place, end = 0, start  # of the tokens that are read next: first the prompt, as `decode` does
    while place < len(ids):
        part = torch.tensor([ids[place:end]], device=network.device)
        parts.append(read_on(network, part, cache)[0][0])
        place, end = end, end + cache.room
    return torch.cat(parts)[start - 1 : len(ids) - 1].float().log_softmax(-1)


@torch.inference_mode()
def cache_bytes(model: LoadedModel, ids: list[int]) -> int:
    """Bytes of the keys and values that `decode` holds after a text, for one sequence.

    Raises:
        ValueError: the text is empty.
    """
    if not ids:
        raise ValueError("a text of no tokens has no keys and values")
    rows = torch.tensor([ids], device=model.device)
    logits, cache = _read_prompt(model.network, rows, model.kv_cache)
    decoder = _decoder(model.network, cache, rows, logits, len(ids))
    return decoder.cache_bytes


def end_tokens(network: PreTrainedModel) -> frozenset[int]:
    """The tokens that end a text."""
    end = network.generation_config.eos_token_id if network.generation_config else None
    end = network.config.get_text_config().eos_token_id if end is None else end
    return frozenset([end] if isinstance(end, int) else end or [])


class _Decoder(Protocol):
    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values that are held."""

    def step(self, ids: Tensor) -> Tensor:
        """Logits (B, V) after one more token (B, 1)."""


@torch.inference_mode()
def _read_prompt(network: PreTrainedModel, ids: Tensor, grid: CacheGrid | None) -> tuple[Tensor, Cache]:
    """Logits (B, V) after the prompt (B, n), and its keys and values."""
    logits, cache = read_on(network, ids, None if grid is None else PackedCache(network.config, grid), last=True)
    return logits[:, -1], cache


@torch.inference_mode()
def _choose(logits: Tensor, draw: Draw) -> Step:
    logprobs = logits.float().log_softmax(-1)
    if draw.temperature <= 0:
        return Step(logprobs.argmax(-1), logprobs)
    odds = allowed((logprobs / draw.temperature).softmax(-1).cpu(), draw.top_p, draw.top_k)
    return Step(torch.multinomial(odds, 1, generator=draw.dice)[:, 0].to(logits.device), logprobs)


def allowed(odds: Tensor, top_p: float, top_k: int) -> Tensor:
    """Odds (..., V) with zero where a token may not be drawn; the likeliest always may."""
    if top_k <= 0 and top_p >= 1:
        return odds
    ordered, order = odds.sort(stable=True, dim=-1, descending=True)
    drop = torch.zeros_like(ordered, dtype=torch.bool)
    if top_k > 0:
        drop[..., top_k:] = True
    kept = ordered.masked_fill(drop, 0.0)
    before = kept.cumsum(-1) - kept  # the odds of all that are likelier
    drop |= before >= top_p * kept.sum(-1, keepdim=True)
    drop[..., 0] = False
    return torch.zeros_like(odds).scatter(-1, order, ordered.masked_fill(drop, 0.0))


def _decoder(network: PreTrainedModel, cache: Cache, ids: Tensor, logits: Tensor, room: int) -> _Decoder:
    """The lean decoder where it agrees with `transformers` about the prompt's end, else `transformers`.

    The lean decoder knows no packed cache.
    """
    if not isinstance(cache, PackedCache) and LeanDecoder.supports(network):
        kind = NativeDecoder if NativeDecoder.supports(network, len(ids)) else LeanDecoder
        lean: _Decoder = kind(network, cache, room)
        seen = lean.step(ids[:, -1:])
        distance = (seen.float() - logits.float()).norm() / logits.float().norm()
        if distance <= AGREEMENT:
            return lean
        log.warning("%s: the lean decoder is off by %.3f and is not used", type(network).__name__, distance)
    return _WholeModel(network, cache)


class _WholeModel:
    """Decode through the forward pass of `transformers`."""

    def __init__(self, network: PreTrainedModel, cache: Cache) -> None:
        self._network, self._cache = network, cache

    @property
    def cache_bytes(self) -> int:
        if isinstance(self._cache, PackedCache):
            return self._cache.nbytes
        held = [(layer.keys, layer.values) for layer in self._cache.layers if isinstance(layer, DynamicLayer)]
        return sum(states.nbytes for pair in held for states in pair if states is not None)

    @torch.inference_mode()
    def step(self, ids: Tensor) -> Tensor:
        return read_on(self._network, ids, self._cache)[0][:, -1]


class LeanDecoder:
    """Decode steps of a Llama-like network without what surrounds its products in `transformers`.

    On a CPU, attention and its cache are float32: torch's bfloat16 attention for one query is 3 to 7 times
    slower, and the cache is small beside the weights. Starts with the prompt's cache less its last token.
    """

    @staticmethod
    def supports(network: PreTrainedModel) -> bool:
        """Whether the network is built of exactly the parts that `step` computes."""
        config = network.config
        rope = getattr(getattr(network.base_model, "rotary_emb", None), "rope_type", None)
        return (
            type(network).__name__ in LEAN_FAMILIES
            and type(network).__module__.startswith("transformers.models.")
            and config.hidden_act == "silu"
            and rope in ROPE_TYPES
            and set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
            and getattr(config, "sliding_window", None) is None
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
            (_with_room(layer.keys, self._length, room, dtype), _with_room(layer.values, self._length, room, dtype))
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
    """Linears side by side that read the same input: one product where their weights can be joined."""

    parts: tuple[nn.Module, ...]
    joined: nn.Module | None

    @classmethod
    def of(cls, parts: list[nn.Module]) -> _Side:
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
    """The parts of one decoder block, looked up once."""

    before_attention: _Norm
    q_k_v: _Side
    o: nn.Module
    before_mlp: _Norm
    gate_up: _Side
    down: nn.Module
    head_norms: tuple[_Norm, _Norm] | None
    scale: float

    def linears(self) -> tuple[nn.Module, ...]:
        """All products of the block."""
        return (*self.q_k_v.parts, self.o, *self.gate_up.parts, self.down)

    @classmethod
    def of(cls, layer: nn.Module) -> _Block:
        part = layer.get_submodule
        attention = part("self_attn")
        normed = hasattr(attention, "q_norm")
        return cls(
            _Norm.of(part("input_layernorm")),
            _Side.of([part(f"self_attn.{name}_proj") for name in "qkv"]), part("self_attn.o_proj"),
            _Norm.of(part("post_attention_layernorm")),
            _Side.of([part("mlp.gate_proj"), part("mlp.up_proj")]), part("mlp.down_proj"),
            (_Norm.of(part("self_attn.q_norm")), _Norm.of(part("self_attn.k_norm"))) if normed else None,
            float(vars(attention)["scaling"]),
        )  # fmt: skip


def _with_room(states: Tensor, length: int, room: int, dtype: torch.dtype) -> Tensor:
    """The first `length` of keys or values (B, heads, n, D) in a tensor (B, heads, room, D)."""
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
