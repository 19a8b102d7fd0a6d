"""Replace each linear by two smaller ones: its best approximation of low rank for the inputs that it really gets.

SVD-LLM (Wang et al., 2024, arXiv 2403.07378): with the Cholesky factor S of the inputs' second moments, X Xᵀ = S Sᵀ,
the singular values of W S are what truncation costs: |WX - W'X|² is the sum of the squares that are dropped. So
W' = U_r Σ_r V_rᵀ S⁻¹ is optimal, kept as `down` = √Σ_r V_rᵀ S⁻¹ (r, K) and `up` = U_r √Σ_r (N, r). Needs calibration
text, no training. Smaller and faster on any device; costs more quality than quantization to the same size, and is
best followed by distillation.

The ranks come from `ratio`, what remains of the selected linears' weights. `uniform`: the same share of each.
`water-filling`: what a linear loses is measured against its output's energy, and the singular values that save most
for each weight that they take are kept, wherever they are, until the size is reached; linears that would not become
smaller stay as they are, and the log says which. On the demo model at ratio 0.6 that is KL 0.003
against 0.29; with inputs as they are instead of scaled to length 1 it is 0.53, for the energy is then that of a few
tokens with massive activations. The singular values are kept: with another ratio the text is read once, not twice.

The file is in a format of Maquette's own (`engine.low_rank`); `export dense` writes matrices that anybody loads.
Zeros of earlier pruning steps are lost: a product has none.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from typing import Annotated, Literal, cast

import torch
from pydantic import Field, JsonValue
from torch import Tensor, nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from engine import methods, scores
from engine.calibration import Moments, walk_blocks
from engine.errors import BadParams
from engine.fields import RARE
from engine.low_rank import RANKS_KEY, empty_factors, pays
from engine.methods import Context, Selection
from engine.models import LoadedModel
from engine.observing import Block, BlockLinear
from engine.solver import turned_factor
from engine.sparsity import span_of

TITLE = "Low rank"
CHANGES = ("disk", "memory", "latency")
VERSION = 1  # of the singular values that are kept
SMALLEST_GROUP = 32  # of `quantize/mixed`, which chooses


class Params(Selection, Moments):
    """Settings of low rank: the size, how it is spread, the calibration."""

    ratio: float = Field(0.6, gt=0.0, lt=1.0, description="What remains of the linears' weights, as a fraction.")
    allocation: Annotated[Literal["water-filling", "uniform"], RARE] = Field(
        "water-filling", description="Where the weights go: where they save the most error, or equally everywhere."
    )
    multiple: Annotated[int, RARE] = Field(
        32, ge=1, le=512, description="Ranks are multiples of this: kernels and groups of later quantization want 32."
    )
    damping: Annotated[float, RARE] = Field(
        0.001, gt=0.0, le=1.0, description="Share of the mean diagonal that is added to X Xᵀ."
    )

    def unfit_for(self, name: str, later: methods.Params) -> str:
        """What cuts the two linears of one again, and groups of inputs that do not divide ranks."""
        if name in ("prune/width", "prune/low_rank"):
            return "it leaves two linears for one. Put it last of these."
        if name == "quantize/bitsandbytes":
            return "the library's files hold no linears of two. Use another quantization, or leave one out."
        size = getattr(later, "group_size", SMALLEST_GROUP if name == "quantize/mixed" else 1)
        if later.cache_grid() is not None or getattr(later, "granularity", "group") != "group":
            size = 1
        span = span_of(getattr(later, "pattern", "unstructured"))
        for needed in (size, span[1] if span else 1):
            if self.multiple % needed:
                return (
                    f"ranks are multiples of {self.multiple}, which groups of {needed} do not divide. "
                    f"Use multiple {needed}."
                )
        return ""

    def check_config(self, config: Mapping[str, JsonValue]) -> None:
        """Refuse a model whose linears are two each already."""
        if config.get(RANKS_KEY):
            raise BadParams("the model is of low rank already. Start from the one that prune/low_rank was applied to.")

    def check_model(self, linears: Mapping[str, tuple[int, int]], parameters: int, width: int = 16) -> None:
        """Refuse a ratio that leaves a linear less than the smallest rank."""
        groups = [linears] if self.allocation == "water-filling" else [{name: linears[name]} for name in linears]
        for group in groups:
            least = sum(_cost(self.multiple, shape) for shape in group.values())
            total = sum(outputs * inputs for outputs, inputs in group.values())
            if least >= total:
                raise BadParams(
                    f"a rank of {self.multiple} makes {next(iter(group))} no smaller. Use a smaller multiple, or leave "
                    "it out with `ignore`."
                )
            if least > self.ratio * total:
                raise BadParams(
                    f"ratio {self.ratio:g} leaves {next(iter(group))} no rank that is a multiple of {self.multiple}. "
                    f"Use a ratio from {math.ceil(1000 * least / total) / 1000:g} on, or a smaller multiple."
                )


def apply(model: LoadedModel, params: Params, context: Context) -> LoadedModel:
    """Choose the ranks, then factor the linears of every block."""
    chosen: dict[str, int] = {}
    if params.allocation == "water-filling":
        chosen = fill(*spectra(model, params, context), params.ratio, params.multiple)
    for block in walk_blocks(model, context, params, params.collect):
        _factor_block(model, block, params, context, chosen)  # apart, so that nothing of it stays
    return model


def _factor_block(
    model: LoadedModel, block: Block, params: Params, context: Context, chosen: Mapping[str, int]
) -> None:
    roots: dict[int, Tensor] = {}  # by Hessian: linears that read one input share it
    for linear in block.linears:
        context.check_cancelled()
        shape = (linear.weight.shape[0], linear.weight.shape[1])
        rank = chosen[linear.name] if chosen else uniform(shape, params.ratio, params.multiple)
        if not pays(rank, shape) or not rank:
            context.log(f"{linear.name}: left as it is, for two linears of that quality would not be smaller")
            continue
        root = _root(linear, params, context, roots)
        down, up = factors(linear.weight, root, rank)
        _replace(model, linear, down, up)
        model.pruned.discard(linear.name)
        model.sparse.discard(linear.name)
    for linear in block.linears:
        linear.hessian = linear.sample = None


def _replace(model: LoadedModel, linear: BlockLinear, down: Tensor, up: Tensor) -> None:
    assert not isinstance(linear.module, nn.Embedding)
    made = empty_factors(linear.module, down.shape[0])
    made.down.weight.data.copy_(down)
    made.up.weight.data.copy_(up)
    model.network.set_submodule(linear.name, made)


def _root(linear: BlockLinear, params: Params, context: Context, roots: dict[int, Tensor]) -> Tensor:
    """S (K, K) of a linear's inputs; the identity, and a log, where there is none."""
    if linear.hessian is None:
        context.log(f"{linear.name}: no token reached it, its own singular values decide")
        return torch.eye(linear.weight.shape[1], device=linear.weight.device)
    if id(linear.hessian) not in roots:
        try:
            roots[id(linear.hessian)] = root_of(linear.hessian, params.damping)
        except LinAlgError as error:
            context.log(f"{linear.name}: its own singular values decide, {error}")
            return torch.eye(linear.weight.shape[1], device=linear.weight.device)
    return roots[id(linear.hessian)]


