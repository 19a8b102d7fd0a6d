"""Change the weights of a linear column by column, while the columns that follow make up for each error.

Rounding (GPTQ), zeros (SparseGPT) or both at once; all minimise |XW - XQ|² with the Hessian H = 2 X Xᵀ of calibration
inputs. With the upper triangular M of H = M Mᵀ, the error is the sum over the columns j of |((W - Q) M)_j|², in which
only the columns up to j appear. So each can be made small in turn, from

    part_j = w_j + sum over k < j of (w_k - q_k) M_kj / M_jj

which is the update of the papers, who read it from the upper Cholesky factor U of H⁻¹ (U = M⁻¹, so U_jj = 1 / M_jj).
As nothing is inverted, factorizing takes a quarter of the arithmetic, and happens in the memory of the Hessian. Columns
before a slice count at once, by products; within it, one by one.

Zeros are chosen slice by slice, all rows together, when the columns before the slice are done; with a pattern N:M
when the first of M columns comes. A zero at column j costs (v_j M_jj)², the saliency of optimal brain surgery for
columns in this order, where v is what the weights still to be solved are best at by then (`made_up`).

By hand, without rounding, half of two weights: w = (1, 2), M = [[1, 1], [0, 1]], saliencies 1 and 4, so w_0 becomes 0,
and w_1 = 2 + (1 - 0) * 1/1 = 3 makes up for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from engine.fit import SOLVED, SPAN
from engine.observing import STRIP, Block, BlockLinear, mirror, stretches
from engine.runtime.native.columns import solve_columns
from engine.sparsity import Pattern, by_magnitude, drop, span_of

SLICE = 128  # columns that are solved one by one, and from which zeros are chosen
PANEL = 512  # columns of a Hessian that are factorized at a time

Nearest = Callable[[int, Tensor, Tensor | None], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Levels:
    """Rounding of columns to the levels (code - zero) * scale of a grid, code 0..top.

    scale, zero: (G, N), or (G, 1) where all rows share them, in float32; group: (C,), that of each column.
    """

    scale: Tensor
    zero: Tensor
    group: Tensor
    top: int

    def __call__(self, j: int, wanted: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """As `Rounding.columns` says; what is kept are codes."""
        scale, zero = (each[j] for each in self._each)
        code = (torch.round(wanted / scale) + zero).clamp_(0, self.top)
        if keep is not None:
            code = torch.where(keep, code, zero)
        return code, (code - zero) * scale

    @functools.cached_property
    def _each(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of each column, (C, N): looked up at once, for a GPU would be waited for at each."""
        return self.scale[self.group], self.zero[self.group]


class Rounding(Protocol):
    """What a solved weight may be: the levels of a grid, or any number. dtype: of what is kept."""

    @property
    def dtype(self) -> torch.dtype: ...

    def rows(self, rows: slice) -> Rounding:
        """That of some rows of the weight."""

    def columns(self, columns: Tensor) -> Nearest:
        """A function of j, values (N,) wanted in `columns[j]`, and which to keep, None for all.

        It gives what is kept of them, of `dtype`, and the values that this stands for in float32.
        """


