"""Quantize column by column and let the columns that follow make up for each rounding error.

GPTQ (Frantar et al., 2022, arXiv 2210.17323). Minimises |XW - XQ|² for each linear with the Hessian
H = 2 X Xᵀ of calibration inputs. Needs calibration text, no training; the best choice at 4 bits and
below among the weight-only schemes here that give all linears the same bits (`quantize/mixed` does not).

The weight is worked through column by column, in slices (`engine.solver`); the codes are those of the paper, read from
H itself instead of the Cholesky factor of H⁻¹ (Chen et al., 2025, "The Geometry of LLM Quantization: GPTQ as Babai's
Nearest Plane Algorithm", arXiv 2507.18553). By hand, with the grid of whole numbers, w = (0.6, 0.6) and the factor
M = [[1, -1], [0, 2]] of H = M Mᵀ: q_0 = 1 leaves -0.4, so w_1 counts as 0.6 + -0.4 * -1/2 = 0.8 and q_1 = 1.

Activation order is *static*: columns are solved in the order of falling H_jj, but every column keeps the
group, and so the scale, of its place in the row. Files need no index then, and kernels stay fast.
Tokens count alike: each input is scaled to length 1 before it enters H. Some tokens, the start token above all,
have activations tens of times larger (Sun et al., 2024, "Massive Activations in Large Language Models",
arXiv 2402.17762); unscaled, they decide the whole solution and the other tokens pay. On the demo model at 3
bits that is KL 0.0164 against 0.0218; the published objective is there with `equal_tokens` off.

With `sparsity` or a `pattern`, weights become zero in the same pass as the others are rounded (Frantar & Alistarh,
2023, arXiv 2301.00774, section 3.5): those whose removal costs least, in each slice of 128 columns, and the columns
that follow make up for zeros and rounding at once. Codes of zeros take the same bits, so the file is no smaller.
Zeros that an earlier pruning step made stay zeros and count among them; their rounding error is what they were moved
to. With a pattern, the M columns of a group stay together in activation order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Self, get_args

import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from engine import hardware, patterns, shards, solver
from engine.calibration import Moments
from engine.errors import short
from engine.fields import RARE, With
from engine.headers import Shape
from engine.methods import Context
from engine.models import LoadedModel
from engine.observing import Block, BlockLinear
from engine.packing import QuantizedWeight
from engine.quantize._grid import LEAST_RANGE, Bits, Clipping, Grid, GridParams, make_grid, round_to_nearest
from engine.quantize._place import place, walk
from engine.solver import Levels, Solver, Zeros
from engine.sparsity import Pattern, check_pattern

TITLE = "GPTQ"
CHANGES = ("disk", "memory", "latency")
DENSE = Zeros(0.0)


class SolverParams(Moments):
    """Settings of the solver, whatever the grid: the calibration, the order, the damping, and ranges by their error."""

    clipping: Annotated[Clipping, RARE] = Field(
        "mse", description="Narrow each range where that lowers the squared error (mse)."
    )
    activation_order: Annotated[bool, RARE] = Field(
        True, description="Solve the columns with the largest inputs first."
    )
    damping: Annotated[float, RARE] = Field(
        0.01, gt=0.0, le=1.0, description="Share of the mean diagonal that is added to H."
    )


class Params(SolverParams, GridParams):
    """Settings of GPTQ: the grid, the solver, and zeros that are chosen in the same pass."""

    sparsity: Annotated[float, RARE, With("pattern", "unstructured")] = Field(
        0.0, ge=0.0, lt=1.0, description="Fraction of weights set to zero meanwhile; with a pattern always half."
    )
    pattern: Annotated[Pattern, RARE] = Field(
        "unstructured", description="Where these zeros may fall: anywhere, or N in each M inputs."
    )
    PATTERNS: ClassVar[frozenset[str]] = GridParams.PATTERNS | {"overrides"}

    overrides: Annotated[str, RARE] = Field(
        "", max_length=2000, description="Other bits for some linears, the first that fits: `*.down_proj=8 *.0.*=6`."
    )

    @field_validator("overrides")
    @classmethod
    def _read(cls, value: str) -> str:
        for each in value.split():
            pattern, _, bits = each.rpartition("=")
            patterns.check(pattern)
            if not pattern or bits not in map(str, get_args(Bits)):
                raise ValueError(f"{short(each)} is no pattern with 2 to 8 bits, as in `*.down_proj=8`")
        return value

    def patterns(self) -> Mapping[str, Sequence[str]]:
        return {**super().patterns(), "overrides": [each.rpartition("=")[0] for each in self.overrides.split()]}

    def of(self, name: str) -> Self:
        """The settings for one linear: other bits where a pattern says so."""
        for each in self.overrides.split():
            pattern, _, bits = each.rpartition("=")
            if patterns.matches(pattern, name):
                return self.model_copy(update={"bits": int(bits)})
        return self

    def unfit_for_experts(self) -> str:
        return "experts are stored with the same bits, all of them." if self.overrides else super().unfit_for_experts()

    def check_model(self, linears: Mapping[str, tuple[int, int]], parameters: int, width: int = 16) -> None:
        """Refuse a group size or a pattern that does not divide a linear's inputs."""
        super().check_model(linears, parameters, width)
        check_pattern(self.pattern, linears)

    def notes(self, shape: Shape, device: str) -> Sequence[str]:
        """That zeros are codes as others are."""
        own = ["The zeros take as many bits as other weights; the file is no smaller for them."] * self.zeros.any
        return [*super().notes(shape, device), *own]

    @property
    def zeros(self) -> Zeros:
        """The zeros to be made."""
        return Zeros(self.sparsity, self.pattern)


