"""Which weights to keep: masks from scores, unstructured or N of M."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from engine.errors import BadParams
from engine.fields import With
from engine.headers import Shape
from engine.methods import Params, Selection
from engine.models import LoadedModel
from engine.sparsity import Pattern, check_pattern, drop, span_of


class SparsityParams(Selection):
    """Settings that every unstructured or N:M pruning has."""

    sparsity: Annotated[float, With("pattern", "unstructured")] = Field(
        0.5, ge=0.0, lt=1.0, description="Fraction of weights set to zero; the patterns 2:4 and 4:8 are always half."
    )
    pattern: Pattern = Field("unstructured", description="Where the zeros may fall: anywhere, or N in each M inputs.")

    storage: Literal["dense", "bitmask"] = Field(
        "dense",
        description="Zeros in the file: stored as numbers that anybody reads, or as bits, smaller, for Maquette alone.",
    )

    def unfit_for(self, name: str, later: Params) -> str:
        """What has files of its own, in which a bitmask cannot stand."""
        if self.storage == "bitmask" and name == "quantize/bitsandbytes":
            return "the library's files hold no bitmasks. Use storage dense."
        return ""

    def notes(self, shape: Shape, device: str) -> Sequence[str]:
        """What these zeros bring where they are not used by a later step."""
        said, bitmask = super().notes(shape, device), self.storage == "bitmask"
        if self.pattern == "2:4" and device == "cuda":
            file = "The file becomes smaller" if bitmask else "The file becomes no smaller"
            return [
                *said,
                f"{file}; where CUDA's 2:4 kernel takes a linear, its weights take 9/16 of the GPU's memory. The "
                "measured latency says whether it is faster.",
            ]
        if bitmask:
            return [*said, "The file becomes smaller; memory and speed do not."]
        return [*said, "No smaller and no faster here: the zeros stay dense."]

    def check_model(self, linears: Mapping[str, tuple[int, int]], parameters: int, width: int = 16) -> None:
        """Refuse a pattern that does not divide a linear's inputs, and zeros that would be all of it."""
        check_pattern(self.pattern, linears)
        for name, (outputs, inputs) in linears.items() if self.pattern == "unstructured" else ():
            ranked = self.ranked(outputs, inputs)
            if round(self.sparsity * ranked) == ranked:
                most = math.floor(1e4 * (1 - 1 / ranked)) / 1e4
                raise BadParams(
                    f"a sparsity of {self.sparsity:g} leaves none of {ranked:,} weights of {name} that are ranked "
                    f"together. Keep one at least: {most:g} or less."
                )

    def ranked(self, outputs: int, inputs: int) -> int:
        """How many weights of a linear (out, in) are ranked together, of which the smallest go."""
        return outputs * inputs


def note_pruned(model: LoadedModel, name: str, params: SparsityParams) -> None:
    """Let later steps keep the zeros of a linear, and the file store it as the settings say."""
    model.pruned.add(name)
    if params.storage == "bitmask":
        model.sparse.add(name)


def keep_largest(score: Tensor, params: SparsityParams, name: str) -> Tensor:
    """A mask (N, K), True for the weights to keep: those with the largest score in their row.

    Exactly round(sparsity * K) of each row are False; with a pattern N:M exactly N in each M consecutive inputs.
    Ties are cut in the order of the inputs.

    Raises:
        BadParams: a pattern N:M on rows that M does not divide.
    """
    params.check_model({name: (score.shape[0], score.shape[1])}, score.numel())
    rows, columns = score.shape
    if (parts := span_of(params.pattern)) is not None:
        zeros, span = parts
        return drop(score.reshape(-1, span), zeros).view(rows, columns)
    return drop(score, round(params.sparsity * columns))
