"""Linears that are modules of the bitsandbytes library: as a file has them, and without weights while they are closed.

The library keeps parts of a weight beside the parameter (scales in a state, codes in another once a module has
computed), and on some processors the first product repacks 4-bit weights. So what opens gets its weight anew, of what
the library wrote, and what closes lets all of it go.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Kind:
    """Which module of the library: `nf4`, `fp4` or `int8`; inputs above `threshold` stay 16 bit, with `int8`."""

    scheme: str
    threshold: float = 0.0


def is_library(module: nn.Module) -> bool:
    """Whether a module is the library's."""
    return type(module).__module__.startswith("bitsandbytes.")


def kind_of(module: Any) -> Kind:
    """What an open module of the library is."""
    scheme = getattr(module.weight, "quant_type", None)
    return Kind("int8", module.state.threshold) if scheme is None else Kind(scheme)


def hollow(rows: int, columns: int, kind: Kind, dtype: torch.dtype, *, bias: bool) -> nn.Module:
    """A closed module of the library for a weight (N, K) that comes later; 4-bit ones multiply in `dtype`."""
    library: Any = importlib.import_module("bitsandbytes.nn")  # here, for it is slow to import
    made: nn.Module
    if kind.scheme == "int8":
        made = library.Linear8bitLt(
            columns, rows, bias, has_fp16_weights=False, threshold=kind.threshold, device="meta"
        )  # fmt: skip
    else:
        made = library.Linear4bit(
            columns, rows, bias, compute_dtype=dtype, quant_type=kind.scheme, device="meta"
        )  # fmt: skip
    close(made, dtype)
    return made.eval()


def close(module: Any, dtype: torch.dtype) -> None:
    """Forget a module's weight and all that was made of it; its shape is the dense one's, (N, K) in `dtype`."""
    shapes = {"weight": (module.out_features, module.in_features), "bias": (module.out_features,)}
    for leaf, shape in shapes.items():
        if module._parameters[leaf] is not None:
            empty = torch.empty(shape, dtype=dtype, device="meta")
            module._parameters[leaf] = nn.Parameter(empty, requires_grad=False)
    if (old := getattr(module, "state", None)) is None:
        module.quant_state = None
        return
    module.state = type(old)()
    module.state.threshold, module.state.use_pool = old.threshold, old.use_pool
    module.state.has_fp16_weights = old.has_fp16_weights


def fill(module: Any, tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Give a module its weight on `device`, of the tensors of its `state_dict`."""
    library: Any = importlib.import_module("bitsandbytes.nn")
    weight = tensors["weight"].to(device)
    if hasattr(module, "state"):
        made = library.Int8Params(
            weight, requires_grad=False, has_fp16_weights=False, CB=weight, SCB=tensors["SCB"].to(device)
        )  # fmt: skip
    else:
        state = {leaf: tensor for leaf, tensor in tensors.items() if leaf.startswith("weight.")}
        made = library.Params4bit.from_prequantized(weight, state, device=device, module=module)
    module._parameters["weight"] = made
    if "bias" in tensors:
        module._parameters["bias"] = nn.Parameter(tensors["bias"].to(device), requires_grad=False)