def root_of(hessian: Tensor, damping: float) -> Tensor:
    """A triangular S of H + d I = S Sᵀ (K, K)."""
    order = torch.arange(len(hessian), device=hessian.device)
    return turned_factor(hessian, order, damping)[0].flip(0, 1).contiguous()


def factors(weight: Tensor, root: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`down` (r, K) and `up` (N, r) in float32 of a weight (N, K) whose inputs have the second moments S Sᵀ."""
    left, values, right = torch.linalg.svd(weight.float() @ root, full_matrices=False)  # (N, m), (m,), (m, K)
    share = values[:rank].sqrt()
    whitened = share[:, None] * right[:rank]  # down S, with S upper triangular
    down: Tensor = torch.linalg.solve_triangular(root, whitened, upper=True, left=False)
    return down, left[:, :rank] * share


def uniform(shape: tuple[int, int], ratio: float, multiple: int) -> int:
    """The largest rank, a multiple, with which two linears have at most that share of the weights of one (out, in)."""
    outputs, inputs = shape
    return int(ratio * outputs * inputs / (outputs + inputs)) // multiple * multiple


def spectra(
    model: LoadedModel, params: Params, context: Context
) -> tuple[dict[str, Tensor], dict[str, tuple[int, int]]]:  # fmt: skip
    """The squared singular values of W S of each linear as a share of its output's energy, and its (out, in)."""
    about = params.asked() | params.model_dump(include={"equal_tokens", "damping", "targets", "ignore"})
    found = scores.measured(
        model, context, "singular values", {"version": VERSION, **about}, lambda _: _spectra(model, params, context)
    )
    named = cast(dict[str, tuple[int, int, list[float]]], found)
    values = {name: torch.tensor(shares, dtype=torch.float64) for name, (_, _, shares) in named.items()}
    return values, {name: (outputs, inputs) for name, (outputs, inputs, _) in named.items()}


def _spectra(model: LoadedModel, params: Params, context: Context) -> dict[str, JsonValue]:
    """By linear: its outputs, its inputs and the shares of its output's energy, the largest first."""
    found: dict[str, JsonValue] = {}
    for block in walk_blocks(model, context, params, params.collect, keep_blocks=False):
        roots: dict[int, Tensor] = {}
        for linear in block.linears:
            context.check_cancelled()
            values = torch.linalg.svdvals(linear.weight.float() @ _root(linear, params, context, roots))
            squares = values.double().square().cpu()
            shares: list[JsonValue] = (squares / squares.sum().clamp(min=1e-30)).tolist()
            found[linear.name] = [*linear.weight.shape, shares]
        roots.clear()
        for linear in block.linears:
            linear.hessian = linear.sample = None
    return found


def fill(
    values: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]], ratio: float, multiple: int
) -> dict[str, int]:  # fmt: skip
    """Ranks by water-filling: steps of `multiple` singular values in the order of what they save for each weight.

    Every linear gets one step. From where two linears would not be smaller than the (out, in) matrix, the next step is
    the matrix itself: rank 0 says that the linear stays as it is. The total is at most `ratio` of all weights.

    Raises:
        BadParams: not even one step for each fits.
    """
    budget = ratio * sum(outputs * inputs for outputs, inputs in shapes.values())
    ranks = {name: multiple if pays(multiple, shape) else 0 for name, shape in shapes.items()}
    spent = sum(_cost(multiple, shape) for shape in shapes.values())
    if spent > budget:
        raise BadParams(f"ratio {ratio:g} leaves no rank that is a multiple of {multiple} for each linear.")
    heap: list[tuple[float, str, int, int]] = []  # saved for each weight, negative; name; the next rank; its cost

    def push(name: str) -> None:
        now, following = ranks[name], ranks[name] + multiple
        if now:
            last = not pays(following, shapes[name])
            saved = float(values[name][now:].sum() if last else values[name][now:following].sum())
            cost = _cost(following, shapes[name]) - _cost(now, shapes[name])
            heapq.heappush(heap, (-saved / max(cost, 1), name, 0 if last else following, cost))

    for name in values:
        push(name)
    while heap:
        _, name, rank, cost = heapq.heappop(heap)
        if spent + cost <= budget:
            spent, ranks[name] = spent + cost, rank
            push(name)
    return ranks


def _cost(rank: int, shape: tuple[int, int]) -> int:
    """Weights of two linears of that rank, or of the one of that (out, in) where these are fewer."""
    return rank * sum(shape) if pays(rank, shape) else shape[0] * shape[1]