@dataclass(frozen=True)
class Anything:
    """No rounding: weights are zero or any number."""

    dtype: torch.dtype = torch.float32

    def rows(self, rows: slice) -> Anything:
        return self

    def columns(self, columns: Tensor) -> Nearest:
        def nearest(j: int, wanted: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
            values = wanted if keep is None else wanted * keep
            return values, values

        return nearest


@dataclass(frozen=True)
class Zeros:
    """How many weights become zero, and where: a fraction of each slice of columns, or N in each M inputs."""

    sparsity: float
    pattern: Pattern = "unstructured"

    @property
    def span(self) -> tuple[int, int] | None:
        """N and M of the pattern."""
        return span_of(self.pattern)

    @property
    def any(self) -> bool:
        return self.sparsity > 0 or self.pattern != "unstructured"

    def choose(self, scores: Tensor) -> Tensor:
        """False for the weights to drop among scores (C, N) of C columns: all of a slice, or the M of a pattern."""
        if self.span is not None:
            return drop(scores.t(), self.span[0]).t()
        return drop(scores.reshape(1, -1), round(self.sparsity * scores.numel())).view(scores.shape)

    def by_magnitude(self, weight: Tensor) -> Tensor:
        """False for the smallest weights (N, K): as many of the matrix, or N in each M inputs."""
        return by_magnitude(weight, self.sparsity, self.pattern)


class Solver:
    """Solves the linears that read one input, given its Hessian (K, K): ordered and factorized once, in its place.

    sort: columns with the largest inputs first. span: so many consecutive columns stay together.
    `damping` is what the factorization took; `importance` (K,) is H's diagonal.

    Raises:
        LinAlgError: the Hessian cannot be factorized.
    """

    def __init__(self, hessian: Tensor, damping: float, *, sort: bool, span: int = 1) -> None:
        self.importance = hessian.diagonal().clone()
        self._dead = self.importance == 0
        self._order = torch.arange(len(hessian), device=hessian.device)
        if sort:
            groups = torch.where(self._dead, 1, self.importance).view(-1, span)
            order = torch.argsort(groups.sum(1), descending=True, stable=True)
            self._order = self._order.view(-1, span)[order].flatten()
        self._turned, self.damping = turned_factor(hessian, self._order, damping)

    def solve(
        self, weight: Tensor, rounding: Rounding, keep: Tensor | None = None, zeros: Zeros | None = None
    ) -> Tensor:
        """What is kept of the weight (N, K), as `rounding` says; (N, K).

        Where `keep` (N, K) is False the weight becomes zero; these count among `zeros`.
        """
        zeros = zeros if zeros is not None and zeros.any else None
        found = torch.empty(weight.shape, dtype=rounding.dtype, device=weight.device)
        for rows in stretches(weight, SOLVED):
            kept = None if keep is None else keep[rows]
            found[rows] = self._solve(weight[rows], rounding.rows(rows), kept, zeros)
        return found

    def _part(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """M_kj / M_jj of the columns j from `start` to `stop` and all rows k before `stop`, (stop, C); M_jj (C, 1)."""
        size = len(self._turned)
        part = self._turned[size - stop :, size - stop : size - start].flip(0, 1)
        diagonal = part[start:].diagonal().clone()
        return part.div_(diagonal), diagonal[:, None]

    def _solve(self, weight: Tensor, rounding: Rounding, keep: Tensor | None, zeros: Zeros | None) -> Tensor:
        rows, columns = weight.shape
        # Transposed, so that a column is contiguous.
        missed = torch.empty(columns, rows, device=weight.device)  # w - q, in the order of solving
        found = torch.empty(columns, rows, dtype=rounding.dtype, device=weight.device)  # in that of the weight
        for begin in range(0, columns, SPAN):
            places = self._order[begin : begin + SPAN]
            wanted = weight[:, places].t().float().contiguous()  # (C, N)
            wanted[self._dead[places]] = 0  # inputs that are always zero: zero costs nothing
            kept = None if keep is None else keep[:, places].t()  # (C, N)
            factor, diagonal = self._part(begin, begin + len(places))
            so_far = torch.addmm(wanted, factor[:begin].t(), missed[:begin])
            for start in range(0, len(places), SLICE):
                some = slice(start, min(start + SLICE, len(places)))
                known = slice(begin, begin + start)
                part = torch.addmm(so_far[some], factor[known, some].t(), missed[known])
                solved, missed[begin:][some] = _columns(
                    wanted[some], part, factor[begin:][some, some], diagonal[some], rounding.columns(places[some]),
                    None if kept is None else kept[some], zeros,
                )  # fmt: skip
                found[places[some]] = solved.to(found.dtype)
        return found.t()


def _columns(
    wanted: Tensor, part: Tensor, factor: Tensor, diagonal: Tensor, nearest: Nearest, kept: Tensor | None,
    zeros: Zeros | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Solve columns (C, N) one by one, the columns before them in `part`, which is used up.

    Where they only go onto a grid, our own kernel does it.
    factor: M_kj / M_jj among them, (C, C); diagonal: M_jj, (C, 1). Gives what is kept, and w - q, of each.
    """
    if kept is None and zeros is None and isinstance(nearest, Levels):
        scale, zero = (each.expand(-1, wanted.shape[1]) for each in (nearest.scale, nearest.zero))
        at_once = solve_columns(wanted, part, factor, scale, zero, nearest.group, nearest.top)
        if at_once is not None:
            return at_once
    mask, span = kept, len(wanted)
    if zeros is not None:
        mask = torch.empty_like(part, dtype=torch.bool)
        span = span if zeros.span is None else zeros.span[1]
    missed, found = torch.empty_like(part), list[Tensor]()
    for j in range(len(wanted)):
        if zeros is not None and mask is not None and j % span == 0:
            some = slice(j, j + span)
            moved = made_up(wanted[some], part[some], factor[some, some])
            mask[some] = _choose(zeros, moved * diagonal[some], None if kept is None else kept[some])
        values, value = nearest(j, part[j], None if mask is None else mask[j])
        found.append(values)
        torch.sub(wanted[j], value, out=missed[j])
        part[j + 1 :].addr_(factor[j, j + 1 :], missed[j])
    return torch.stack(found), missed


def made_up(wanted: Tensor, part: Tensor, factor: Tensor) -> Tensor:
    """Columns (C, N) of the weight as they are best when the columns before them are done and none of these is.

    They make up for each other, too, which the `part` of each, that all before it are done, does not say: with
    e = w - moved, e_j + sum over k < j of e_k M_kj / M_jj = w_j - part_j. factor: M_kj / M_jj among them, (C, C).
    """
    error: Tensor = torch.linalg.solve_triangular(factor.t(), part - wanted, upper=False, unitriangular=True)
    return wanted + error


def _choose(zeros: Zeros, roots: Tensor, kept: Tensor | None) -> Tensor:
    """Which weights (C, N) to keep, given the roots of their saliencies; what is zero already comes first."""
    scores = roots.abs()
    if kept is None:
        return zeros.choose(scores)
    return zeros.choose(scores.masked_fill(~kept, -1)) & kept


def new_solver(
    linear: BlockLinear, block: Block, solvers: dict[str, Solver], damping: float, *, sort: bool, span: int = 1
) -> Solver:
    """The solver of a linear, put into `solvers` for those that read the same input; their Hessian is let go.

    Raises:
        LinAlgError: there is no Hessian, or it cannot be factorized.
    """
    if linear.hessian is None:
        raise LinAlgError("no token reached it")
    readers = [reader for reader in block.linears if reader.hessian is linear.hessian]
    solver = Solver(linear.hessian, damping, sort=sort, span=span)
    for reader in readers:
        reader.hessian = None
    solvers.update((reader.name, solver) for reader in readers if reader is not linear)
    return solver


def turned_factor(hessian: Tensor, order: Tensor, damping: float) -> tuple[Tensor, float]:
    """M of H' + d I = M Mᵀ, where H' is H (K, K) in an order, and the damping that it took.

    Of H what is below the diagonal need not be there. M is upper triangular; it comes turned by half a circle, so lower
    triangular, as it is computed: L = M.flip(0, 1). It takes the place of H in its memory. Inputs that are always zero
    count as 1. The damping is raised tenfold on failure.

    Raises:
        LinAlgError: not positive definite even with the whole mean diagonal added; H is as it was.
    """
    backward = order.flip(0)
    mirror(hessian)
    permute(hessian, backward)
    before = hessian.diagonal().clone()
    diagonal = torch.where(before == 0, 1, before)
    while True:
        hessian.diagonal().copy_(diagonal + damping * diagonal.mean())
        failed = factorize(hessian)
        if not failed:
            return hessian.tril_(), damping
        mirror(hessian)
        if damping >= 1:
            hessian.diagonal().copy_(before)
            permute(hessian, torch.argsort(backward))
            raise LinAlgError(f"its Hessian is not positive definite (order {failed})")
        damping = min(1.0, damping * 10)


def permute(matrix: Tensor, order: Tensor) -> None:
    """Bring the rows and the columns of a matrix (K, K) into an order, without a second one."""
    for start in range(0, len(matrix), STRIP):
        rows = matrix[start : start + STRIP]
        rows.copy_(rows[:, order])
    for start in range(0, len(matrix), STRIP):
        columns = matrix[:, start : start + STRIP]
        columns.copy_(columns[order])


def factorize(matrix: Tensor) -> int:
    """Cholesky's lower factor takes the place of a symmetric matrix (K, K); what is above the diagonal stays.

    Panel by panel, each from all that are left of it. Gives 0, or the first order that is not positive definite; the
    diagonal is lost then, too.
    """
    for start in range(0, len(matrix), PANEL):
        stop = min(start + PANEL, len(matrix))
        square, below, left = matrix[start:stop, start:stop], matrix[stop:, start:stop], matrix[start:stop, :start]
        lower, failed = torch.linalg.cholesky_ex(torch.addmm(square, left, left.t(), alpha=-1))
        if failed:
            return start + int(failed)
        square.copy_(square.triu(1) + lower)
        below.addmm_(matrix[stop:, :start], left.t(), alpha=-1)
        below.copy_(torch.linalg.solve_triangular(lower.t(), below, upper=True, left=False))
    return 0
