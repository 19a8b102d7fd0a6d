"""Give each linear the bits it needs: measure every linear once per option, then spend a budget where it counts.

Mixed precision under a budget, posed as in HAWQ-V3 (Yao et al., 2021, arXiv 2011.10680): the loss of a whole
assignment is taken as the sum of the losses of its parts, and the cheapest sum within the budget is looked for.
Better than equal bits of the same size where linears differ in how much they can bear.

1.  For each linear l and option o (bits and group size), the change of its output by rounding, relative to the
    output, from the second moments H of its inputs: e(l, o) = tr(D H Dᵀ) / tr(W H Wᵀ), over `EXAMINED` of its outputs.
2.  How much such a change costs the model: with only l rounded to `PROBE_BITS` bits, the KL divergence k(l) of the
    model's predictions from the original's. A small change of an output costs in proportion to its square, so
    o costs k(l) e(l, o) / e(l, probe).
3.  The assignment with the least total cost whose stored bits, scales and all, fit the budget: a multiple-choice
    knapsack, solved by dynamic programming over `CELLS` cells of the budget, and at a price for bits (Lagrange's
    multiplier); the better of the two is taken. The budget is never exceeded; one above the largest option counts as
    that. A budget of memory counts codes as kernels hold them, 2 to 4 bits in 4 and others in 8: a model that fits on
    the disk need not fit there.
4.  GPTQ with the grid that was chosen for each linear.

Steps 1 and 2 do not depend on the budget. They are kept, and another budget starts at step 3. The head, where it is
chosen, is one more linear under the same budget; embeddings are not, they have 8 bits. One block at a time is in
memory: step 2 lets what each rounded linear makes of a text pass the blocks after it beside the original's states.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, cast

import torch
from pydantic import Field, JsonValue
from torch import Tensor

from engine import branches, fit, perturbation, scores, sizes
from engine.calibration import token_rows, walk_blocks
from engine.errors import BadParams
from engine.headers import Shape
from engine.methods import Context, StoredBits, Survey
from engine.models import LoadedModel, blocks, embeddings, head, linears
from engine.observing import BlockLinear, stretches
from engine.processor import multiplies_bfloat16
from engine.quantize import gptq
from engine.quantize._grid import LEAST_RANGE, Beyond, Bits, GridParams, Range, round_to_nearest

TITLE = "Mixed precision"
CHANGES = ("disk", "memory", "latency")
WIDTHS: tuple[Bits, ...] = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
Unit = Literal["bits", "mib", "memory"]
UNITS = {"bits": "bits a weight", "mib": "MiB", "memory": "MiB of memory"}
HELD_BITS = (4, 8)  # bits of a code as kernels hold it
PROBE_BITS: Bits = 3
PROBE_ROWS, PROBE_LENGTH = 8, 256  # calibration sequences on which the KL of step 2 is taken, and their tokens
LARGE, FEWER = 1_000_000_000, 2  # of models with more parameters so many sequences: each linear is as much work
WEIGHED = 17  # bytes of a weight while an option is weighed: itself, its code, what it is off, and two products of that
HEADER, NAMED = 600, 5  # bytes at most that headers spend on a linear and its share of other tensors; times its name
EXAMINED = 1024  # outputs of a linear at most, evenly spaced, on which its options are weighed
COLUMNS = 1024  # of its inputs' second moments that are multiplied at a time
CELLS = 4000
VERSION = 4  # of what is kept; raise it when steps 1 or 2 change


class Params(gptq.SolverParams, Beyond, Range):
    """Settings of mixed precision: the budget, and those of GPTQ but for bits and groups, which are chosen."""

    budget: float = Field(3.5, gt=0.0, le=1e6, description="How much may be stored, scales included.")
    unit: Unit = Field(
        "bits", description="Of the budget: bits a quantized weight, or MiB of the whole model, on disk or in memory."
    )

    def budget_bits(self, weights: int, parameters: int, names: Collection[str], width: int = 16) -> float:
        """The budget in bits for each of `weights` to quantize among `parameters` in all, the rest of `width` bits.

        names: of the linears that have these weights, which the headers of files name.
        """
        if self.unit == "bits":
            return self.budget
        return (self.budget * 2**23 - self.other_bits(weights, parameters, names, width)) / weights

    def other_bits(self, weights: int, parameters: int, names: Collection[str], width: int) -> float:
        """Bits that are no codes, scales or zero points of these linears, and that a budget in MiB counts too."""
        headers = sum(HEADER + NAMED * len(name) for name in names) if self.unit == "mib" else 0
        return width * (parameters - weights) + 8 * headers

    def check_model(self, linears: Mapping[str, tuple[int, int]], parameters: int, width: int = 16) -> None:
        """Refuse linears that no group size divides, and a budget below the smallest options."""
        weights, least = 0, 0.0
        for name, (outputs, inputs) in linears.items():
            fitting = [size for size in GROUP_SIZES if inputs % size == 0]
            if not fitting:
                raise BadParams(
                    f"groups of {', '.join(map(str, GROUP_SIZES))} do not divide the {inputs} inputs of {name}. "
                    "Leave it out with ignore."
                )
            weights += outputs * inputs
            least += outputs * inputs * (self.width(WIDTHS[0]) + self.overhead(width) / max(fitting))
        if weights and least > self.budget_bits(weights, parameters, linears, width) * weights:
            smallest = least / weights
            if self.unit != "bits":
                smallest = (least + self.other_bits(weights, parameters, linears, width)) / 2**23
            raise BadParams(
                f"a budget of {self.budget:g} {UNITS[self.unit]} is below the smallest that is possible, "
                f"{math.ceil(smallest * 1000) / 1000:g}."
            )

    def stored_bits(self, outputs: int, inputs: int) -> StoredBits | None:
        """On average, where the budget says so: scales included; of a budget in MiB the model must be known (`on`)."""
        return StoredBits(min(self.budget, self.most()), 0) if self.unit == "bits" else None

    def on(self, shape: Shape, width: int) -> Params:
        """With the bits that the budget leaves each weight of this model."""
        if self.unit == "bits":
            return self
        found, parameters = sizes.chosen(shape, self), sizes.counted_parameters(shape, self, 8 * width)
        weights = sum(outputs * inputs for outputs, inputs in found.values())
        bits = self.budget_bits(weights, parameters, found, 8 * width) if weights else 0.0
        return _Known.model_validate(self.model_dump() | {"average": min(max(bits, 0.0), self.most(8 * width))})

    def most(self, width: int = 16) -> float:
        """Bits that the largest option stores for a weight."""
        return WIDTHS[-1] + (width if self.symmetric else width + WIDTHS[-1]) / GROUP_SIZES[0]

    def notes(self, shape: Shape, device: str) -> Sequence[str]:
        """That there is nothing to choose, where the budget allows the largest option everywhere."""
        said, largest = super().notes(shape, device), self.most()
        if self.unit != "bits" or self.budget < largest:
            return said
        return [
            *said,
            f"A budget from {largest:g} bits a weight on leaves nothing to choose: all get {WIDTHS[-1]} bits.",
        ]

    def survey(self, shape: Shape, width: int) -> Survey:
        """Steps 1 and 2: calibration once more; each linear in each option; the model read with each one rounded."""
        found = sizes.chosen(shape, self)
        length, vocabulary = min(self.sequence_length, PROBE_LENGTH), sizes.vocabulary_size(shape)
        rows = probe_rows(shape.parameters)
        options = sum(
            len(WIDTHS) * sum(inputs % size == 0 for size in GROUP_SIZES) * min(outputs, EXAMINED) * inputs * inputs
            for outputs, inputs in found.values()
        )
        calibration = 6.0 * self.samples * self.sequence_length * shape.parameters
        blocks_, head_ = sizes.blocks_of(shape.config), vocabulary * sizes.hidden_size(shape.config)
        passes = len(found) * (blocks_ + 1) / 2 + blocks_  # of a change all blocks from its own on, half on average
        passed = passes * (shape.parameters - head_) / blocks_ + (len(found) + 1) * head_
        reading = 2.0 * rows * length * passed
        largest = max((outputs * inputs for outputs, inputs in found.values()), default=0)
        weighing = WEIGHED * min(fit.SOLVED, largest)
        beside = fit.branching(shape, width, rows, length, len(found)) + weighing
        units = {branches.PASSES: passes, perturbation.PREDICTIONS: rows * length * (len(found) + 1)}
        return Survey(calibration + options + reading, weighing, beside, units)

    def width(self, bits: Bits) -> int:
        """Bits of a code as the budget counts them."""
        return next(held for held in HELD_BITS if bits <= held) if self.unit == "memory" else bits

    def counted(self, candidate: Candidate) -> Candidate:
        """The options with the bits that the budget counts."""
        options = [
            replace(option, stored=option.stored + candidate.weights * (self.width(option.bits) - option.bits))
            for option in candidate.options
        ]
        return replace(candidate, options=tuple(options))

    def unfit_for_experts(self) -> str:
        return "experts are stored with the same bits, all of them."

    def grid(self, bits: Bits, group_size: int) -> GridParams:
        """The grid of one option."""
        body = {"bits": bits, "group_size": group_size, "symmetric": self.symmetric, "clipping": self.clipping}
        return GridParams.model_validate(body)

    def overhead(self, width: int) -> int:
        """Bits that a group of the smallest codes stores beside them: a scale of `width` bits and any zero point."""
        return width if self.symmetric else width + WIDTHS[0]


class _Known(Params):
    """The settings for a model that is known. average: bits of a weight, as the budget counts them."""

    average: float

    def stored_bits(self, outputs: int, inputs: int) -> StoredBits:
        return StoredBits(self.average, 0, self.average if self.unit == "memory" else None)


@dataclass(frozen=True)
class Option:
    """A grid for one linear: the bits it stores in all, and what it is expected to cost in KL (nats)."""

    bits: Bits
    group_size: int
    stored: float
    cost: float


@dataclass(frozen=True)
class Candidate:
    """A linear with its weights' number and the options it has."""

    name: str
    weights: int
    options: tuple[Option, ...]


