"""The quantization grid: where the levels of a weight lie, per tensor, channel or group.

A symmetric grid of b bits has the levels -2^(b-1) .. 2^(b-1) - 1 times the scale, with
scale = amax / (2^(b-1) - 0.5), so that the largest weight of either sign is at most half a step off.
An asymmetric grid spans [min(0, lowest), max(0, highest)] in 2^b - 1 steps, with an integer zero point.
Scales are rounded to the dtype in which they are stored *before* codes are computed.

A few large weights make all steps wide. With clipping the range is narrowed where that lowers the squared
error: each group takes the best of `RATIOS` of its full range, and where it is known how large an input is
on average, its column counts accordingly. Where a solver moves the weights afterwards (GPTQ), the narrowest ranges are
no good: what a column is to make up for falls outside of them. On the demo model, KL at 2, 3 and 4 bits is .139, .0166
and .0042 without clipping, .229, .0167 and .0038 with ranges down to 0.4, and .111, .0164 and .0037 down to 0.82.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from engine.errors import BadParams
from engine.fields import RARE, With
from engine.methods import Selection, StoredBits
from engine.observing import stretches
from engine.packing import QuantizedWeight

Bits = Literal[2, 3, 4, 5, 6, 7, 8]
Granularity = Literal["group", "channel", "tensor"]
Clipping = Literal["none", "mse"]
USUAL_SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
RATIOS = tuple(1 - 0.03 * step for step in range(21))  # of the full range: 1 down to 0.4
LEAST_RANGE = 0.82  # of the full range at least, where a solver moves the weights


class Resolution(Selection):
    """How many levels a grid has, and what shares a scale."""

    bits: Bits = Field(4, description="Bits of each integer code.")
    granularity: Granularity = Field("group", description="What shares one scale: a group of inputs, a row, a matrix.")
    group_size: Annotated[int, With("granularity", "group")] = Field(
        64, ge=8, le=4096, description="Inputs that share one scale, with granularity `group`."
    )


class Range(Selection):
    """Where the levels of a grid begin and end."""

    symmetric: bool = Field(True, description="Levels symmetric around zero; else each scale has a zero point.")
    clipping: Annotated[Clipping, RARE] = Field(
        "none", description="Narrow each range where that lowers the squared error (mse)."
    )


class Beyond(Selection):
    """What is quantized beside the blocks."""

    head: bool = Field(False, description="The output head, too.")
    embeddings: bool = Field(False, description="The embeddings, too: 8 bits, one scale for each token's row.")

    def beyond_blocks(self) -> tuple[bool, bool]:
        return self.head, self.embeddings


class GridParams(Beyond, Range, Resolution):
    """Settings that every integer weight grid has."""

    def check_model(self, linears: Mapping[str, tuple[int, int]], parameters: int, width: int = 16) -> None:
        """Refuse a group size that does not divide a linear's inputs."""
        for name, (_, inputs) in linears.items():
            if self.granularity == "group" and inputs % self.group_size:
                raise BadParams(
                    f"group_size {self.group_size} does not divide the {inputs} inputs of {name}. "
                    f"Sizes that do: {fitting_sizes(inputs)}."
                )

    def unfit_for_experts(self) -> str:
        return "" if self.symmetric else "experts are stored without zero points."

    def stored_bits(self, outputs: int, inputs: int) -> StoredBits:
        """Codes, and for each group a scale in 16 bit, with a zero point where the grid has one."""
        rows = 1 if self.granularity == "tensor" else outputs
        each = 16 + (0 if self.symmetric else self.bits)
        return StoredBits(self.bits, each * rows * self.groups(inputs) / (outputs * inputs))

    def groups(self, columns: int) -> int:
        """How many groups a row of `columns` weights has."""
        return columns // self.group_size if self.granularity == "group" else 1


def fitting_sizes(inputs: int) -> str:
    """The usual group sizes that divide a number of inputs, as text."""
    return ", ".join(str(size) for size in USUAL_SIZES if inputs % size == 0) or "none of the usual"


