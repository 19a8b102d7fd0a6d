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
FEW_TOKENS = 256  # below which statistics of a linear's inputs are called few


def place(
    model: LoadedModel, linear: BlockLinear, quantized: QuantizedWeight, context: Context, note: str = ""
) -> None:
    """Give the linear the weight that its codes stand for, and forget its statistics.

    Emits `linear`: its name, bits, group size, relative squared error of its output (of its weight where no text was
    read), tokens that were seen, a note where something unusual happened, and histograms before and after.
    """
    before, after = linear.weight.float(), quantized.dequantize().float()
    if linear.tokens and linear.tokens < FEW_TOKENS:
        note = note or f"only {linear.tokens} tokens reached it"
    audit: dict[str, JsonValue] = {
        "name": linear.name, "bits": quantized.bits, "group_size": quantized.group_size,
        "bits_per_weight": quantized.bits_per_weight(), "error": relative_error(before, after, linear.sample),
        "of": "weight" if linear.sample is None else "output", "tokens": linear.tokens, "note": note,
        "histogram": histogram(before, after),
    }  # fmt: skip
    if note:
        context.log(f"{linear.name}: {note}")
    context.emit("linear", audit)
    linear.weight.copy_(after)
    if quantized.inputs is not None:
        quantize_inputs(linear.module, quantized.inputs)
    model.quantized[linear.name] = quantized
    linear.hessian = linear.sample = None


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
