"""8-bit weights and 8-bit activations, after moving the activations' outliers into the weights.

SmoothQuant (Xiao et al., 2022, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
Models", arXiv 2211.10438), W8A8. Weights are easy to round to 8 bits, activations are not: a few channels are many
times larger than the others. Where a scale can be folded into the operation before (see `_fold.py`), channel j is
divided by

    s_j = max|X_j|^a / max|W_j|^(1 - a)

and the weights' column multiplied by it; a = 0.5 shares the difficulty evenly. Then weights get one scale a row and
inputs one a token, found as they come (`token`), or one that calibration fixed (`tensor`). Products are sums of
integers: with `torch._int_mm` both the prompt and each token are faster than in bfloat16.

The head, where it is chosen, has no operation before it that takes a scale: it is rounded without.

By hand, max|X| = (16, 1), max|W| = (1, 1), a = 0.5: s = (4, 1), and the inputs' maxima become (4, 1).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from engine.methods import Calibrated, Context, StoredBits
from engine.models import LoadedModel
from engine.observing import Block
from engine.packing import InputGrid, QuantizedWeight
from engine.quantize._fold import Fold, folds
from engine.quantize._grid import Beyond, round_to_nearest
from engine.quantize._place import ROWS, place, walk

TITLE = "SmoothQuant W8A8"
CHANGES = ("disk", "memory", "latency")
LEAST = 1e-5  # of the largest: maxima of channels and columns below this count as this


class Params(Beyond, Calibrated):
    """Settings of SmoothQuant."""

    strength: float = Field(0.5, ge=0.0, le=1.0, description="The a above: how much of the outliers weights take on.")
    activations: Literal["token", "tensor"] = Field(
        "token", description="One scale for each token as it comes, or one for all that calibration fixes."
    )

    def stored_bits(self, outputs: int, inputs: int) -> StoredBits:
        """A byte, and a scale a row."""
        return StoredBits(8, 16 / inputs)

    def rounds_inputs(self) -> bool:
        return True

    def unfit_for_experts(self) -> str:
        return "files cannot say that the inputs of experts are rounded."


def apply(model: LoadedModel, params: Params, context: Context) -> LoadedModel:
    """Fold the scales into every block, then round its weights and, from then on, their inputs."""
    for block in walk(model, context, params, "norm"):
        scales = smooth(block, params.strength)
        for linear in block.linears:
            context.check_cancelled()
            scale = scales.get(linear.name, torch.ones((), device=linear.weight.device))
            inputs = InputGrid()
            note = "" if linear.name in scales else "not smoothed: no operation before it takes the scale"
            if linear.input_max is None:
                note = "no token reached it; one scale a token"
            elif params.activations == "tensor":
                step = torch.tensor(float((linear.input_max / scale).max()) / 127.5, dtype=linear.weight.dtype)
                inputs = InputGrid(max(float(step), float(torch.finfo(step.dtype).tiny)))
            linear.sample = None if linear.sample is None else linear.sample / scale
            rounded = round_to_nearest(linear.weight, ROWS, linear.name, linear.weight.dtype)
            place(model, linear, with_inputs(rounded, inputs), context, note)
    return model


def with_inputs(weight: QuantizedWeight, inputs: InputGrid) -> QuantizedWeight:
    """The weight for inputs on a grid of their own."""
    return QuantizedWeight(weight.codes, weight.scale, weight.zero, weight.bits, weight.symmetric, inputs)


def smooth(block: Block, strength: float) -> dict[str, Tensor]:
    """Fold a scale into each place of the block; the scale of each linear's inputs by its name."""
    found: dict[str, Tensor] = {}
    for fold in folds(block, *block.batches[0]):
        readers = [reader for reader in fold.readers if reader.input_max is not None]
        if readers and not any(reader.name in found for reader in readers):
            exact = fold.spread(fold.apply(scale_for(fold, strength)))
            found |= dict.fromkeys((reader.name for reader in fold.readers), exact)
    return found


def scale_for(fold: Fold, strength: float) -> Tensor:
    """s (size,) of a fold, from the largest inputs and the largest weights of each channel."""
    inputs = next(reader.input_max for reader in fold.readers if reader.input_max is not None)
    ends = [end(reader.weight, 0).float().abs() for reader in fold.readers for end in (torch.amax, torch.amin)]
    weights = torch.stack(ends).amax(0)
    return smoothing(fold.gather(inputs), fold.gather(weights), strength)


def smoothing(inputs: Tensor, weights: Tensor, strength: float) -> Tensor:
    """max|X|^a / max|W|^(1 - a) of channels (size,)."""
    inputs, weights = (each.clamp(min=max(LEAST * float(each.max()), 1e-12)) for each in (inputs, weights))
    return inputs.pow(strength) / weights.pow(1 - strength)
