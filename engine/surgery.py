"""A network of another shape, made from the weights of a model: what structured pruning and students are built with.

The result is a plain model of its architecture: its config says its shape, any `transformers` user can load it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from engine import low_rank
from engine.checkpoint import attention
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
    products = low_rank.ranks(model.network)
    low_rank.factor(smaller, _renumbered(products, prefix, kept))
    weights = model.network.state_dict()
    chosen = {}
    for key in smaller.state_dict():
        source = key
        if key.startswith(f"{prefix}."):
            number, rest = key.removeprefix(f"{prefix}.").split(".", 1)
            source = f"{prefix}.{kept[int(number)]}.{rest}"
        chosen[key] = weights[source]
    smaller.load_state_dict(chosen)
    pruned, sparse = (set(_renumbered(dict.fromkeys(names, 0), prefix, kept)) for names in (model.pruned, model.sparse))
    return LoadedModel(smaller, model.tokenizer, Path(model.source), pruned=pruned, sparse=sparse)


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


def _renumbered(values: Mapping[str, int], prefix: str, kept: Sequence[int]) -> dict[str, int]:
    """The values of modules in the blocks that are kept, by the names that these have then."""
    return {
        f"{prefix}.{i}.{name.removeprefix(f'{prefix}.{k}.')}": value
        for i, k in enumerate(kept)
        for name, value in values.items()
        if name.startswith(f"{prefix}.{k}.")
    }
