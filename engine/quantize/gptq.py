"""Quantize column by column and let the columns that follow make up for each rounding error.

GPTQ (Frantar et al., 2022, arXiv 2210.17323). Minimises |XW - XQ|² for each linear with the Hessian
H = 2 X Xᵀ of calibration inputs. Needs calibration text, no training; the best choice at 4 bits and
below among the weight-only schemes here.

The weight is worked through column by column, in slices. With the upper triangular M of H = M Mᵀ, the error is the
sum over the columns j of |((W - Q) M)_j|², in which only the columns up to j appear. So each can be made small in turn:

    q_j = nearest level to w_j + sum over k < j of (w_k - q_k) M_kj / M_jj

which are the codes of the paper, whose update reads the Cholesky factor of H⁻¹ instead (Chen et al., 2025, "The
Geometry of LLM Quantization: GPTQ as Babai's Nearest Plane Algorithm", arXiv 2507.18553). As nothing is inverted,
factorizing takes a quarter of the arithmetic, and happens in place. Columns before a slice count at once, by one
product; within it, one by one. By hand, with the grid of whole numbers, w = (0.6, 0.6) and M = [[1, -1], [0, 2]]:
q_0 = 1 leaves -0.4, so w_1 counts as 0.6 + -0.4 * -1/2 = 0.8 and q_1 = 1.

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

from engine.calibration import Block, BlockLinear
from engine.methods import Context
from engine.models import LoadedModel
from engine.packing import QuantizedWeight
from engine.quantize._grid import Clipping, Grid, GridParams, Moments, make_grid, round_to_nearest, stretches
from engine.quantize._place import place, walk

TITLE = "GPTQ"
CHANGES = ("disk", "memory", "latency")
SLICE = 128
STRETCH = 1 << 26  # weights that are solved at a time: the head has many rows


class SolverParams(Moments):
    """Settings of the solver, whatever the grid: the calibration, the order, the damping, and ranges by their error."""

    clipping: Clipping = Field("mse", description="Narrow each range where that lowers the squared error (mse).")
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
    for block in walk(model, context, params, params.collect):
        solvers: dict[str, Solver] = {}
        for linear in block.linears:
            context.check_cancelled()
            weight, dtype, grid = linear.weight, linear.weight.dtype, grid_of(linear.name)
            keep = weight != 0 if linear.name in model.pruned else None
            note = ""
            try:
                solver = solvers.pop(linear.name, None) or new_solver(linear, block, params, solvers)
                quantized = solver.quantize(weight, grid, linear.name, dtype, keep)
                if solver.damping != params.damping:
                    note = f"damping raised from {params.damping:g} to {solver.damping:g}"
            except LinAlgError as error:
                note = f"rounded to nearest instead, {error}"
                quantized = round_to_nearest(weight, grid, linear.name, dtype)
            place(model, linear, quantized, context, note)
    return model


def new_solver(linear: BlockLinear, block: Block, params: SolverParams, solvers: dict[str, Solver]) -> Solver:
    """The solver of a linear, put into `solvers` for those that read the same input; their Hessian is let go.

    Raises:
        LinAlgError: there is no Hessian, or it cannot be factorized.
    """
    if linear.hessian is None:
        raise LinAlgError("no token reached it")
    readers = [reader for reader in block.linears if reader.hessian is linear.hessian]
    solver = Solver(linear.hessian, params)
    for reader in readers:
        reader.hessian = None
    solvers.update((reader.name, solver) for reader in readers if reader is not linear)
    return solver


class Solver:
    """GPTQ for the linears that read one input, given its Hessian (K, K): ordered and factorized once.

    `damping` is what the factorization took.

    Raises:
        LinAlgError: the Hessian cannot be factorized.
    """

    def __init__(self, hessian: Tensor, params: SolverParams) -> None:
        self._importance = hessian.diagonal().clone()
        self._dead = self._importance == 0
        importance = torch.where(self._dead, 1, self._importance)
        self._order = torch.arange(len(hessian), device=hessian.device)
        if params.activation_order:
            self._order = torch.argsort(importance, descending=True, stable=True)
        self._turned, self.damping = turned_factor(hessian, self._order, params.damping)

    def _slice(self, start: int, stop: int) -> Tensor:
        """M_kj / M_jj of the columns j from `start` to `stop` and all rows k before `stop`: (stop, stop - start)."""
        size = len(self._turned)
        part = self._turned[size - stop :, size - stop : size - start].flip(0, 1)
        return part / part[start:].diagonal()

    def quantize(
        self, weight: Tensor, params: GridParams, name: str, dtype: torch.dtype, keep: Tensor | None = None
    ) -> QuantizedWeight:
        """The weight (N, K) on the grid of `params`; scales are stored in `dtype`.

        Where `keep` (N, K) is False, the weight becomes zero.
        """
        grid = make_grid(weight, params, name, dtype, self._importance)
        codes = [
            self._solve(weight[rows], grid.rows(rows), None if keep is None else keep[rows])
            for rows in stretches(weight, STRETCH)
        ]
        return grid.quantized(torch.cat(codes))

    def _solve(self, weight: Tensor, grid: Grid, keep: Tensor | None) -> Tensor:
        """The codes (N, K), uint8; rows do not depend on each other."""
        columns, top = weight.shape[1], 2**grid.bits - 1
        group = torch.arange(columns, device=weight.device) // (columns // grid.scale.shape[1])
        group = group[self._order]
        # Transposed, so that a column is contiguous: (K, N).
        wanted = weight[:, self._order].t().float().contiguous()
        wanted[self._dead[self._order]] = 0  # inputs that are always zero: zero costs nothing
        missed, codes = torch.empty_like(wanted), torch.empty_like(wanted, dtype=torch.uint8)  # missed: w - q
        for start in range(0, columns, SLICE):
            stop = min(start + SLICE, columns)
            factor = self._slice(start, stop)
            part = torch.addmm(wanted[start:stop], factor[:start].t(), missed[:start])  # (stop - start, N)
            scale, zero = (each.t().contiguous() for each in grid.columns(group[start:stop]))  # (stop - start, N) each
            for j in range(stop - start):
                s, z = scale[j], zero[j]
                code = (torch.round(part[j] / s) + z).clamp_(0, top)
                if keep is not None:
                    code = torch.where(keep[:, self._order[start + j]], code, z)
                missed[start + j] = wanted[start + j] - (code - z) * s
                part[j + 1 :].addr_(factor[start + j, j + 1 :], missed[start + j])
                codes[start + j] = code
        inverse = torch.empty_like(self._order)
        inverse[self._order] = torch.arange(columns, device=codes.device)
        return codes[inverse].t()


def turned_factor(hessian: Tensor, order: Tensor, damping: float) -> tuple[Tensor, float]:
    """M of H' + d I = M Mᵀ, where H' is H (K, K) in an order, and the damping that it took.

    M is upper triangular; it comes turned by half a circle, so lower triangular, as it is computed: L = M.flip(0, 1).
    Inputs that are always zero count as 1. The damping is raised tenfold on failure.

    Raises:
        LinAlgError: not positive definite even with the whole mean diagonal added.
    """
    backward = order.flip(0)
    failed = torch.empty((), dtype=torch.int32, device=hessian.device)
    while True:
        turned = hessian[backward[:, None], backward].t()  # its own transpose, laid out to be factorized in place
        diagonal = turned.diagonal()
        diagonal[diagonal == 0] = 1
        diagonal.add_(damping * diagonal.mean())
        torch.linalg.cholesky_ex(turned, out=(turned, failed))
        if not failed:
            return turned, damping
        if damping >= 1:
            raise LinAlgError(f"its Hessian is not positive definite (order {int(failed)})")
        damping = min(1.0, damping * 10)
