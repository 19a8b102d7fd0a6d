"""Put a quantized weight in its place, and say what became of the linear: the audit that the page shows."""

from __future__ import annotations

import torch
from pydantic import JsonValue
from torch import Tensor

from engine.calibration import BlockLinear
from engine.methods import Context
from engine.models import LoadedModel, quantize_inputs
from engine.packing import QuantizedWeight
from engine.quantize._grid import stretches

BINS = 40
FEW_TOKENS = 256  # below which statistics of a linear's inputs are called few


def place(
    model: LoadedModel, linear: BlockLinear, quantized: QuantizedWeight, context: Context, note: str = ""
) -> None:
    """Give the linear the weight that its codes stand for, and forget its statistics.

    Emits `linear`: its name, bits, group size, relative squared error of its output (of its weight where no text was
    read), tokens that were seen, a note where something unusual happened, and histograms before and after.
    """
    if linear.tokens and linear.tokens < FEW_TOKENS:
        note = note or f"only {linear.tokens} tokens reached it"
    audit: dict[str, JsonValue] = {
        "name": linear.name, "bits": quantized.bits, "group_size": quantized.group_size,
        "bits_per_weight": quantized.bits_per_weight(),
        "error": relative_error(linear.weight, quantized, linear.sample),
        "of": "weight" if linear.sample is None else "output", "tokens": linear.tokens, "note": note,
        "histogram": histogram(linear.weight, quantized),
    }  # fmt: skip
    if note:
        context.log(f"{linear.name}: {note}")
    context.emit("linear", audit)
    for rows in stretches(linear.weight):
        linear.weight[rows] = quantized.rows(rows.start, rows.stop).dequantize()
    if quantized.inputs is not None:
        quantize_inputs(linear.module, quantized.inputs)
    model.quantized[linear.name] = quantized
    linear.hessian = linear.sample = None


def relative_error(weight: Tensor, quantized: QuantizedWeight, inputs: Tensor | None) -> float:
    """|(A - B) X|² / |B X|² of quantized A and original B (N, K), inputs X (tokens, K); without inputs of A and B."""
    change = size = 0.0
    for rows in stretches(weight):
        before, after = weight[rows].float(), quantized.rows(rows.start, rows.stop).dequantize().float()
        difference = after.sub_(before)
        if inputs is not None:
            difference, before = difference @ inputs.t(), before @ inputs.t()
        change, size = change + float(difference.square().sum()), size + float(before.square().sum())
    return change / max(size, 1e-30)


def histogram(weight: Tensor, quantized: QuantizedWeight) -> dict[str, JsonValue]:
    """Counts of weights before and after in `BINS` equal bins of the range before."""
    low, high = float(weight.min()), float(weight.max())
    low, high = (low, high) if high > low else (low - 1, low + 1)
    counts = torch.zeros(2, BINS, dtype=torch.int64)
    for rows in stretches(weight):
        after = quantized.rows(rows.start, rows.stop).dequantize()
        for place, each in enumerate((weight[rows], after)):
            counts[place] += torch.histc(each.flatten().float().clamp_(low, high), BINS, low, high).long().cpu()
    return {"low": low, "high": high, "before": counts[0].tolist(), "after": counts[1].tolist()}
