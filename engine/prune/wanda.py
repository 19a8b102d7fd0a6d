"""Set the weights whose magnitude times input norm is smallest in their row to zero.

Wanda (Sun et al., 2023, arXiv 2306.11695): score |w_nk| * |x_k|₂, compared within each output row.
Needs calibration text, no training and no weight update. The zeros stay dense in memory, and in the file unless
`storage` is `bitmask`: memory and latency fall only with a kernel that uses them, CUDA's for 2:4.

As in the paper's code a block is measured with what the pruned blocks before it give. With `inputs: original` all are
measured in the model as it comes, once: the norms are kept, and another sparsity, pattern or choice of linears on the
same text needs no calibration.
"""

from __future__ import annotations

from typing import Annotated, Literal, cast

import torch
from pydantic import Field, JsonValue
from torch import Tensor

from engine import scores
from engine.calibration import Observed, walk_blocks
from engine.fields import RARE
from engine.methods import Context
from engine.models import LoadedModel
from engine.observing import BlockLinear, stretches
from engine.prune._masks import SparsityParams, keep_largest, note_pruned

TITLE = "Wanda"
CHANGES = ()
VERSION = 1  # of what is measured


class Params(SparsityParams, Observed):
    """Settings of Wanda: sparsity and calibration."""

    inputs: Annotated[Literal["pruned", "original"], RARE] = Field(
        "pruned",
        description="Whose inputs are measured: those of blocks already pruned, as in the paper's code, or the "
        "original's, which are kept for other ratios.",
    )

    def ranked(self, outputs: int, inputs: int) -> int:
        """Those of a row."""
        return inputs


def apply(model: LoadedModel, params: Params, context: Context) -> LoadedModel:
    """Prune the linears of every block, each row to the same sparsity."""
    if params.inputs == "original":
        norms = original_norms(model, params, context)
        zeros = SparsityParams(**{name: getattr(params, name) for name in SparsityParams.model_fields})
        for block in walk_blocks(model, context, zeros):
            for linear in block.linears:
                kept = norms.get(linear.name)
                linear.input_norm = None if kept is None else torch.tensor(kept, device=linear.weight.device)
                prune_(model, linear, params, context)
        return model
    for block in walk_blocks(model, context, params, collect="norm"):
        for linear in block.linears:
            prune_(model, linear, params, context)
    return model


def prune_(model: LoadedModel, linear: BlockLinear, params: Params, context: Context) -> None:
    """Set what scores lowest in each row of a linear to zero."""
    if linear.input_norm is None:
        context.log(f"{linear.name}: no token reached it, scored by magnitude alone")
    for rows in stretches(linear.weight):
        found = score(linear.weight[rows], linear.input_norm)
        linear.weight[rows] *= keep_largest(found, params, linear.name)
    note_pruned(model, linear.name, params)


def original_norms(model: LoadedModel, params: Params, context: Context) -> dict[str, list[float] | None]:
    """The L2 norms of the inputs of every linear, by its name, in the model as it is; None where no token came."""
    whole = Observed(**{name: getattr(params, name) for name in Observed.model_fields})
    about: dict[str, JsonValue] = {"version": VERSION, **whole.asked()}

    def look(_: scores.Pieces) -> JsonValue:
        found: dict[str, JsonValue] = {}
        for block in walk_blocks(model, context, whole, collect="norm", keep_blocks=False):
            for linear in block.linears:
                found[linear.name] = None if linear.input_norm is None else linear.input_norm.tolist()
        return found

    found = scores.measured(model, context, "norms of inputs", about, look)
    return cast(dict[str, list[float] | None], found)


def score(weight: Tensor, input_norm: Tensor | None) -> Tensor:
    """Wanda's importance (N, K) of a weight (N, K), given the L2 norms (K,) of its inputs."""
    magnitude = weight.float().abs()
    return magnitude if input_norm is None else magnitude * input_norm.to(torch.float32)