@dataclass(frozen=True)
class Grid:
    """Scales and zero points (N, G) of a weight (N, K); G groups of K / G inputs."""

    scale: Tensor
    zero: Tensor
    bits: int
    symmetric: bool

    def encode(self, weight: Tensor, group: int | Tensor) -> Tensor:
        """Codes 0 .. 2^bits - 1 of columns (N, C) that belong to the groups `group` (an index or C of them)."""
        scale, zero = self.columns(group)
        codes = torch.round(weight / scale) + zero
        return codes.clamp_(0, 2**self.bits - 1)

    def decode(self, codes: Tensor, group: int | Tensor) -> Tensor:
        """The values of codes (N, C)."""
        scale, zero = self.columns(group)
        return (codes - zero) * scale

    def columns(self, group: int | Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point as float32 columns (N, 1) or (N, C)."""
        if isinstance(group, int):
            return self.scale[:, group : group + 1].float(), self.zero[:, group : group + 1].float()
        return self.scale[:, group].float(), self.zero[:, group].float()

    def rows(self, rows: slice) -> Grid:
        """The grid of some rows."""
        if self.scale.shape[0] == 1:
            return self
        return Grid(self.scale[rows], self.zero[rows], self.bits, self.symmetric)

    def quantized(self, codes: Tensor) -> QuantizedWeight:
        """Codes (N, K) together with this grid, ready to be stored."""
        return QuantizedWeight(
            codes.to(torch.uint8).contiguous(), self.scale.contiguous(), self.zero.to(torch.uint8).contiguous(),
            self.bits, self.symmetric,
        )  # fmt: skip


def make_grid(
    weight: Tensor, params: GridParams, name: str, dtype: torch.dtype, importance: Tensor | None = None,
    least: float = RATIOS[-1],
) -> Grid:  # fmt: skip
    """The grid of a weight (N, K), with scales rounded to `dtype`.

    `importance` (K,) says how much an error in each column counts when ranges are clipped; None: all alike. `least`:
    what stays of a range then.

    Raises:
        BadParams: the group size does not divide the row; names the module and sizes that do.
    """
    rows, columns = weight.shape
    params.check_model({name: (rows, columns)}, weight.numel())
    if params.granularity == "tensor":
        return _make_grid(weight.float(), params, dtype, importance, least)
    parts = [_make_grid(weight[some].float(), params, dtype, importance, least) for some in stretches(weight)]
    scale, zero = torch.cat([part.scale for part in parts]), torch.cat([part.zero for part in parts])
    return Grid(scale, zero, params.bits, params.symmetric)


def _make_grid(weight: Tensor, params: GridParams, dtype: torch.dtype, importance: Tensor | None, least: float) -> Grid:
    rows, columns = weight.shape
    groups = params.groups(columns)
    grouped = weight.view(rows, groups, -1)  # (N, G, group_size)
    low, high = grouped.amin(-1), grouped.amax(-1)  # (N, G)
    if params.granularity == "tensor":
        # One scale; with zero points one a row, all equal: the file format has them for rows, not for matrices.
        shape = (1, 1) if params.symmetric else (rows, 1)
        low, high = low.amin().expand(shape), high.amax().expand(shape)
    full = _grid_of(low, high, params, dtype)
    if params.clipping == "none":
        return full
    weights = torch.ones(columns, device=weight.device) if importance is None else importance.float()
    weights = weights.view(1, groups, -1)
    best, scale, zero = torch.full_like(full.zero, torch.inf), full.scale, full.zero
    for ratio in (ratio for ratio in RATIOS if ratio > least - 1e-9):
        grid = full if ratio == 1 else _grid_of(ratio * low, ratio * high, params, dtype)
        s, z = grid.scale.float().unsqueeze(-1), grid.zero.unsqueeze(-1)  # (N, G, 1), or (1, 1, 1)
        codes = (torch.round(grouped / s) + z).clamp_(0, 2**params.bits - 1)
        error = ((codes - z) * s - grouped).square_().mul_(weights).sum(-1)  # (N, G)
        if params.granularity == "tensor":
            error = error.sum().expand(scale.shape)
        better = error < best
        best = torch.where(better, error, best)
        scale, zero = torch.where(better, grid.scale, scale), torch.where(better, grid.zero, zero)
    return Grid(scale, zero, params.bits, params.symmetric)


def _grid_of(low: Tensor, high: Tensor, params: GridParams, dtype: torch.dtype) -> Grid:
    """The grid that covers the ranges `low` to `high`, each of the shape of the scales."""
    half = 2 ** (params.bits - 1)
    if params.symmetric:
        scale = _storable(torch.maximum(high, -low) / (half - 0.5), dtype)
        zero = torch.full_like(scale, half, dtype=torch.float32)
    else:
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = _storable((high - low) / (2**params.bits - 1), dtype)
        zero = torch.round(-low / scale.float()).clamp_(0, 2**params.bits - 1)
    return Grid(scale, zero, params.bits, params.symmetric)


def _storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales in the dtype they are stored in; a group of zeros gets 1, so that nothing divides by zero."""
    stored = scale.to(dtype)
    return torch.where(stored > 0, stored, torch.ones_like(stored))


def round_to_nearest(
    weight: Tensor, params: GridParams, name: str, dtype: torch.dtype, importance: Tensor | None = None,
    least: float = RATIOS[-1],
) -> QuantizedWeight:  # fmt: skip
    """Each weight (N, K) to the nearest level of its grid; `importance` and `least` as in `make_grid`."""
    grid = make_grid(weight, params, name, dtype, importance, least)
    groups = grid.scale.shape[1]
    index = torch.arange(weight.shape[1], device=weight.device) // (weight.shape[1] // groups)
    codes = [grid.rows(some).encode(weight[some].float(), index).to(torch.uint8) for some in stretches(weight)]
    return grid.quantized(torch.cat(codes))