def apply(model: LoadedModel, params: Params, context: Context) -> LoadedModel:
    """Measure, choose, and quantize with GPTQ.

    Raises:
        BadParams: the budget is below the smallest assignment; the message names it.
    """
    candidates = from_json(
        scores.measured(
            model, context, "mixed", about(params), lambda kept: as_json(measure(model, params, context, kept))
        )
    )
    candidates = [params.counted(candidate) for candidate in candidates]
    weights = sum(candidate.weights for candidate in candidates)
    width, parameters = 8 * model.network.dtype.itemsize, model.parameters
    rows, columns = embeddings(model.network)[1].get_parameter("weight").shape
    if params.head and f"{head(model.network)[0]}.weight" in model.tied:
        parameters += rows * columns  # the two will part
    if params.embeddings:
        parameters -= sizes.saved_in_embeddings(rows, columns, width)
    budget = params.budget_bits(weights, parameters, [candidate.name for candidate in candidates], width)
    chosen = choose(candidates, budget)
    context.emit("budget", curve(candidates, budget))
    for name, option in chosen.items():
        context.log(f"{name}: {option.bits} bits in groups of {option.group_size}")

    def grid_of(name: str) -> GridParams:
        option = chosen[name]
        return params.grid(option.bits, option.group_size)

    return gptq.solve(model, params, context, grid_of)


