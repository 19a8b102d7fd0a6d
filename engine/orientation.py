"""Which way round a linear holds its weight: torch's as formulas have it, (out, in), GPT-2's `Conv1D` as (in, out)."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def turned(module: nn.Module, weight: Tensor) -> Tensor:
    """A weight (N, K) the way round in which a module holds it, or from there back; a view."""
    return weight.t() if isinstance(module, Conv1D) else weight


def rows_and_columns(module: nn.Module) -> tuple[int, int]:
    """N and K, outputs and inputs, of a linear; of embeddings tokens and numbers."""
    first, second = module.get_parameter("weight").shape
    return (second, first) if isinstance(module, Conv1D) else (first, second)
