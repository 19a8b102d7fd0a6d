"""Load a causal LM from a folder; its blocks, its linears, its bytes.

Loads safetensors only, by absolute path, never a model's own code. A tensor that is missing, misshapen
or not finite is refused: `transformers` would fill it at random with a warning.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from engine.packing import QuantizedWeight

Linear = nn.Linear | Conv1D


@dataclass
class LoadedModel:
    """A network with its tokenizer and what is known about its weights.

    quantized: integer codes by module name, as the solver found them. The network's dense weight of that
        module equals `codes.dequantize()` where the weight is dense.
    pruned: names of the linears whose zeros must be kept by later steps.
    kernels: by module name, the kernel that computes it; empty while all weights are dense.
    """

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: Path
    quantized: dict[str, QuantizedWeight] = field(default_factory=dict)
    pruned: set[str] = field(default_factory=set)
    kernels: dict[str, str] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.network.device


def blocks(network: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The decoder blocks and the name of the list that holds them (`model.layers`, `transformer.h`, ...)."""
    count = network.config.get_text_config().num_hidden_layers
    for name, module in network.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise ValueError(f"{type(network).__name__} has no list of {count} blocks")


def linears(module: nn.Module) -> Iterator[tuple[str, Linear]]:
    """Every linear below `module` with its name relative to it, in order."""
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear | Conv1D):
            yield name, child
