"""Set the weights with the smallest magnitude to zero, of each linear or of all together.

Magnitude pruning (Han et al., 2015, arXiv 1506.02626), without retraining. Needs neither calibration nor training; the
baseline that activation-aware pruning must beat. The zeros stay dense in memory, and in the file unless `storage` is
`bitmask`: memory and latency fall only with a kernel that uses them, CUDA's for 2:4.

With the scope `global` one threshold holds for all selected linears (Blalock et al., 2020, "What is the State of
Neural Network Pruning?", arXiv 2003.03033): linears of large weights lose less. It is exact and holds one block in
memory: weights are counted by their bits. Of the weights that equal it, the first ones go.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from engine.calibration import walk_blocks
from engine.fields import With
from engine.methods import Context
from engine.models import LoadedModel
from engine.prune._masks import SparsityParams, note_pruned
from engine.sparsity import by_magnitude, find_cut, magnitude_bits

TITLE = "Magnitude pruning"
CHANGES = ()


class Params(SparsityParams):
    """Settings of magnitude pruning."""

    scope: Annotated[Literal["linear", "global"], With("pattern", "unstructured")] = Field(
        "linear", description="The smallest weights of each linear, or of all together; patterns know no difference."
    )


def apply(model: LoadedModel, params: Params, context: Context) -> LoadedModel:
    """Prune the linears of every block: each to the same sparsity, or all by one threshold."""
    cut = None
    if params.scope == "global" and params.pattern == "unstructured":
        cut = find_cut(partial(_passing, model, params, context), params.sparsity)
    for block in walk_blocks(model, context, params):
        for linear in block.linears:
            if cut is None:
                keep = by_magnitude(linear.weight, params.sparsity, params.pattern)
            else:
                keep = cut.keep(linear.name, linear.weight)
                context.log(f"{linear.name}: {1 - float(keep.float().mean()):.1%} set to zero")
            linear.weight.mul_(keep)
            note_pruned(model, linear.name, params)
    return model


def _passing(model: LoadedModel, params: Params, context: Context) -> Iterator[tuple[str, Tensor]]:
    """The magnitude bits of all selected linears, some rows at a time."""
    for block in walk_blocks(model, context, params, keep_blocks=False):
        for linear in block.linears:
            yield from ((linear.name, bits) for bits in magnitude_bits(linear.weight))
