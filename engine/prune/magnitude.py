"""Set the weights with the smallest magnitude of each linear to zero.

Magnitude pruning (Han et al., 2015, arXiv 1506.02626), without retraining. Needs neither calibration
nor training; the baseline that activation-aware pruning must beat. The zeros stay dense: disk, memory
and latency fall only with a sparse format or a later step that uses them.
"""

from __future__ import annotations

from engine.calibration import walk_blocks
from engine.methods import Context
from engine.models import LoadedModel
from engine.prune._masks import SparsityParams, keep_largest

TITLE = "Magnitude pruning"
CHANGES = ()


class Params(SparsityParams):
    """Settings of magnitude pruning."""


def apply(model: LoadedModel, params: Params, context: Context) -> LoadedModel:
    """Prune the linears of every block, each to the same sparsity over its whole matrix."""
    for block in walk_blocks(model, context, params):
        for linear in block.linears:
            linear.weight.mul_(keep_largest(linear.weight.float().abs(), params, linear.name, by_row=False))
            model.pruned.add(linear.name)
    return model
