"""Which weights to keep: masks from scores, unstructured or N of M."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from engine.errors import BadParams
from engine.methods import Selection

Pattern = Literal["unstructured", "2:4", "4:8"]


class SparsityParams(Selection):
    """Settings that every unstructured or N:M pruning has."""

    sparsity: float = Field(
        0.5, ge=0.0, lt=1.0, description="Fraction of weights set to zero; the patterns 2:4 and 4:8 are always half."
    )
    pattern: Pattern = Field("unstructured", description="Where the zeros may fall: anywhere, or N in each M inputs.")

    def check_model(self, linears: Mapping[str, tuple[int, int]], parameters: int) -> None:
        """Refuse a pattern that does not divide a linear's inputs."""
        if self.pattern != "unstructured":
            for name, (_, inputs) in linears.items():
                if inputs % int(self.pattern.split(":")[1]):
                    raise BadParams(f"the pattern {self.pattern} does not divide the {inputs} inputs of {name}.")


def keep_largest(score: Tensor, params: SparsityParams, name: str, *, by_row: bool) -> Tensor:
    """A mask (N, K), True for the weights to keep: those with the largest score in their row, or in the matrix.

    Exactly round(sparsity * size) weights of each row (or of the matrix) are False; with a pattern N:M
    exactly N in each M consecutive inputs. Ties are cut in the order of the inputs.

    Raises:
        BadParams: a pattern N:M on rows that M does not divide.
    """
    params.check_model({name: (score.shape[0], score.shape[1])}, score.numel())
    rows, columns = score.shape
    if params.pattern != "unstructured":
        zeros, span = map(int, params.pattern.split(":"))
        return _drop(score.view(-1, span), zeros).view(rows, columns)
    if by_row:
        return _drop(score, round(params.sparsity * columns))
    return _drop(score.reshape(1, -1), round(params.sparsity * score.numel())).view(rows, columns)


def _drop(score: Tensor, count: int) -> Tensor:
    """Per row of `score`, False for the `count` smallest."""
    order = torch.argsort(score, dim=1, stable=True)
    return torch.ones_like(score, dtype=torch.bool).scatter_(1, order[:, :count], False)
