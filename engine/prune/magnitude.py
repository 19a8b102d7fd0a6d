"""Set the weights with the smallest magnitude to zero, of each linear or of all together.

Magnitude pruning (Han et al., 2015, arXiv 1506.02626), without retraining. Needs neither calibration nor training; the
baseline that activation-aware pruning must beat. The zeros stay dense in memory, and in the file unless `storage` is
`bitmask`: memory and latency fall only with a kernel that uses them, CUDA's for 2:4.

With the scope `global` one threshold holds for all selected linears (Blalock et al., 2020, "What is the State of
Neural Network Pruning?", arXiv 2003.03033): linears of large weights lose less. It is exact and holds one block in
memory: float32 magnitudes are ordered as their bits are, so the threshold's upper 16 bits come from one count over
all weights, the lower from another. Of the weights that equal it, the first ones go.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from engine.calibration import BlockLinear, stretches, walk_blocks
from engine.fields import With
from engine.methods import Context
from engine.models import LoadedModel
from engine.prune._masks import SparsityParams, keep_largest, note_pruned

TITLE = "Magnitude pruning"
CHANGES = ()
HALF = 1 << 16  # values of half the bits of a float32


class Params(SparsityParams):
    """Settings of magnitude pruning."""

    scope: Annotated[Literal["linear", "global"], With("pattern", "unstructured")] = Field(
        "linear", description="The smallest weights of each linear, or of all together; patterns know no difference."
    )


def apply(model: LoadedModel, params: Params, context: Context) -> LoadedModel:
    """Prune the linears of every block: each to the same sparsity, or all by one threshold."""
    cut = find_cut(model, params, context) if params.scope == "global" and params.pattern == "unstructured" else None
    for block in walk_blocks(model, context, params):
        for linear in block.linears:
            if cut is None:
                keep = keep_largest(linear.weight.float().abs(), params, linear.name, by_row=False)
            else:
                keep = cut.keep(linear)
                context.log(f"{linear.name}: {1 - float(keep.float().mean()):.1%} set to zero")
            linear.weight.mul_(keep)
            note_pruned(model, linear.name, params)
    return model


@dataclass(frozen=True)
class Cut:
    """Weights whose magnitude has smaller bits go, and so many of each linear whose magnitude has the same."""

    bits: int
    equal: dict[str, int]

    def keep(self, linear: BlockLinear) -> Tensor:
        """A mask (N, K), True for the weights to keep."""
        bits = magnitude_bits(linear.weight)
        keep = bits > self.bits
        same = (bits == self.bits).flatten().nonzero()[self.equal[linear.name] :]
        keep.view(-1)[same] = True
        return keep


def find_cut(model: LoadedModel, params: Params, context: Context) -> Cut:
    """The threshold over all selected linears, by passes over the weights; exactly round(sparsity * all) go."""
    upper, total = torch.zeros(HALF // 2, dtype=torch.int64), 0
    for _, bits in _passing(model, params, context):
        upper += torch.bincount(bits // HALF, minlength=HALF // 2).cpu()
        total += bits.numel()
    wanted = round(params.sparsity * total)
    high, below = _kth(upper, wanted)
    lower = torch.zeros(HALF, dtype=torch.int64)
    for _, bits in _passing(model, params, context):
        lower += torch.bincount(bits[bits // HALF == high] % HALF, minlength=HALF).cpu()
    low, under = _kth(lower, wanted - below)
    cut, left = high * HALF + low, wanted - below - under
    equal: dict[str, int] = {}
    for name, bits in _passing(model, params, context):
        taken = min(left, int((bits == cut).sum()))
        equal[name] = equal.get(name, 0) + taken
        left -= taken
    return Cut(cut, equal)


def magnitude_bits(weight: Tensor) -> Tensor:
    """The magnitudes of a weight (N, K) as int32 numbers in the same order."""
    return weight.float().abs().contiguous().view(torch.int32)


def _passing(model: LoadedModel, params: Params, context: Context) -> Iterator[tuple[str, Tensor]]:
    """The magnitude bits of all selected linears, flat, some rows at a time."""
    for block in walk_blocks(model, context, params, keep_blocks=False):
        for linear in block.linears:
            for rows in stretches(linear.weight):
                yield linear.name, magnitude_bits(linear.weight[rows]).flatten()


def _kth(counts: Tensor, wanted: int) -> tuple[int, int]:
    """The bin in which the `wanted`-th smallest lies, the first one counted 0, and how many lie in the bins before."""
    sums = counts.cumsum(0)
    found = min(int(torch.searchsorted(sums, wanted, right=True)), len(counts) - 1)
    return found, int(sums[found] - counts[found])