def measure(model: LoadedModel, params: Params, context: Context, kept: scores.Pieces) -> list[Candidate]:
    """Steps 1 and 2: every selected linear with the cost of each option; what is `kept` is not measured again."""
    prefix, modules = blocks(model.network)
    named = [f"{prefix}.{number}.{path}" for number, module in enumerate(modules) for path, _ in linears(module)]
    names = [name for name in named if params.selects(name)] + [head(model.network)[0]] * params.head
    if not names or any(name not in kept for name in names):  # the walk says what is wrong where there are none
        for block in walk_blocks(model, context, params, params.collect, keep_blocks=False, known=kept):
            for linear in block.linears:
                context.check_cancelled()
                kept.of(linear.name, functools.partial(_weighed, linear, params))
                linear.hessian = linear.sample = None
    costs = probe_costs(model, params, context, names, kept)
    found = []
    for name in names:
        weights, options, probe = cast(tuple[int, list[tuple[Bits, int, float, float]], float], kept[name])
        each = [Option(bits, size, stored, costs[name] * error / probe) for bits, size, stored, error in options]
        found.append(Candidate(name, weights, tuple(each)))
    return found


def _weighed(linear: BlockLinear, params: Params) -> JsonValue:
    """How many weights a linear has, its options and the error of the probe, as they are kept."""
    options, probe = options_of(linear, params)
    return [linear.weight.numel(), [list(option) for option in options], probe]


