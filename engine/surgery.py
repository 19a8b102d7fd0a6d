"""A network of another shape, made from the weights of a model: what structured pruning and students are built with.

The result is a plain model of its architecture: its config says its shape, any `transformers` user can load it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from engine.checkpoint import attention, part_names
from engine.experts import separate
from engine.models import LoadedModel, blocks


def keep_blocks(model: LoadedModel, kept: Sequence[int]) -> LoadedModel:
    """A copy that has the blocks with these numbers alone, in this order; all else is the model's."""
    prefix, _ = blocks(model.network)
    config = copy.deepcopy(model.network.config)
    text = config.get_text_config()
    text.num_hidden_layers = len(kept)
    if getattr(text, "layer_types", None):
        text.layer_types = [text.layer_types[i] for i in kept]
    smaller = fresh(config, model.network.dtype, model.device)
    for part in part_names(smaller, prefix):  # of a streamed model, one part is in memory at a time
        source = part
        if part.startswith(f"{prefix}."):
            source = f"{prefix}.{kept[int(part.removeprefix(f'{prefix}.'))]}"
        with model.opened(source):
            smaller.get_submodule(part).load_state_dict(model.network.get_submodule(source).state_dict())
    pruned = {f"{prefix}.{i}.{rest}" for i, k in enumerate(kept) for rest in _below(model.pruned, f"{prefix}.{k}.")}
    return LoadedModel(smaller, model.tokenizer, Path(model.source), pruned=pruned)


def fresh(config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """An untrained network of a config."""
    network = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        config, dtype=dtype, attn_implementation=attention(config), trust_remote_code=False
    )
    assert isinstance(network, PreTrainedModel)
    separate(network)
    network.to(device)  # type: ignore[arg-type]  # the stub takes the method for an unbound one
    network.eval()  # type: ignore[no-untyped-call]
    return network


def _below(names: set[str], prefix: str) -> list[str]:
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
