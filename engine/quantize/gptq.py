"""Quantize column by column and let the columns that follow make up for each rounding error.

GPTQ (Frantar et al., 2022, arXiv 2210.17323). Minimises |XW - XQ|² for each linear with the Hessian
H = 2 X Xᵀ of calibration inputs. Needs calibration text, no training; the best choice at 4 bits and
below among the weight-only schemes here.

The weight is worked through column by column, in slices. With the upper Cholesky factor U of H⁻¹ = Uᵀ U,
whose row j says how much of column j's error the later columns must absorb:

    q_j   = nearest level to w_j
    e_j   = (w_j - q_j) / U_jj
    w_k  -= e_j U_jk            for k > j

Within a slice at once, beyond it once per slice ("lazy batch updates", section 3.3). By hand, with the
grid of whole numbers, w = (0.6, 0.6) and U = [[1, 0.5], [0, 1]]: q_0 = 1, e_0 = -0.4, so w_1 becomes
0.6 + 0.4 * 0.5 = 0.8 and q_1 = 1.

Activation order is *static*: columns are solved in the order of falling H_jj, but every column keeps the
group, and so the scale, of its place in the row. Files need no index then, and kernels stay fast.
Tokens count alike: each input is scaled to length 1 before it enters H. Some tokens, the start token above all,
have activations tens of times larger (Sun et al., 2024, "Massive Activations in Large Language Models",
arXiv 2402.17762); unscaled, they decide the whole solution and the other tokens pay. On the demo model at 3
bits that is KL 0.004 against 0.029; the published objective is there with `equal_tokens` off.

Zeros that an earlier pruning step made stay zeros; their rounding error is what they were moved to.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from engine.calibration import walk_blocks
from engine.methods import Context
from engine.models import LoadedModel
from engine.packing import QuantizedWeight
from engine.quantize._grid import Grid, GridParams, Moments, make_grid, round_to_nearest, stretches
from engine.quantize._place import place

TITLE = "GPTQ"
CHANGES = ("disk", "memory", "latency")
SLICE = 128


class SolverParams(Moments):
    """Settings of the solver, whatever the grid: the calibration, the order and the damping."""

    activation_order: bool = Field(True, description="Solve the columns with the largest inputs first.")
    damping: float = Field(0.01, gt=0.0, le=1.0, description="Share of the mean diagonal that is added to H.")


class Params(SolverParams, GridParams):
    """Settings of GPTQ: the grid and the solver."""


def apply(model: LoadedModel, params: Params, context: Context) -> LoadedModel:
    """Quantize the linears of every block."""
    return solve(model, params, context, lambda name: params)


def solve(
    model: LoadedModel, params: SolverParams, context: Context, grid_of: Callable[[str], GridParams]
) -> LoadedModel:  # fmt: skip
    """Quantize every linear on the grid that `grid_of` its name gives.

    One that cannot be solved is rounded to nearest, and the audit says so.
    """
    for block in walk_blocks(model, context, params, params.collect):
        solvers: dict[int, Solver] = {}
        for linear in block.linears:
            context.check_cancelled()
            weight, dtype, grid = linear.weight, linear.weight.dtype, grid_of(linear.name)
            keep = weight != 0 if linear.name in model.pruned else None
            note = ""
            try:
                if linear.hessian is None:
                    raise LinAlgError("no token reached it")
                solver = solvers.get(id(linear.hessian)) or Solver(linear.hessian, params)
                solvers[id(linear.hessian)] = solver
                quantized = solver.quantize(weight, grid, linear.name, dtype, keep)
                if solver.damping != params.damping:
                    note = f"damping raised from {params.damping:g} to {solver.damping:g}"
            except LinAlgError as error:
                note = f"rounded to nearest instead, {error}"
                quantized = round_to_nearest(weight, grid, linear.name, dtype)
            place(model, linear, quantized, context, note)
    return model


class Solver:
    """GPTQ for the linears that read one input, given its Hessian (K, K): ordered and factorized once.

    `damping` is what the factorization took.

    Raises:
        LinAlgError: the Hessian cannot be factorized.
    """

    def __init__(self, hessian: Tensor, params: SolverParams) -> None:
        self._importance = hessian.diagonal().clone()
        self._dead = self._importance == 0
        self._order = torch.arange(hessian.shape[0], device=hessian.device)
        if params.activation_order:
            ranks = torch.where(self._dead, 1, self._importance)
            self._order = torch.argsort(ranks, descending=True, stable=True)
        self._factor, self.damping = inverse_factor(hessian, params.damping, self._order)

    def quantize(
        self, weight: Tensor, params: GridParams, name: str, dtype: torch.dtype, keep: Tensor | None = None
    ) -> QuantizedWeight:
        """The weight (N, K) on the grid of `params`; scales are stored in `dtype`.

        Where `keep` (N, K) is False, the weight becomes zero. Rows do not depend on each other.
        """
        grid = make_grid(weight, params, name, dtype, self._importance)
        codes = [
            self._solve(weight[rows].float(), grid.rows(rows), None if keep is None else keep[rows])
            for rows in stretches(weight)
        ]
        return grid.quantized(torch.cat(codes))

    def _solve(self, weight: Tensor, grid: Grid, keep: Tensor | None) -> Tensor:
        """The codes (N, K), uint8, of a float32 weight."""
        columns, top = weight.shape[1], 2**grid.bits - 1
        group = torch.arange(columns, device=weight.device) // (columns // grid.scale.shape[1])
        weight = torch.where(self._dead, 0, weight)  # inputs that are always zero: zero costs nothing
        weight, group = weight[:, self._order], group[self._order]
        keep = None if keep is None else keep[:, self._order]
        codes = torch.empty_like(weight)
        for start in range(0, columns, SLICE):
            stop = min(start + SLICE, columns)
            part, errors = weight[:, start:stop], torch.empty_like(weight[:, start:stop])
            scale, zero = grid.columns(group[start:stop])  # (N, stop - start) each
            for j in range(stop - start):
                s, z = scale[:, j], zero[:, j]
                code = (torch.round(part[:, j] / s) + z).clamp_(0, top)
                if keep is not None:
                    code = torch.where(keep[:, start + j], code, z)
                row = self._factor[start + j, start + j : stop]
                errors[:, j] = (part[:, j] - (code - z) * s) / row[0]
                part[:, j + 1 :] -= torch.outer(errors[:, j], row[1:])
                codes[:, start + j] = code
            weight[:, stop:] -= errors @ self._factor[start:stop, stop:]
        inverse = torch.empty_like(self._order)
        inverse[self._order] = torch.arange(columns, device=weight.device)
        return codes[:, inverse].to(torch.uint8)


def inverse_factor(hessian: Tensor, damping: float, order: Tensor) -> tuple[Tensor, float]:
    """The upper Cholesky factor U of (H + d I)⁻¹ = Uᵀ U and the damping that it took, raised tenfold on failure.

    H's rows and columns are taken in `order`; those of inputs that are always zero count as the identity's. At most
    two matrices of H's size exist beside it at any time.

    Raises:
        LinAlgError: not positive definite even with the whole mean diagonal added.
    """
    diagonal = hessian.diagonal()
    mean = torch.where(diagonal == 0, 1, diagonal).mean()
    while True:
        damped = hessian[order[:, None], order]
        damped.diagonal().copy_(torch.where(damped.diagonal() == 0, 1, damped.diagonal()) + damping * mean)
        try:
            lower = torch.linalg.cholesky(damped)
            del damped
            inverse = torch.cholesky_inverse(lower)
            del lower
            return torch.linalg.cholesky(inverse, upper=True), damping
        except LinAlgError:
            if damping >= 1:
                raise
            damping = min(1.0, damping * 10)
