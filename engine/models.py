"""Load a causal LM from a folder; its blocks and its linears.

Loads safetensors only, by absolute path, never a model's own code. A tensor that is missing, misshapen
or not finite is refused: `transformers` would fill it at random with a warning.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import JsonValue
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)  # fmt: skip
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.pytorch_utils import Conv1D

from engine.errors import BadModel, short
from engine.packing import CACHE_KEY, CacheGrid, InputGrid, QuantizedWeight

Linear = nn.Linear | Conv1D


@dataclass
class LoadedModel:
    """A network with its tokenizer and what is known about its weights.

    quantized: integer codes by module name, as the solver found them. The network's dense weight of that
        module equals `codes.dequantize()` where the weight is dense.
    pruned: names of the linears whose zeros must be kept by later steps.
    kernels: by module name, the kernel that computes it; empty while all weights are dense.
    stored_as: the `quantization_config` of a library whose own modules stand in the network.
    kv_cache: how keys and values are held in generation; None: as they are.
    """

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: Path
    quantized: dict[str, QuantizedWeight] = field(default_factory=dict)
    pruned: set[str] = field(default_factory=set)
    kernels: dict[str, str] = field(default_factory=dict)
    stored_as: dict[str, JsonValue] | None = None
    kv_cache: CacheGrid | None = None

    @property
    def device(self) -> torch.device:
        return self.network.device


def load(folder: Path, dtype: str = "bfloat16", device: str = "cpu") -> LoadedModel:
    """The model in `folder` with dense weights, in evaluation mode.

    Raises:
        BadModel: weights are missing, misshapen or not finite.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    network: PreTrainedModel
    info: dict[str, object]
    try:
        network, info = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]  # the stub knows no pair
            folder,
            config=config,
            dtype=getattr(torch, dtype),
            attn_implementation=attention(config),
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except RuntimeError as error:
        if "size mismatch" in str(error) or "ignore_mismatched_sizes" in str(error):
            raise BadModel(f"{short(folder.name)}: the weights have other shapes than the config says.") from None
        raise
    for problem in ("missing_keys", "mismatched_keys"):
        if names := info.get(problem):
            assert isinstance(names, set | list)
            example = sorted(map(str, names))[0]
            raise BadModel(f"{short(folder.name)}: the weights do not fit the config ({problem[:-5]}: {example}).")
    for name, weight in network.named_parameters():
        if not torch.isfinite(weight).all():
            raise BadModel(f"{short(folder.name)}: {name} holds NaN or infinite values; the checkpoint is damaged.")
    network.to(torch.device(device))  # type: ignore[arg-type]  # the stub takes the method for an unbound one
    network.eval()  # type: ignore[no-untyped-call]
    return LoadedModel(network, load_tokenizer(folder), folder, kv_cache=cache_grid(config, folder))


def cache_grid(config: PretrainedConfig, folder: Path) -> CacheGrid | None:
    """How the config of the model in `folder` says that keys and values are held.

    Raises:
        BadModel: it says so in a way that we do not write.
    """
    entry = getattr(config, CACHE_KEY, None)
    return None if entry is None else CacheGrid.read(entry, folder.name)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of `folder`."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def attention(config: PretrainedConfig) -> str:
    """`sdpa`, or `eager` for the families that have no other (Gemma 2). Never a kernel that a config names."""
    family = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return "sdpa" if getattr(family, "_supports_sdpa", False) else "eager"


def quantize_inputs(linear: nn.Module, grid: InputGrid) -> None:
    """Let a linear round its inputs to `grid` from now on, before it computes as it did."""

    def round_(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (grid.fake(args[0]), *args[1:])

    linear.register_forward_pre_hook(round_)


def check_inputs_storable(model: LoadedModel) -> None:
    """Refuse families whose own linears a file cannot say rounded inputs of.

    Raises:
        BadModel: a linear of the blocks is no `nn.Linear` itself (GPT-2's `Conv1D`, Falcon's own).
    """
    for block in blocks(model.network)[1]:
        for path, linear in linears(block):
            if type(linear) is not nn.Linear:
                raise BadModel(
                    f"{type(model.network).__name__} has {type(linear).__name__} at {path}: its saved files cannot say "
                    "that inputs are rounded. Use a weight-only method for this family."
                )


def blocks(network: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The decoder blocks and the name of the list that holds them (`model.layers`, `transformer.h`, ...)."""
    count = network.config.get_text_config().num_hidden_layers
    for name, module in network.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise BadModel(f"{type(network).__name__} has no list of {count} blocks; this family is not supported yet.")


def linears(module: nn.Module) -> Iterator[tuple[str, Linear]]:
    """Every linear below `module` with its name relative to it, in order."""
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear | Conv1D):
            yield name, child
