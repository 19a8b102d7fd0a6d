"""Fit each group's grid to its weights robustly, without calibration: half-quadratic quantization.

HQQ (Badri and Shaji, 2023, "Half-Quadratic Quantization of Large Machine Learning Models"). Seconds for any
model, no text needed; on the demo model clearly better than rounding to nearest at 2 bits, at 3 and 4 hardly.
Minimises, for each group,

    sum |W - (Q - z) s|^p        with p < 1,

in which a few large errors, those of outliers, count little. The half-quadratic way splits the error into E, which
may be sparse, and what is left, and takes turns:

    E  = shrink(W - (Q - z) s)      shrink(x) = sign(x) max(0, |x| - |x|^(p-1) / b), the proximal step of |x|^p
    Q  = nearest codes of W
    z  = round(mean(Q - (W - E) / s))           where the grid is not symmetric
    s  = <W - E, Q - z> / <Q - z, Q - z>

and b grows a little each turn. Two things differ from the authors' code, because files here hold integer zero points:
z is rounded, and s is fitted as well. Errors are measured in steps of the grid, so that b means the same for every
layer. Each group keeps the best grid it has seen; the first is that of round-to-nearest.

By hand, W = (0.9, 2.1), symmetric, Q - z = (1, 2), E = 0: s = (0.9 + 4.2) / (1 + 4) = 1.02.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from engine import sizes
from engine.fields import RARE
from engine.headers import Shape
from engine.methods import Context
from engine.models import LoadedModel
from engine.observing import stretches
from engine.packing import QuantizedWeight
from engine.quantize._grid import Grid, GridParams, make_grid
from engine.quantize._place import place, walk

TITLE = "HQQ"
CHANGES = ("disk", "memory", "latency")
SHARPER = 1.05  # growth of b each turn
TURN = 1000.0  # operations that take as long as a turn on one weight: two powers, and thirty passes over memory


class Params(GridParams):
    """Settings of HQQ: the grid, the norm and the number of turns."""

    norm: Annotated[float, RARE] = Field(
        0.7, gt=0.0, le=1.0, description="The p of the error's norm; lower forgives outliers more."
    )
    turns: Annotated[int, RARE] = Field(20, ge=1, le=200, description="How often codes and grid are fitted in turn.")
    penalty: Annotated[float, RARE] = Field(
        10.0, gt=0.0, le=1000.0, description="The b of the first turn, for errors in steps."
    )

    def work(self, shape: Shape) -> float:
        """The turns."""
        weights = sum(outputs * inputs for outputs, inputs in sizes.chosen(shape, self).values())
        return super().work(shape) + TURN * (self.turns + 1) * weights


def apply(model: LoadedModel, params: Params, context: Context) -> LoadedModel:
    """Quantize the linears of every block."""
    for block in walk(model, context, params):
        for linear in block.linears:
            context.check_cancelled()
            quantized = quantize_weight(linear.weight, params, linear.name, linear.weight.dtype)
            place(model, linear, quantized, context)
    return model


def quantize_weight(weight: Tensor, params: Params, name: str, dtype: torch.dtype) -> QuantizedWeight:
    """HQQ of a weight (N, K), some rows at a time where rows have scales of their own; scales are stored in `dtype`."""
    parts = [slice(None)] if params.granularity == "tensor" else [*stretches(weight)]
    grids = [fit(weight[rows].float(), params, name, dtype) for rows in parts]
    index = torch.arange(weight.shape[1], device=weight.device) // (weight.shape[1] // grids[0].scale.shape[1])
    codes = [grid.encode(weight[rows].float(), index) for grid, rows in zip(grids, parts, strict=True)]
    scale, zero = (torch.cat(each) for each in zip(*((grid.scale, grid.zero) for grid in grids), strict=True))
    return Grid(scale, zero, params.bits, params.symmetric).quantized(torch.cat(codes))


def fit(weight: Tensor, params: Params, name: str, dtype: torch.dtype) -> Grid:
    """The grid of a float32 weight (N, K)."""
    grid = make_grid(weight, params, name, dtype)
    rows = weight.shape[0]
    whole = params.granularity == "tensor"
    groups = grid.scale.shape[1]
    grouped = weight.reshape(1, 1, -1) if whole else weight.view(rows, groups, -1)  # (N, G, size)
    scale, zero = grid.scale.float(), grid.zero
    if whole:
        scale, zero = scale[:1, :1], zero[:1, :1]
    best_scale, best_zero = scale, zero
    best = torch.full_like(scale, torch.inf)
    penalty, top = params.penalty, 2**params.bits - 1
    for _ in range(params.turns + 1):
        stored = scale.to(dtype).float().unsqueeze(-1)
        codes = (torch.round(grouped / stored) + zero.unsqueeze(-1)).clamp_(0, top)
        steps = codes - zero.unsqueeze(-1)
        left = grouped - steps * stored
        error = left.abs().pow(params.norm).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
        sparse = shrink(left / stored, params.norm, penalty) * stored
        wanted = grouped - sparse
        if not params.symmetric:
            zero = torch.round((codes - wanted / stored).mean(-1)).clamp_(0, top)
            steps = codes - zero.unsqueeze(-1)
        energy = steps.square().sum(-1)
        fitted = (wanted * steps).sum(-1) / energy.clamp(min=1e-12)
        scale = torch.where((energy > 0) & (fitted > 0), fitted, scale)
        penalty *= SHARPER
    shape = grid.scale.shape
    return Grid(best_scale.to(dtype).expand(shape), best_zero.expand(shape), params.bits, params.symmetric)


def shrink(error: Tensor, norm: float, penalty: float) -> Tensor:
    """The proximal step of |x|^p: errors of any shape, in steps of the grid."""
    size = error.abs()
    return error.sign() * (size - size.clamp(min=1e-8).pow(norm - 1) / penalty).clamp_(min=0)
