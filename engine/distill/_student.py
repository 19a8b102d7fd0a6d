"""The student of a distillation: blocks of the model, a new network of a given size, or the model itself."""

from __future__ import annotations

import copy
from pathlib import Path

import torch

from engine.errors import BadParams
from engine.models import LoadedModel, blocks
from engine.surgery import fresh, keep_blocks


def every_kth(model: LoadedModel, keep_every: int) -> LoadedModel:
    """A copy with every `keep_every`-th block, the last always among them, as DistilBERT keeps them.

    Sanh et al., 2019, arXiv 1910.01108: the student starts from the teacher's own blocks.

    Raises:
        BadParams: the model has fewer blocks than `keep_every`.
    """
    count = len(blocks(model.network)[1])
    kept = list(range(keep_every - 1, count, keep_every))
    if not kept:
        raise BadParams(f"keep_every {keep_every} leaves no block of {count}. Use {count} or less.")
    return keep_blocks(model, kept)


def of_size(model: LoadedModel, hidden_size: int, num_blocks: int, seed: int) -> LoadedModel:
    """A new network of the same family, initialised at random; feed-forward width in proportion.

    Raises:
        BadParams: the hidden size cannot be split into the family's attention heads.
    """
    config = copy.deepcopy(model.network.config)
    text = config.get_text_config()
    old, heads = text.hidden_size, text.num_attention_heads
    head = getattr(text, "head_dim", None) or old // heads
    if hidden_size % head or hidden_size // head < 1:
        raise BadParams(f"hidden_size {hidden_size} is not a multiple of the head size {head} of this model.")
    text.hidden_size, text.num_hidden_layers = hidden_size, num_blocks
    text.num_attention_heads = hidden_size // head
    if (groups := getattr(text, "num_key_value_heads", None)) is not None:
        fitting = max(1, groups * text.num_attention_heads // heads)
        while text.num_attention_heads % fitting:
            fitting -= 1
        text.num_key_value_heads = fitting
    if hasattr(text, "intermediate_size"):
        text.intermediate_size = max(32, round(text.intermediate_size * hidden_size / old / 32) * 32)
    if getattr(text, "layer_types", None):
        text.layer_types = (text.layer_types * num_blocks)[:num_blocks]
    torch.manual_seed(seed)
    return LoadedModel(fresh(config, model.network.dtype, model.device), model.tokenizer, Path(model.source))
