"""Put a quantized weight in its place, and say what became of the linear: the audit that the page shows."""

from __future__ import annotations

import torch
from pydantic import JsonValue
from torch import Tensor

from engine.calibration import BlockLinear
from engine.methods import Context
from engine.models import LoadedModel, quantize_inputs
from engine.packing import QuantizedWeight

BINS = 40
MOST_LEVELS = 64  # of a grid that a histogram can still show apart
FEW_TOKENS = 256  # below which statistics of a linear's inputs are called few


def place(
    model: LoadedModel, linear: BlockLinear, quantized: QuantizedWeight, context: Context, note: str = ""
) -> None:
    """Give the linear the weight that its codes stand for, and forget its statistics; emits `linear`."""
    after = quantized.dequantize().float()
    if linear.tokens and linear.tokens < FEW_TOKENS:
        note = note or f"only {linear.tokens} tokens reached it"
    stored = quantized.bits_per_weight()
    audit = describe(linear, after, quantized.bits, quantized.group_size, stored, levels(quantized), note)
    if note:
        context.log(f"{linear.name}: {note}")
    context.emit("linear", audit)
    linear.weight.copy_(after)
    if quantized.inputs is not None:
        quantize_inputs(linear.module, quantized.inputs)
    model.quantized[linear.name] = quantized
    linear.hessian = linear.sample = None


def describe(
    linear: BlockLinear, after: Tensor, bits: int, group_size: int, bits_per_weight: float, levels: list[float],
    note: str = "",
) -> dict[str, JsonValue]:  # fmt: skip
    """What became of a linear whose weight (N, K) becomes `after`, as the event `linear` says it.

    name, bits, group_size, the number of weights, the bits stored for each with scales and zero points, the relative
    squared error `of` its output (of its weight where no text was read), tokens that were seen, a note where something
    unusual happened, and histograms before and after with the grid's `levels`.
    """
    before = linear.weight.float()
    return {
        "name": linear.name, "bits": bits, "group_size": group_size, "weights": before.numel(),
        "bits_per_weight": bits_per_weight, "error": relative_error(before, after, linear.sample),
        "of": "weight" if linear.sample is None else "output", "tokens": linear.tokens, "note": note,
        "histogram": {**histogram(before, after), "levels": list[JsonValue](levels)},
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


def relative_error(before: Tensor, after: Tensor, inputs: Tensor | None) -> float:
    """|(A - B) X|² / |B X|² of weights (N, K) for inputs (tokens, K); without inputs that of the weights alone."""
    difference = after - before
    if inputs is not None:
        difference, before = difference @ inputs.t(), before @ inputs.t()
    return float(difference.square().sum() / before.square().sum().clamp(min=1e-30))


def histogram(before: Tensor, after: Tensor) -> dict[str, JsonValue]:
    """Counts of weights before and after in `BINS` equal bins of the range before."""
    low, high = float(before.min()), float(before.max())
    low, high = (low, high) if high > low else (low - 1, low + 1)
    counts = [
        torch.histc(each.flatten(), BINS, low, high).long().cpu().tolist()
        for each in (before, after.clamp(low, high))
    ]  # fmt: skip
    return {"low": low, "high": high, "before": counts[0], "after": counts[1]}
