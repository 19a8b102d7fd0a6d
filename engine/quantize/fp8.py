"""8-bit floating-point weights, and inputs if wanted: the e4m3 format of recent GPUs.

FP8 (Micikevicius et al., 2022, "FP8 Formats for Deep Learning", arXiv 2209.05433): a sign, 4 bits of exponent, 3 of
mantissa, up to 448. Each row of a weight is scaled so that its largest value becomes 448; with `activations` each
token's inputs are, too, as they come. No calibration. Relative precision is the same for large and small values, so
outliers harm less than with integers; weights of the same size are coarser than with 8-bit integers.

Files are half as large. With inputs in FP8 an NVIDIA GPU from compute capability 9.0 on multiplies both itself.
Elsewhere, and with weights alone, what computes is **simulated**: the values are those of FP8, the products are done in
bfloat16, so nothing is faster and memory does not shrink. Servers with FP8 kernels read the same files.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from engine.methods import Context, StoredBits
from engine.models import LoadedModel
from engine.observing import stretches
from engine.packing import LARGEST_FLOAT8, InputGrid, QuantizedWeight
from engine.quantize._grid import Beyond
from engine.quantize._place import place, walk

TITLE = "FP8"
CHANGES = ("disk",)


class Params(Beyond):
    """Settings of FP8."""

    activations: Literal["none", "token"] = Field(
        "none", description="Inputs as they are, or FP8 with a scale a token."
    )

    def stored_bits(self, outputs: int, inputs: int) -> StoredBits:
        """A byte, and a scale a row; in memory the 16 bits that compute."""
        return StoredBits(8, 16 / inputs, dense=16)

    def rounds_inputs(self) -> bool:
        return self.activations == "token"

    def unfit_for_experts(self) -> str:
        return "" if self.activations == "none" else "files cannot say that the inputs of experts are rounded."


def apply(model: LoadedModel, params: Params, context: Context) -> LoadedModel:
    """Round the linears of every block and, with `activations`, from then on their inputs; the head as they are."""
    inputs = InputGrid(kind="float") if params.activations == "token" else None
    for block in walk(model, context, params):
        for linear in block.linears:
            context.check_cancelled()
            place(model, linear, quantize_weight(linear.weight, inputs), context)
    return model


def quantize_weight(weight: Tensor, inputs: InputGrid | None = None) -> QuantizedWeight:
    """A weight (N, K) as 8-bit floats with one scale a row, stored in its dtype."""
    largest = torch.cat([weight[rows].abs().amax(1, keepdim=True) for rows in stretches(weight)])
    scale = (largest.float() / LARGEST_FLOAT8).to(weight.dtype)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for rows in stretches(weight):
        scaled = (weight[rows].float() / scale[rows].float()).clamp_(-LARGEST_FLOAT8, LARGEST_FLOAT8)
        codes[rows] = scaled.to(torch.float8_e4m3fn).view(torch.uint8)
    zero = torch.full_like(scale, 128, dtype=torch.uint8)
    return QuantizedWeight(codes, scale.contiguous(), zero, 8, True, inputs, "float")
