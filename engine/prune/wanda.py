"""Set the weights whose magnitude times input norm is smallest in their row to zero.

Wanda (Sun et al., 2023, arXiv 2306.11695): score |w_nk| * |x_k|₂, compared within each output row.
Needs calibration text, no training and no weight update. Unless `storage` says otherwise the zeros stay dense:
memory and latency fall only with a later step or a kernel that uses them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.calibration import walk_blocks
from engine.methods import Calibrated, Context
from engine.models import LoadedModel
from engine.prune._masks import SparsityParams, keep_largest, note_pruned

TITLE = "Wanda"
CHANGES = ()


class Params(SparsityParams, Calibrated):
    """Settings of Wanda: sparsity and calibration."""


def apply(model: LoadedModel, params: Params, context: Context) -> LoadedModel:
    """Prune the linears of every block, each row to the same sparsity."""
    for block in walk_blocks(model, context, params, collect="norm"):
        for linear in block.linears:
            if linear.input_norm is None:
                context.log(f"{linear.name}: no token reached it, scored by magnitude alone")
            scores = score(linear.weight, linear.input_norm)
            linear.weight.mul_(keep_largest(scores, params, linear.name, by_row=True))
            note_pruned(model, linear.name, params)
    return model


def score(weight: Tensor, input_norm: Tensor | None) -> Tensor:
    """Wanda's importance (N, K) of a weight (N, K), given the L2 norms (K,) of its inputs."""
    magnitude = weight.float().abs()
    return magnitude if input_norm is None else magnitude * input_norm.to(torch.float32)
