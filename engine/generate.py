"""Tokens of one model, streamed with their log-probabilities; and a given text as the model sees it.

A token of a packed model costs a few milliseconds, so what surrounds the products counts. The prompt runs
through `transformers` as always. For the families that we know the tokens after it run through `LeanDecoder`: the
same modules, with preallocated keys and values and nothing else around them; or, where our own kernels
know all parts of the blocks, through their `NativeDecoder`. The first step repeats the last token of the
prompt and is compared with what `transformers` said; where the two disagree, and for every other family,
`transformers` goes on with its own cache.

Where keys and values are held packed, `transformers` reads the prompt with the cache of `engine.kv_cache`, so that a
long one never is there exactly, and the decoders take that cache over. A last token may be packed already, and what it
saw is rounded now: so both glance at it once more, at the place after the prompt's end, and are compared there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from engine.kv_cache import PackedCache, read_on
from engine.models import LoadedModel
from engine.packing import CacheGrid
from engine.runtime.float8 import Float8Linear
from engine.runtime.lean import LeanDecoder
from engine.runtime.linear import Int8Linear
from engine.runtime.native.decoder import NativeDecoder

log = logging.getLogger(__name__)

# Largest relative distance of two bfloat16 logit vectors that differ in rounding only: seen up to 0.01.
AGREEMENT = 0.05
ROUNDED = 0.15  # and where inputs are rounded, too: one near the middle of two steps falls on either side


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


def cache_label(model: LoadedModel, tokens: int) -> str | None:
    """How keys and values are held and read while one sequence of `tokens` is written; None where they stay exact.

    It stands beside the kernels' names.
    """
    if (grid := model.kv_cache) is None:
        return None
    ours = LeanDecoder.supports(model.network, 0) and NativeDecoder.supports(model.network, 1, tokens, grid)
    return f"{grid.label}, attention reads the codes" if ours else f"{grid.label}, unpacked for attention"


def end_tokens(network: PreTrainedModel) -> frozenset[int]:
    """The tokens that end a text."""
    end = network.generation_config.eos_token_id if network.generation_config else None
    end = getattr(network.config.get_text_config(), "eos_token_id", None) if end is None else end
    return frozenset([end] if isinstance(end, int) else end or [])


def stop_string(tokenizer: PreTrainedTokenizerBase, ids: list[int], stops: Sequence[str]) -> str | None:
    """The first of `stops` that the text of `ids` came to hold with its last token; None where none is there."""
    if not stops:
        return None
    reach = 4 * max(map(len, stops)) + 4  # tokens: a character has up to four bytes, and a token at least one
    tail = str(tokenizer.decode(ids[-reach:]))
    return next((each for each in stops if each in tail), None)


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


def _rounds_inputs(network: PreTrainedModel) -> bool:
    """Whether linears round what they read: by their kind, or by a hook before them."""
    return any(isinstance(each, Int8Linear | Float8Linear) or each._forward_pre_hooks for each in network.modules())


def _decoder(network: PreTrainedModel, cache: Cache, ids: Tensor, logits: Tensor, room: int) -> _Decoder:
    """The lean decoder where it agrees with `transformers` about the prompt's end, else `transformers`."""
    if isinstance(cache, PackedCache):
        return _packed_decoder(network, cache, ids, room)
    if LeanDecoder.supports(network, ids.shape[1]):
        kind = NativeDecoder if NativeDecoder.supports(network, len(ids), room) else LeanDecoder
        lean = kind(network, cache, room)
        if _agree(network, lean.step(ids[:, -1:]), logits):
            return lean
    return _WholeModel(network, cache)


@torch.inference_mode()
def _packed_decoder(network: PreTrainedModel, cache: PackedCache, ids: Tensor, room: int) -> _Decoder:
    """As `_decoder`; both see what is packed. Of a prompt that fills a sliding window, the next token sees enough."""
    if LeanDecoder.supports(network, 0) and ids.shape[1] < LeanDecoder.places(network):
        grid, last, room = cache.grid, ids[:, -1:], max(room, ids.shape[1] + 1)
        with cache.glance():
            logits = read_on(network, last, cache)[0][:, -1]
        kind = NativeDecoder if NativeDecoder.supports(network, len(ids), room, grid) else LeanDecoder
        lean = kind(network, cache, room)
        if _agree(network, lean.glance(last), logits):
            return lean
        if not cache.get_seq_length():  # it was taken over
            _, again = _read_prompt(network, ids, grid)
            return _WholeModel(network, again)
    return _WholeModel(network, cache)


def _agree(network: PreTrainedModel, ours: Tensor, theirs: Tensor) -> bool:
    """Whether logits (B, V) of the lean decoder differ from those of `transformers` in rounding only."""
    distance = float((ours.float() - theirs.float()).norm() / theirs.float().norm())
    close = distance <= (ROUNDED if _rounds_inputs(network) else AGREEMENT)
    if not close:
        log.warning("%s: the lean decoder is off by %.3f and is not used", type(network).__name__, distance)
    return close


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
