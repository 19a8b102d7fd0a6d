"""Put a quantized weight in its place, and say what became of the linear: the audit that the page shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from engine import shards
from engine.calibration import walk_blocks
from engine.errors import BadModel
from engine.methods import Context, Params
from engine.models import LoadedModel, embeddings, quantize_inputs
from engine.observing import Block, BlockLinear, Collect, stretches
from engine.packing import QuantizedWeight
from engine.quantize._grid import GridParams, round_to_nearest

Rows = Callable[[slice], Tensor]  # some rows of a weight
ROWS = GridParams.model_validate({"bits": 8, "granularity": "channel"})  # one scale for each row of the weight
BINS = 40
MOST_LEVELS = 64  # of a grid that a histogram can still show apart
FEW_TOKENS = 256  # below which statistics of a linear's inputs are called few; where it has many, a quarter of these


def walk(model: LoadedModel, context: Context, params: Params, collect: Collect = "nothing") -> Iterator[Block]:
    """The blocks of `walk_blocks`, the head where that was chosen; then the embeddings are rounded where they were.

    Raises:
        BadModel: the embeddings are of a kind that no file can hold in 8 bits.
    """
    if not params.beyond_blocks()[1]:
        yield from walk_blocks(model, context, params, collect)
        return
    name, module = embeddings(model.network)
    if type(module) is not nn.Embedding:
        raise BadModel(f"The embeddings of this family are a {type(module).__name__}; they can only stay as they are.")
    yield from walk_blocks(model, context, params, collect)
    _round_embeddings(model, name, module, context)


def _round_embeddings(model: LoadedModel, name: str, module: nn.Embedding, context: Context) -> None:
    saved = context.folder / "embeddings.safetensors"
    if saved.exists():
        shards.adopt(model, name, saved)
        return
    with model.opened(name):
        linear = BlockLinear(name, module)
        place(model, linear, round_to_nearest(linear.weight, ROWS, name, linear.weight.dtype), context)
        shards.write(model, [name], saved)
        shards.place(model, name, saved)


def place(
    model: LoadedModel, linear: BlockLinear, quantized: QuantizedWeight, context: Context, note: str = ""
) -> None:
    """Give the linear the weight that its codes stand for, and forget its statistics; emits `linear`."""
    if 0 < linear.tokens < max(FEW_TOKENS, linear.weight.shape[1] // 4):
        note += f"{'; ' if note else ''}only {linear.tokens} tokens reached it"

    def after(rows: slice) -> Tensor:
        return quantized.rows(rows.start, rows.stop).dequantize()

    stored = quantized.bits_per_weight()
    audit = describe(linear, after, quantized.bits, quantized.group_size, stored, levels(quantized), note)
    if note:
        context.log(f"{linear.name}: {note}")
    context.emit("linear", audit)
    for rows in stretches(linear.weight):
        linear.weight[rows] = after(rows)
    if quantized.inputs is not None:
        quantize_inputs(linear.module, quantized.inputs)
    model.quantized[linear.name] = quantized
    linear.hessian = linear.sample = None


def describe(
    linear: BlockLinear, after: Rows, bits: int, group_size: int, bits_per_weight: float, levels: list[float],
    note: str = "",
) -> dict[str, JsonValue]:  # fmt: skip
    """What became of a linear whose weight (N, K) becomes `after`, some rows at a time, as the event `linear` says it.

    name, bits, group_size, the number of weights, the bits stored for each with scales and zero points, the relative
    squared error `of` its output (of its weight where no text was read), tokens that were seen, a note where something
    unusual happened, and histograms before and after with the grid's `levels`.
    """
    return {
        "name": linear.name, "bits": bits, "group_size": group_size, "weights": linear.weight.numel(),
        "bits_per_weight": bits_per_weight, "error": relative_error(linear.weight, after, linear.sample),
        "of": "weight" if linear.sample is None else "output", "tokens": linear.tokens, "note": note,
        "histogram": {**histogram(linear.weight, after), "levels": list[JsonValue](levels)},
    }  # fmt: skip


def levels(quantized: QuantizedWeight) -> list[float]:
    """The values that codes stand for where the scale is the median one (each group has a grid of its own).

    Empty where they are more than `MOST_LEVELS`.
    """
    count = 2**quantized.bits
    if count > MOST_LEVELS:
        return []
    scale, place = quantized.scale.float().flatten().median(0)
    codes = torch.arange(count, device=scale.device) - quantized.zero.flatten()[place].float()
    found: list[float] = (codes * scale).tolist()
    return found


def relative_error(weight: Tensor, after: Rows, inputs: Tensor | None) -> float:
    """|(A - B) X|² / |B X|² of weights B before and A after (N, K), inputs X (tokens, K); without inputs of A and B."""
    change = size = 0.0
    for rows in stretches(weight):
        before = weight[rows].float()
        difference = after(rows).float() - before
        if inputs is not None:
            difference, before = difference @ inputs.t(), before @ inputs.t()
        change, size = change + float(difference.square().sum()), size + float(before.square().sum())
    return change / max(size, 1e-30)


def histogram(weight: Tensor, after: Rows) -> dict[str, JsonValue]:
    """Counts of weights before and after in `BINS` equal bins of the range before."""
    low, high = float(weight.min()), float(weight.max())
    low, high = (low, high) if high > low else (low - 1, low + 1)
    counts = torch.zeros(2, BINS, dtype=torch.int64)
    for rows in stretches(weight):
        for place, each in enumerate((weight[rows], after(rows))):
            counts[place] += torch.histc(each.flatten().float().clamp_(low, high), BINS, low, high).long().cpu()
    return {"low": low, "high": high, "before": counts[0].tolist(), "after": counts[1].tolist()}