def options_of(linear: BlockLinear, params: Params) -> tuple[list[tuple[Bits, int, float, float]], float]:
    """(bits, group size, stored bits, relative error) of each option of a linear, and the error of the probe."""
    moments, weight = linear.hessian, linear.weight
    importance = None if moments is None else moments.diagonal()
    fitting = [size for size in GROUP_SIZES if weight.shape[1] % size == 0]
    stored, errors = (dict.fromkeys(itertools.product(fitting, WIDTHS), 0.0) for _ in range(2))
    energy = 0.0
    examined = weight[:: -(-weight.shape[0] // EXAMINED)]
    for rows in stretches(examined, fit.SOLVED):
        some = examined[rows].float()
        energy += _energy(some, moments)
        for size, bits in stored:
            rounded = round_to_nearest(
                some, params.grid(bits, size), linear.name, weight.dtype, importance, LEAST_RANGE
            )
            stored[size, bits] = rounded.bits_per_weight() * weight.numel()
            errors[size, bits] += _energy(rounded.dequantize().float() - some, moments)
    options = [(bits, size, stored[size, bits], errors[size, bits] / energy) for size, bits in stored]
    probe = next(error for bits, _, _, error in options if bits == PROBE_BITS)
    return options, max(probe, 1e-30)


def _energy(weight: Tensor, moments: Tensor | None) -> float:
    """tr(W H Wᵀ) by half of the product, for H lies from its diagonal to the right; |W|² where no token was seen."""
    squares = weight.square().sum(0)  # (K,)
    if moments is None:
        return float(squares.sum().clamp(min=1e-30))
    total = -(squares * moments.diagonal()).sum(dtype=torch.float64)
    # Products of bfloat16 are many times faster, and what they round is nothing beside what is compared.
    narrow = weight.bfloat16() if weight.device.type == "cpu" and multiplies_bfloat16() else weight
    for start in range(0, len(moments), COLUMNS):
        columns = slice(start, start + COLUMNS)
        product = narrow[:, columns] @ moments[columns, columns].triu().to(narrow.dtype)
        product.addmm_(narrow[:, :start], moments[:start, columns].to(narrow.dtype))
        total += 2 * (product * weight[:, columns]).sum(dtype=torch.float64)
    return float(total.clamp(min=1e-30))


def probe_costs(
    model: LoadedModel, params: Params, context: Context, names: Sequence[str], kept: scores.Pieces
) -> dict[str, float]:  # fmt: skip
    """Step 2: the KL (nats a token) of the model's predictions when one linear alone is rounded to `PROBE_BITS`."""
    length = min(params.sequence_length, PROBE_LENGTH)
    rows = token_rows(model.tokenizer, context.calibration, length, probe_rows(model.parameters)).to(model.device)

    def rounded(name: str, weight: Tensor) -> Tensor:
        size = next(size for size in GROUP_SIZES if weight.shape[1] % size == 0)
        grid = params.grid(PROBE_BITS, size)
        return round_to_nearest(weight, grid, name, weight.dtype, least=LEAST_RANGE).dequantize()

    left = [name for name in names if f"{name} rounded" not in kept]
    for name, cost in perturbation.divergences(model, rows, left, rounded, context):
        kept.of(f"{name} rounded", functools.partial(max, cost, 1e-12))
    return {name: float(cast(float, kept[f"{name} rounded"])) for name in names}


def probe_rows(parameters: int) -> int:
    """Calibration sequences on which the KL of step 2 is taken, for a model of so many parameters."""
    return PROBE_ROWS if parameters <= LARGE else FEWER


def choose(candidates: Sequence[Candidate], budget: float) -> dict[str, Option]:
    """The option of each linear whose total cost is least within `budget` bits a weight on average.

    Raises:
        BadParams: even the smallest options need more.
    """
    weights = sum(candidate.weights for candidate in candidates)
    least = sum(min(option.stored for option in candidate.options) for candidate in candidates)
    if least > budget * weights:
        raise BadParams(f"{budget:g} bits a weight are below the smallest that is possible, {least / weights:.3f}.")
    ways = [way(candidates, budget * weights) for way in (_in_cells, _at_a_price)]
    return min(ways, key=lambda chosen: sum(option.cost for option in chosen.values()))


def _in_cells(candidates: Sequence[Candidate], budget: float) -> dict[str, Option]:
    """Dynamic programming over cells of the budget, in bits: all but exact for few linears."""
    cell = budget / CELLS
    # best[c]: the least cost of the linears so far in c cells; taken[i][c]: the option of linear i in it.
    best = torch.zeros(CELLS + 1, dtype=torch.float64)
    taken: list[Tensor] = []
    for candidate in candidates:
        totals = torch.full((len(candidate.options), CELLS + 1), torch.inf, dtype=torch.float64)
        for place, option in enumerate(candidate.options):
            cells = -int(-option.stored // cell)
            if cells <= CELLS:
                totals[place, cells:] = best[: CELLS + 1 - cells] + option.cost
        best, pick = totals.min(0)
        taken.append(pick)
    if not torch.isfinite(best[-1]):  # rounding up to cells left no room: the smallest options fit all the same
        return {c.name: min(c.options, key=lambda option: option.stored) for c in candidates}
    left, chosen = CELLS, {}
    for candidate, pick in zip(reversed(candidates), reversed(taken), strict=True):
        option = candidate.options[int(pick[left])]
        chosen[candidate.name] = option
        left -= -int(-option.stored // cell)
    return {candidate.name: chosen[candidate.name] for candidate in candidates}


def _at_a_price(candidates: Sequence[Candidate], budget: float) -> dict[str, Option]:
    """Each linear takes what is cheapest at a price for bits, the lowest that keeps the budget; what is left is spent
    where it saves most. All but exact for many linears, of which none is much of the whole (Everett, 1963).
    """
    most = max(len(candidate.options) for candidate in candidates)
    stored, costs = (torch.full((len(candidates), most), torch.inf, dtype=torch.float64) for _ in range(2))
    for row, candidate in enumerate(candidates):
        for place, option in enumerate(candidate.options):
            stored[row, place], costs[row, place] = option.stored, option.cost
    rows, low, high = torch.arange(len(candidates)), -40.0, 10.0  # of the price's logarithm: nats for a bit
    places = stored.argmin(1)
    for _ in range(60):
        middle = (low + high) / 2
        cheapest = (costs + 10**middle * stored).argmin(1)
        if float(stored[rows, cheapest].sum()) > budget:
            low = middle
        else:
            high, places = middle, cheapest
    while True:
        more, less = stored - stored[rows, places, None], costs[rows, places, None] - costs
        room = budget - float(stored[rows, places].sum())
        worth = torch.where((less > 0) & (more <= room), less / more.clamp(min=1e-9), -torch.inf).flatten()
        best = int(worth.argmax())
        if worth[best] == -torch.inf:
            return {c.name: c.options[int(place)] for c, place in zip(candidates, places, strict=True)}
        places[best // most] = best % most


def curve(candidates: Sequence[Candidate], budget: float) -> dict[str, JsonValue]:
    """The expected cost at a row of budgets and at this one, for the page's chart: bits a weight, KL in nats."""
    weights = sum(candidate.weights for candidate in candidates)
    least = sum(min(option.stored for option in candidate.options) for candidate in candidates) / weights
    points: list[JsonValue] = []
    for step in range(25):
        bits = least + (8.5 - least) * step / 24
        found = choose(candidates, bits * (1 + 1e-9)).values()
        points.append([sum(o.stored for o in found) / weights, sum(o.cost for o in found)])
    mine = choose(candidates, budget).values()
    uniform: list[JsonValue] = []
    for bits_, size in dict.fromkeys((o.bits, o.group_size) for c in candidates for o in c.options):
        same = [next((o for o in c.options if (o.bits, o.group_size) == (bits_, size)), None) for c in candidates]
        if all(same):
            uniform.append([bits_, size, sum(o.stored for o in same if o) / weights, sum(o.cost for o in same if o)])
    return {
        "points": points, "uniform": uniform,
        "chosen": [sum(o.stored for o in mine) / weights, sum(o.cost for o in mine)],
    }  # fmt: skip


def about(params: Params) -> dict[str, JsonValue]:
    """The settings that enter steps 1 and 2."""
    return {
        "version": VERSION, **params.asked(), "symmetric": params.symmetric, "clipping": params.clipping,
        "equal_tokens": params.equal_tokens, "targets": params.targets, "ignore": params.ignore,
        **({"head": True} if params.head else {}),
    }  # fmt: skip


def as_json(candidates: Sequence[Candidate]) -> JsonValue:
    """What is kept of candidates."""
    return [asdict(candidate) for candidate in candidates]


def from_json(found: JsonValue) -> list[Candidate]:
    """The candidates that `as_json` made a value of."""
    return [
        Candidate(body["name"], body["weights"], tuple(Option(**option) for option in body["options"]))
        for body in cast(list[dict[str, Any]], found)
    ]
