"""Train with a price on every weight, so that many become small; cut the smallest; let the others recover.

L1 regularisation before pruning, as in Han et al., 2015, "Learning both Weights and Connections", arXiv 1506.02626,
after Tibshirani's lasso (1996). In the first part of the steps the loss is

    cross entropy + penalty * sum of |w| over the selected linears / number of linears

whose gradient pulls each weight towards zero by the same amount, whatever its size. Then each linear loses the share
`sparsity` of its smallest weights, or with a pattern N in each M, at once; the run says how large the largest of all
these was. The rest of the steps trains without a price and with these weights at zero.

Adam divides each gradient by its usual size: a weight that matters little to the loss feels the price most. The zeros
stay dense in memory, and in the file unless `storage` is `bitmask`: memory and latency fall only with a kernel that
uses them, CUDA's for 2:4.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from engine.methods import Context
from engine.models import LoadedModel
from engine.prune._retrain import RetrainParams, retrain, selected, zero_smallest_

TITLE = "L1 training and pruning"
CHANGES = ()


class Params(RetrainParams):
    """Settings of the price and the training."""

    penalty: float = Field(1e-3, ge=0.0, le=1e3, description="Price of each unit of |w|; 0 is magnitude pruning.")
    share: float = Field(0.5, gt=0.0, lt=1.0, description="Share of the steps before the cut; the others recover.")

    def cut(self) -> int:
        """All at once."""
        return max(1, round(self.share * self.steps))


def apply(model: LoadedModel, params: Params, context: Context) -> LoadedModel:
    """Train with the price, cut, recover."""
    model.load_all()
    chosen = selected(model, params)
    cut = params.cut()

    def penalty(step: int) -> Tensor | None:
        if step >= cut:
            return None
        return params.penalty * torch.stack([linear.module.weight.abs().sum() for linear in chosen]).mean()

    def prune(step: int) -> None:
        if step == cut:
            before = torch.cat([linear.weight.abs().flatten() for linear in chosen])
            zero_smallest_(chosen, params)
            gone = torch.cat([(linear.weight == 0).flatten() for linear in chosen])
            largest = float((before * gone).max())
            context.log(f"cut {int(gone.sum()):,} of {len(gone):,} weights, the largest of them {largest:.2g}")

    return retrain(model, params, context, prune, penalty)