def apply(model: LoadedModel, params: Params, context: Context) -> LoadedModel:
    """Quantize the linears of every block."""
    return solve(model, params, context, params.of, params.zeros)


def solve(
    model: LoadedModel, params: SolverParams, context: Context, grid_of: Callable[[str], GridParams],
    zeros: Zeros = DENSE,
) -> LoadedModel:  # fmt: skip
    """Quantize every linear on the grid that `grid_of` its name gives.

    One that cannot be solved is rounded to nearest, and the audit says so.
    """
    for block in walk(model, context, params, params.collect):
        for linear in _solve_block(model, block, params, context, grid_of, zeros):  # apart: nothing of it stays
            linear.bring_back(shards.dense(model.quantized[linear.name]))
    return model


def _solve_block(
    model: LoadedModel, block: Block, params: SolverParams, context: Context, grid_of: Callable[[str], GridParams],
    zeros: Zeros,
) -> list[BlockLinear]:  # fmt: skip
    """Gives the linears that are put aside, so that their memory is free for the largest Hessian, which comes last."""
    span = 1 if zeros.span is None else zeros.span[1]
    solvers: dict[str, Solver] = {}
    aside: list[BlockLinear] = []
    for linear in block.linears:
        context.check_cancelled()
        weight, dtype, grid = linear.weight, linear.weight.dtype, grid_of(linear.name)
        keep = weight != 0 if linear.name in model.pruned else None
        note = ""
        try:
            found = solvers.pop(linear.name, None) or solver.new_solver(
                linear, block, solvers, params.damping, sort=params.activation_order, span=span
            )
            quantized = quantize(found, weight, grid, linear.name, dtype, keep, zeros)
            if found.damping != params.damping:
                note = f"damping raised from {params.damping:g} to {found.damping:g}"
        except LinAlgError as error:
            note = f"rounded to nearest instead, {error}"
            if zeros.any:
                note = f"rounded to nearest instead, the smallest weights set to zero, {error}"
                weight = weight * zeros.by_magnitude(weight)
            quantized = round_to_nearest(weight, grid, linear.name, dtype)
        place(model, linear, quantized, context, note)
        del weight
        if linear.put_aside():
            aside.append(linear)
        hardware.give_back_memory(collect=False)
        if zeros.any:
            model.pruned.add(linear.name)
    return aside


def quantize(
    solver: Solver, weight: Tensor, params: GridParams, name: str, dtype: torch.dtype, keep: Tensor | None = None,
    zeros: Zeros = DENSE,
) -> QuantizedWeight:  # fmt: skip
    """The weight (N, K) solved on the grid of `params`; scales are stored in `dtype`.

    Where `keep` (N, K) is False, the weight becomes zero; these count among the `zeros`.
    """
    grid = make_grid(weight, params, name, dtype, solver.importance, LEAST_RANGE)
    return grid.quantized(solver.solve(weight, OnGrid(grid, weight.shape[1]), keep, zeros))


@dataclass(frozen=True)
class OnGrid:
    """Rounding to the levels of a grid over `size` columns; what is kept are codes."""

    grid: Grid
    size: int
    dtype: torch.dtype = torch.uint8

    def rows(self, rows: slice) -> OnGrid:
        """That of some rows."""
        return OnGrid(self.grid.rows(rows), self.size)

    def columns(self, columns: Tensor) -> Levels:
        """As `engine.solver.Rounding` says."""
        group = columns // (self.size // self.grid.scale.shape[1])
        return Levels(*self._turned, group, 2**self.grid.bits - 1)

    @functools.cached_property
    def _turned(self) -> tuple[Tensor, Tensor]:
        """Scales and zero points as (G, N), or (G, 1), in float32."""
        return self.grid.scale.t().float().contiguous(), self.grid.zero.t().float().contiguous()
