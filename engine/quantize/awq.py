"""Scale the channels with large activations up before rounding, and undo it in the operation before.

AWQ (Lin et al., 2023, "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", arXiv
2306.00978). A few input channels carry most of what a linear computes. Multiplied by s > 1 before rounding, with the
activations divided by s where they are made, their relative rounding error falls by up to s. Needs a little
calibration text; robust at 4 bits.

For each place where a scale can be folded (see `_fold.py`), with x the root mean square of each channel:

    s = x^a / sqrt(max(x^a) min(x^a)),    a = 0, 1/20, ..., 1

and the a is taken whose weights, rounded, change the readers' outputs least. The change is computed from the second
moments H of the inputs, |(Q(W s) / s - W) X|² = tr(D H Dᵀ), without running the model again, and of a large matrix
from every so many rows; experts of a mixture, which share the scale, count by the tokens that reach them. Then ranges
are clipped where that lowers the error (`clipping`), each column counting by its inputs.

By hand, x = (1, 16), a = 1/2: x^a = (1, 4), divided by sqrt(4) = 2 gives s = (0.5, 2).
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from engine.calibration import Moments
from engine.fields import RARE
from engine.methods import Context
from engine.models import LoadedModel
from engine.observing import Block, BlockLinear, mirror
from engine.quantize._fold import Fold, folds
from engine.quantize._grid import Clipping, GridParams, round_to_nearest
from engine.quantize._place import place, walk

TITLE = "AWQ"
CHANGES = ("disk", "memory", "latency")
RATIOS = tuple(step / 20 for step in range(21))
ENOUGH, LEAST = 1 << 23, 1 << 16  # weights that are rounded with each ratio: of a fold, and at least of each reader
SMALLEST = 1e-4  # of the largest channel: what is smaller counts as this


class Params(Moments, GridParams):
    """Settings of AWQ: the grid and the calibration."""

    clipping: Annotated[Clipping, RARE] = Field(
        "mse", description="Narrow each range where that lowers the squared error (mse)."
    )


def apply(model: LoadedModel, params: Params, context: Context) -> LoadedModel:
    """Fold the best scales into every block, then quantize its linears."""
    for block in walk(model, context, params, params.collect):
        scales = scale_block(block, params, context)
        for linear in block.linears:
            context.check_cancelled()
            scale = scales.get(linear.name, torch.ones((), device=linear.weight.device))
            importance = None if linear.hessian is None else linear.hessian.diagonal() / scale.square()
            linear.sample = None if linear.sample is None else linear.sample / scale
            quantized = round_to_nearest(linear.weight, params, linear.name, linear.weight.dtype, importance)
            note = "" if linear.name in scales else "no scale: no operation before it takes one, or none helps"
            note = "no token reached it" if linear.hessian is None else note
            place(model, linear, quantized, context, note)
    return model


def scale_block(block: Block, params: Params, context: Context) -> dict[str, Tensor]:
    """Fold the best scale into each place of the block; the scale of each linear's inputs by its name."""
    found: dict[str, Tensor] = {}
    for fold in folds(block, *block.batches[0]):
        context.check_cancelled()
        readers = [reader for reader in fold.readers if reader.hessian is not None]
        if not readers or any(reader.name in found for reader in readers):
            continue
        ratio, scale = best_scale(fold, readers, params)
        if ratio > 0:
            exact = fold.spread(fold.apply(scale))
            found |= dict.fromkeys((reader.name for reader in fold.readers), exact)
    return found


def best_scale(fold: Fold, readers: list[BlockLinear], params: Params) -> tuple[float, Tensor]:
    """The exponent and the scale (size,) that change the readers' outputs least when they are rounded."""
    size = fold.gather(mean_square(readers)).sqrt()
    size = size.clamp(min=max(SMALLEST * float(size.max()), 1e-12))
    most = max(LEAST, ENOUGH // len({reader.name.rpartition(".")[0] for reader in readers}))  # by expert
    weights = [some_rows(reader.weight, params, most).float() for reader in readers]
    best: tuple[float, float, Tensor] | None = None
    for ratio in RATIOS:
        scale = scale_for(size, ratio)
        spread = fold.spread(scale)
        loss = 0.0
        for reader, weight in zip(readers, weights, strict=True):
            moments = reader.hessian
            assert moments is not None
            importance = moments.diagonal() / spread.square()
            rounded = round_to_nearest(weight * spread, params, reader.name, reader.weight.dtype, importance)
            difference = rounded.dequantize().float() / spread - weight
            loss += reader.tokens * float(((difference @ moments) * difference).sum())
        if best is None or loss < best[0]:
            best = (loss, ratio, scale)
    assert best is not None
    return best[1], best[2]


def mean_square(readers: list[BlockLinear]) -> Tensor:
    """The mean square of each input (in,) over all tokens that reach the readers; completes their moments."""
    distinct = {id(reader.hessian): reader for reader in readers}
    total, tokens = torch.zeros(()), sum(reader.tokens for reader in distinct.values())
    for reader in distinct.values():
        assert reader.hessian is not None
        mirror(reader.hessian)
        total = total.to(reader.hessian.device) + reader.hessian.diagonal() * (reader.tokens / tokens)
    return total


def some_rows(weight: Tensor, params: Params, most: int) -> Tensor:
    """Every so many rows of a large weight (N, K): they are rounded each on its own, and enough of them tell."""
    step = 1 if params.granularity == "tensor" else max(1, weight.numel() // most)
    return weight[::step]


def scale_for(size: Tensor, ratio: float) -> Tensor:
    """x^a over the geometric mean of its largest and smallest value, for channel sizes x (size,)."""
    raised = size.pow(ratio)
    return raised / (raised.max() * raised.min()).sqrt()
