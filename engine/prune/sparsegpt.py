"""Set weights to zero column by column and let the columns that follow make up for each.

SparseGPT (Frantar & Alistarh, 2023, arXiv 2301.00774): minimises |XW - XQ|² for each linear, with the Hessian H = 2 X
Xᵀ of calibration inputs, as GPTQ does, with zeros in the place of rounding. Zeros are chosen slice by slice of 128
columns, all rows together (of a large matrix those of 16 million weights), after the columns before have been made up
for: those with the least saliency of optimal brain surgery. With a pattern N:M they are chosen when the first of M
columns comes. Needs calibration text, no training. Better than Wanda, most of all where a pattern restricts the choice,
for what is left moves.

Columns are solved in their natural order, and tokens enter H as they are: on the demo model an early comparison gave
KL 0.024 at half the weights and 0.065 at 2:4, against 0.029 and 0.072 with inputs scaled to length 1, which rounding
prefers. The largest inputs first, which rounding prefers too, changed nothing there (0.023).

Another ratio needs the calibration again: a Hessian for each linear is too large to keep, of 8 billion weights tens of
GB.

Zeros that an earlier step made stay zeros and count. They all stay dense in memory, and in the file unless `storage` is
`bitmask`: memory and latency fall only with a kernel that uses them, CUDA's for 2:4.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from engine.calibration import Moments, walk_blocks
from engine.fields import RARE
from engine.methods import Context
from engine.models import LoadedModel
from engine.observing import Block
from engine.prune._masks import SparsityParams, note_pruned
from engine.solver import Anything, Solver, Zeros, new_solver

TITLE = "SparseGPT"
CHANGES = ()


class Params(SparsityParams, Moments):
    """Settings of SparseGPT: sparsity and calibration."""

    equal_tokens: Annotated[bool, RARE] = Field(
        False, description="Every token counts alike, also where activations are huge."
    )
    damping: Annotated[float, RARE] = Field(
        0.01, gt=0.0, le=1.0, description="Share of the mean diagonal that is added to H."
    )

    @property
    def zeros(self) -> Zeros:
        """The zeros to be made."""
        return Zeros(self.sparsity, self.pattern)


def apply(model: LoadedModel, params: Params, context: Context) -> LoadedModel:
    """Prune the linears of every block.

    One that cannot be solved loses its smallest weights, and the log says so.
    """
    for block in walk_blocks(model, context, params, params.collect):
        _prune_block(model, block, params, context)  # apart, so that nothing of it stays
    return model


def _prune_block(model: LoadedModel, block: Block, params: Params, context: Context) -> None:
    span = 1 if params.zeros.span is None else params.zeros.span[1]
    solvers: dict[str, Solver] = {}
    for linear in block.linears:
        context.check_cancelled()
        keep = linear.weight != 0 if linear.name in model.pruned else None
        try:
            solver = solvers.pop(linear.name, None) or new_solver(
                linear, block, solvers, params.damping, sort=False, span=span
            )
            if solver.damping != params.damping:
                context.log(f"{linear.name}: damping raised from {params.damping:g} to {solver.damping:g}")
            linear.weight.copy_(prune(solver, linear.weight, params.zeros, keep))
        except LinAlgError as error:
            context.log(f"{linear.name}: pruned by magnitude instead, {error}")
            linear.weight.mul_(params.zeros.by_magnitude(linear.weight))
        note_pruned(model, linear.name, params)


def prune(solver: Solver, weight: Tensor, zeros: Zeros, keep: Tensor | None = None) -> Tensor:
    """The weight (N, K) with zeros, and the others made up for them, in float32; `keep` is False where zeros are."""
    return solver.solve(weight, Anything(), keep, zeros)
