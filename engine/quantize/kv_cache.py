"""Hold keys and values in 8 or 4 bits while generating, so that long texts and batches take less memory.

KIVI (Liu et al., 2024, "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", arXiv 2402.02750). No weight
changes and no text is needed: whenever a group of tokens is full, its keys and values are rounded and packed, with a
scale and a low (both bfloat16) for each group: 9 or 5 bits a number with groups of 32. Keys share them along tokens,
one channel at a time, since some channels are large for every token; values along channels, one token at a time, so
that the errors of tokens that are not attended to stay with them. The newest tokens stay as they are: those of the
`window` and of the group that is not full yet. A prompt is read exactly, then packed.

Tried on the demo model with 4 bits and groups of 32. Keys: relative squared error 0.0044 along tokens, 0.0065 along
channels. Values are the other way round there, 0.0040 and 0.0064, at KL divergences too close to choose by; the
paper's larger models decide for channels. Grids symmetric around zero have 1.5 to 1.7 times the error and take half a
bit less. Windows of 32 and 128 exact tokens did not lower the KL on texts of 480 tokens by more than its error, so
there is none unless it is asked for.

Where our own kernels decode, in groups of whole 16 and heads of whole 32 channels, attention computes on the codes,
and less is read. A token of a 267 M-parameter model on two CPU cores, beside other work: after 512 others 22.6 ms with
exact keys and values, 22.1 and 21.5 with 8 and 4 bits; after 4,096, in another run, 32.8, 28.5 and 25.2. Elsewhere
they are unpacked for attention, one block at a time, which takes longer than exact ones: after 512 others 43, 56 and
58 ms in torch's lean loop; 55, 72 and 77 in that of transformers, for families that neither of ours knows.

Perplexity, KL and accuracy are measured with all keys and values rounded, also those that generation would keep exact:
what a text much longer than window and group would see. Written text, and the score of a text, use the cache as it is.
The files keep the settings in config.json, where other programs ignore them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field, JsonValue

from engine import methods
from engine.errors import BadModel, BadParams
from engine.headers import Shape
from engine.kv_cache import PackedCache, read_on
from engine.methods import Context
from engine.models import LoadedModel
from engine.packing import CacheGrid
from engine.quantize._grid import fitting_sizes
from engine.sizes import attention_sizes, longest_text

TITLE = "KV cache"
CHANGES = ("memory",)
# Families that keep no keys and values a token, or in a cache that is not the one of `transformers`.
OTHER_CACHES = (
    "bamba", "blt", "deepseek_v4", "dots3_note", "falcon_h1", "falcon_mamba", "fuyu", "gemma3n", "gemma3n_text",
    "jamba", "mamba", "mamba2", "minimax", "nemotron_h", "recurrent_gemma", "reformer", "xlnet", "xlstm", "zamba",
    "zamba2",
)  # fmt: skip
ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


class Params(methods.Params):
    """Settings of the KV cache."""

    bits: Literal[8, 4] = Field(8, description="Bits of each number.")
    group_size: int = Field(32, ge=8, le=256, description="Tokens (keys) or channels (values) that share a scale.")
    window: int = Field(0, ge=0, le=8192, description="Newest tokens that stay exact, at least.")

    def cache_grid(self) -> CacheGrid:
        """What the settings say."""
        return CacheGrid(self.bits, self.group_size, self.window)

    def check_config(self, config: Mapping[str, JsonValue]) -> None:
        """Refuse groups that do not fit the heads, and families whose cache is another."""
        kind, layers = config.get("model_type"), config.get("layer_types")
        other = sorted({str(layer) for layer in layers} - ATTENTION) if isinstance(layers, list) else []
        if kind in OTHER_CACHES or other:
            what = f"layers of {other[0]}" if other else "a cache of its own"
            raise BadModel(f"{kind} has {what}: its keys and values cannot be quantized. Leave quantize/kv_cache out.")
        check_head(attention_sizes(config)[2], self.group_size)

    def notes(self, shape: Shape, device: str) -> Sequence[str]:
        """That a window as long as any text leaves nothing to round."""
        said, longest = super().notes(shape, device), longest_text(shape.config)
        if not 0 < longest <= self.window:
            return said
        return [
            *said, f"The model reads {longest:,} tokens at most and all of them stay exact: the cache is no smaller."
        ]  # fmt: skip


def check_head(size: int, group_size: int) -> None:
    """Refuse groups that do not divide the channels of a head.

    Raises:
        BadParams: with the sizes that do.
    """
    if size % group_size:
        raise BadParams(
            f"group_size {group_size} does not divide the {size} channels of a head. Sizes that do: "
            f"{fitting_sizes(size)}."
        )


def apply(model: LoadedModel, params: Params, context: Context) -> LoadedModel:
    """Note how keys and values are to be held, once a few tokens have shown that the network can hold them so."""
    grid = params.cache_grid()
    if model.stored_as is None:  # bitsandbytes must be saved before it computes for the first time
        try_out(model, grid)
    model.kv_cache = grid
    context.log(grid.label)
    return model


@torch.inference_mode()
def try_out(model: LoadedModel, grid: CacheGrid) -> None:
    """Let the network read a few tokens, and look whether every block put them into the cache.

    Raises:
        BadModel: the family has another cache.
        BadParams: the groups do not divide the channels of a head.
    """
    cache = PackedCache(model.network.config, grid)
    ids = torch.zeros(1, 4, dtype=torch.long, device=model.device)
    read_on(model.network, ids, cache)
    for layer in cache.blocks:
        if layer.get_seq_length() != ids.shape[1]:
            raise BadModel(f"{type(model.network).__name__} has a cache of its own: it cannot be quantized.")
        check_head(layer.head_size, grid.group_size)
