"""A KV cache that holds keys and values in 8 or 4 bits, on the cache classes of `transformers`.

KIVI (Liu et al., 2024, arXiv 2402.02750): a few channels of the keys are large for every token, so keys share a
scale along tokens, one for each channel of a group of tokens; values share it along channels, within each token. With
G = `group_size`, a head's states (T, D) of T tokens and D channels are cut like this:

    keys    G tokens x 1 channel     low, scale (T / G, D)
    values  1 token x G channels     low, scale (T, D / G)

x is stored as code = round((x - low) / scale), 0 .. 2^bits - 1, with low the smallest of its group, and read back as
code * scale + low. A group of keys needs G tokens, so the newest tokens stay as they are until G are there beyond the
`window` that is always exact. A prompt is read with its exact keys and values, as in the paper; what comes after it
sees them rounded.

Here attention computes in the model's dtype, on states that are unpacked for one block at a time. Our own decode loop
(`engine.runtime.native`) takes a cache over once the prompt is read, and computes on the codes themselves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from engine.errors import BadModel
from engine.packing import CacheGrid

Along = Literal["tokens", "channels"]
# What networks call their cache, taken and given: `cache` from transformers 5.24 on, which warns of the older name.
ARGUMENT = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
TOKENS = 2  # dimension of the tokens in states (B, H, T, D), and of what is stored of them


def read_on(network: PreTrainedModel, ids: Tensor, cache: Cache | None, *, last: bool = False) -> tuple[Tensor, Cache]:
    """Let a network read tokens (B, T) that follow those of a cache, or begin one; logits (B, T, V), or of the last."""
    some = {"logits_to_keep": 1} if last else {}
    output = network(input_ids=ids, use_cache=True, **{ARGUMENT: cache}, **some)
    return output.logits, output[ARGUMENT]


@dataclass(frozen=True)
class PackedStates:
    """Keys or values (B, H, T, D) in few bits; `size` neighbours along tokens or channels share a scale.

    codes: uint8, (B, H, T, D); for 4 bits (B, H, T, D / 2), channel d in the low half of a byte, d + D / 2 in the high.
    scale, low: bfloat16, (B, H, T / size, 1, D) along tokens, (B, H, T, D / size, 1) along channels.
    """

    codes: Tensor
    scale: Tensor
    low: Tensor
    bits: int
    along: Along
    size: int

    @classmethod
    def of(cls, states: Tensor, bits: int, along: Along, size: int) -> PackedStates:
        """Round states (B, H, T, D), of which `size` divides T or D."""
        grouped, within = _grouped(states.float(), along, size)
        low = grouped.amin(within, keepdim=True).to(torch.bfloat16)
        scale = ((grouped.amax(within, keepdim=True) - low.float()) / (2**bits - 1)).to(torch.bfloat16)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # all equal
        codes = ((grouped - low.float()) / scale.float()).round_().clamp_(0, 2**bits - 1)
        whole = codes.to(torch.uint8).view(states.shape)
        if bits == 4:
            first, second = whole.chunk(2, dim=-1)
            whole = first | (second << 4)
        return cls(whole, scale, low, bits, along, size)

    @property
    def tokens(self) -> int:
        return self.codes.shape[TOKENS]

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes + self.low.nbytes

    def write_to(self, states: Tensor) -> None:
        """Put what the codes stand for into `states` (B, H, T, D), rounded once to its dtype."""
        codes = self.codes if self.bits == 8 else torch.cat((self.codes & 15, self.codes >> 4), dim=-1)
        grouped, _ = _grouped(codes.to(states.dtype), self.along, self.size)
        target, _ = _grouped(states, self.along, self.size)
        torch.addcmul(self.low.to(states.dtype), grouped, self.scale.to(states.dtype), out=target)

    def followed_by(self, later: PackedStates) -> PackedStates:
        """These states, then `later` ones."""
        return self._each(lambda tensor, more: torch.cat((tensor, more), dim=TOKENS), later)

    def without_first(self, tokens: int) -> PackedStates:
        """All but the first tokens, whole groups of them."""
        return self._each(lambda t, _: t[:, :, tokens * t.shape[TOKENS] // self.tokens :].clone(), self)

    def rows(self, index: Tensor) -> PackedStates:
        """The sequences of the batch that `index` names."""
        return self._each(lambda tensor, _: tensor.index_select(0, index), self)

    def _each(self, change: Callable[[Tensor, Tensor], Tensor], other: PackedStates) -> PackedStates:
        return replace(
            self, codes=change(self.codes, other.codes), scale=change(self.scale, other.scale),
            low=change(self.low, other.low),
        )  # fmt: skip


def _grouped(states: Tensor, along: Along, size: int) -> tuple[Tensor, int]:
    """States (B, H, T, D) with their groups apart, (B, H, T / size, size, D) or (B, H, T, D / size, size), and the
    dimension within a group."""
    dimension = TOKENS if along == "tokens" else 3
    sizes = [*states.shape[:dimension], states.shape[dimension] // size, size, *states.shape[dimension + 1 :]]
    return states.view(sizes), dimension + 1


class _Stream:
    """The keys or the values of one block: packed groups, then the newest tokens as they are."""

    def __init__(self, grid: CacheGrid, along: Along) -> None:
        self._grid, self._along = grid, along
        self.packed: PackedStates | None = None
        self.recent: Tensor | None = None

    @property
    def tokens(self) -> int:
        return (self.packed.tokens if self.packed else 0) + (
            self.recent.shape[TOKENS] if self.recent is not None else 0
        )

    @property
    def nbytes(self) -> int:
        return (self.packed.nbytes if self.packed else 0) + (self.recent.nbytes if self.recent is not None else 0)

    def extend(self, states: Tensor, dtype: torch.dtype, *, keep: bool) -> Tensor:
        """All states (B, H, T, D) with new ones (B, H, n, D), those that are packed as they are read back.

        The new ones are added, and groups that are full now are packed, where they are to be kept.
        """
        recent = states if self.recent is None else torch.cat((self.recent, states), dim=TOKENS)
        if self.packed is None:
            whole = recent.to(dtype)
        else:
            batch, heads, new, size = recent.shape
            whole = recent.new_empty(batch, heads, self.packed.tokens + new, size, dtype=dtype)
            self.packed.write_to(whole[:, :, : self.packed.tokens])
            whole[:, :, self.packed.tokens :] = recent
        if keep:
            self._keep(recent)
        return whole

    def _keep(self, recent: Tensor) -> None:
        full = self._grid.packed_tokens(recent.shape[TOKENS])
        if full:
            packed = PackedStates.of(recent[:, :, :full], self._grid.bits, self._along, self._grid.group_size)
            self.packed = self.packed.followed_by(packed) if self.packed else packed
        # A copy: a view would keep all of a prompt's states alive.
        self.recent = recent[:, :, full:].clone()

    def forget(self, tokens: int) -> None:
        """Drop whole groups among the first `tokens` tokens; none, where that is less than one group."""
        groups = max(0, min(tokens, self.packed.tokens if self.packed else 0)) // self._grid.group_size
        if groups and self.packed:
            kept = self.packed.without_first(groups * self._grid.group_size)
            self.packed = kept if kept.tokens else None

    def choose(self, index: Tensor) -> None:
        """Keep the sequences that `index` names."""
        self.packed = self.packed.rows(index) if self.packed else None
        self.recent = self.recent.index_select(0, index) if self.recent is not None else None


class PackedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]  # of __init_subclass__
    """The cache of one block. With a sliding window, groups that no later token sees are dropped."""

    is_croppable = False

    def __init__(self, grid: CacheGrid, sliding_window: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.grid, self.sliding_window = grid, sliding_window
        self.keeps = True  # what it is given
        self.is_sliding = sliding_window is not None
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._streams = (_Stream(self.grid, "tokens"), _Stream(self.grid, "channels"))
        self._seen = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is allocated ahead."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Add new keys and values (B, H, n, D); all that the new tokens attend to, in the same dtype."""
        return self.update_as(key_states, value_states, key_states.dtype)

    def update_as(self, key_states: Tensor, value_states: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`update` that gives them in another dtype than the one in which they are held."""
        self.is_initialized = True
        new = key_states.shape[TOKENS]
        keys, values = (
            stream.extend(states, dtype, keep=self.keeps)
            for stream, states in zip(self._streams, (key_states, value_states), strict=True)
        )
        if self.keeps:
            self._seen += new
        if self.sliding_window is None:
            return keys, values
        visible = self.sliding_window - 1  # tokens that the next one sees beside itself
        for stream in self._streams:
            stream.forget(stream.tokens - visible)
        return keys[:, :, -(visible + new) :], values[:, :, -(visible + new) :]

    def hand_over(self) -> list[tuple[PackedStates | None, Tensor]]:
        """What is packed and the newest tokens, of the keys and of the values; holds nothing any more."""
        held = [(s.packed, s.recent) for s in self._streams if s.recent is not None]
        self.reset()
        return held

    @property
    def nbytes(self) -> int:
        """Bytes that are held: codes, scales, and the newest tokens."""
        return sum(stream.nbytes for stream in self._streams)

    @property
    def head_size(self) -> int:
        """Channels of a value, once there are some."""
        recent = self._streams[1].recent
        return 0 if recent is None else recent.shape[-1]

    @property
    def room(self) -> int:
        """How many tokens can follow before the next group is packed."""
        recent = self._streams[0].recent
        return self.grid.window + self.grid.group_size - (0 if recent is None else recent.shape[TOKENS])

    def get_seq_length(self) -> int:
        """Tokens that were added."""
        return self._seen

    def get_max_length(self) -> int:
        """The sliding window; -1 where there is none."""
        return -1 if self.sliding_window is None else self.sliding_window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys `query_length` new tokens will be given, and the position of the first."""
        before = self._seen if self.sliding_window is None else min(self._seen, self.sliding_window - 1)
        return before + query_length, self._seen - before

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the sequences of the batch in another order."""
        for stream in self._streams:
            stream.choose(beam_idx)


class RoundedLayer(PackedLayer):  # type: ignore[no-untyped-call]
    """For measuring: every key and value of one pass rounded, those of the newest tokens and of itself, too.

    Tokens that are too few for a last group of keys are a group of their own. Holds nothing.
    """

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """The keys and values (B, H, n, D) of a whole text, rounded."""
        assert not self._seen, "a rounded text is read in one pass"
        bits, size = self.grid.bits, self.grid.group_size
        full = key_states.shape[TOKENS] // size * size
        parts = [(key_states[:, :, :full], size), (key_states[:, :, full:], key_states.shape[TOKENS] - full)]
        keys = [rounded(part, bits, "tokens", length) for part, length in parts if part.numel()]
        return torch.cat(keys, TOKENS), rounded(value_states, bits, "channels", size)


def rounded(states: Tensor, bits: int, along: Along, size: int) -> Tensor:
    """States (B, H, T, D) as they would be read back."""
    result = torch.empty_like(states)
    PackedStates.of(states, bits, along, size).write_to(result)
    return result


class PackedCache(Cache):
    """The cache of a whole network: a layer for each block.

    Raises:
        BadModel: a block of the family keeps something else than keys and values.
    """

    def __init__(self, config: PretrainedConfig, grid: CacheGrid, kind: type[PackedLayer] = PackedLayer) -> None:
        self.grid = grid
        self.blocks = [kind(grid, window) for window in sliding_windows(config)]
        super().__init__(layers=[*self.blocks])

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        return sum(layer.nbytes for layer in self.blocks)

    @property
    def room(self) -> int:
        """How many tokens can follow before the next group is packed; the same in all blocks."""
        return self.blocks[0].room

    @contextlib.contextmanager
    def glance(self) -> Iterator[None]:
        """Tokens that are read meanwhile see what is held, and are not kept."""
        for layer in self.blocks:
            layer.keeps = False
        try:
            yield
        finally:
            for layer in self.blocks:
                layer.keeps = True


def sliding_windows(config: PretrainedConfig) -> Sequence[int | None]:
    """The sliding window of each block's cache, None where it sees everything.

    Raises:
        BadModel: a block of the family keeps something else than keys and values.
    """
    windows: list[int | None] = []
    for number, layer in enumerate(DynamicCache(config=config).layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise BadModel(
                f"{config.model_type} keeps {type(layer).__name__} in block {number}, not keys and values alone: its "
                "cache cannot be quantized."
            )
        windows.append(layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None)
    return windows
