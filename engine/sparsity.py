"""Which weights become zero: the settings of sparsity, and the choice by scores, unstructured or N of M.

Below the families, for pruning alone and quantization with zeros choose alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from engine.errors import BadParams

Pattern = Literal["unstructured", "2:4", "4:8"]


def span_of(pattern: Pattern) -> tuple[int, int] | None:
    """N and M of a pattern N:M, None where the zeros may fall anywhere."""
    if pattern == "unstructured":
        return None
    zeros, span = map(int, pattern.split(":"))
    return zeros, span


def check_pattern(pattern: Pattern, linears: Mapping[str, tuple[int, int]]) -> None:
    """Refuse a pattern that does not divide the inputs of a linear (out, in).

    Raises:
        BadParams: names the linear.
    """
    if (parts := span_of(pattern)) is not None:
        for name, (_, inputs) in linears.items():
            if inputs % parts[1]:
                raise BadParams(
                    f"the pattern {pattern} does not divide the {inputs} inputs of {name}. Choose `unstructured`, or "
                    "leave it out with the setting `ignore`."
                )


def drop(score: Tensor, count: int) -> Tensor:
    """Per row of `score`, False for the `count` smallest; ties are cut in the order of the row."""
    order = torch.argsort(score, dim=1, stable=True)
    return torch.ones_like(score, dtype=torch.bool).scatter_(1, order[:, :count], False)
