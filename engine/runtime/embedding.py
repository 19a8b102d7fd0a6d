"""Embeddings of 8 bits a number, with one scale for each token's row: a lookup unpacks the rows that it needs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.packing import QuantizedWeight

KERNEL = "int8-lookup"


class Int8Embedding(nn.Module):
    """The rows of W (V, H) for token ids of any shape (...): int8 codes times the row's scale, (..., H)."""

    codes: Tensor
    scale: Tensor

    def __init__(self, weight: QuantizedWeight, device: str = "cpu") -> None:
        super().__init__()
        codes = (weight.codes.to(torch.int16) - 128).to(torch.int8)
        self.register_buffer("codes", codes.to(device))
        self.register_buffer("scale", weight.scale.expand(codes.shape[0], 1).contiguous().to(device))

    def forward(self, ids: Tensor) -> Tensor:
        return self.codes[ids].to(self.scale.dtype) * self.scale[ids]
