"""Weights with many zeros on disk: one bit for each weight, and the values of those that are not zero.

    <name>.weight_bitmask   uint8 (N, ceil(K / 8)), bit k % 8 of byte k // 8 says whether weight k of the row is stored
    <name>.weight_values    these weights, row after row, in the model's dtype
    <name>.weight_shape     int64 (2): N and K
    <name>.weight           a tensor without numbers, shape (0,)

The last is there for readers who do not know the format: they find a weight of the wrong shape and refuse the folder,
where they would fill in random weights for a missing one. N and K are the dimensions of the tensor as it is stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

SPARSE_KEY = "maquette_sparse"  # of config.json
FORMAT = "bitmask"
MASK, VALUES, SHAPE = "weight_bitmask", "weight_values", "weight_shape"


def packed_bytes(weight: Tensor) -> int:
    """Bytes that a weight (N, K) takes in this format."""
    rows, columns = weight.shape
    return rows * -(-columns // 8) + int(torch.count_nonzero(weight)) * weight.element_size() + 16


def pack_bitmask(weight: Tensor) -> dict[str, Tensor]:
    """The tensors of a weight (N, K), by the last part of their names. Example: (0, 2, 0, 3) is 0b1010 and (2, 3)."""
    rows, columns = weight.shape
    kept = weight != 0
    whole = torch.zeros(rows, -(-columns // 8) * 8, dtype=torch.uint8)
    whole[:, :columns] = kept
    mask = (whole.view(rows, -1, 8) << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    return {
        "weight": weight.new_empty(0), MASK: mask, VALUES: weight[kept],
        SHAPE: torch.tensor(weight.shape, dtype=torch.int64),
    }  # fmt: skip


def unpack_bitmask(mask: Tensor, values: Tensor, shape: Tensor) -> Tensor:
    """The inverse of `pack_bitmask`.

    Raises:
        ValueError: the parts do not fit each other.
    """
    rows, columns = shape.tolist() if shape.shape == (2,) else (-1, -1)
    if mask.dtype != torch.uint8 or mask.shape != (rows, -(-columns // 8)) or values.dim() != 1:
        raise ValueError(f"a bitmask of shape {tuple(mask.shape)} does not fit a weight of {rows} x {columns}")
    spread = (mask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1  # (N, bytes, 8)
    kept = spread.view(rows, -1)[:, :columns].bool()
    if int(kept.sum()) != values.numel():
        raise ValueError(f"the bitmask has {int(kept.sum())} bits set, there are {values.numel()} values")
    weight = values.new_zeros(rows, columns)
    weight[kept] = values
    return weight
