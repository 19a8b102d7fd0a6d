"""Second moments of calibration inputs with our own kernel: bfloat16 products, float32 sums."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.runtime.native.library import library


def add_second_moments(total: Tensor, inputs: Tensor, lengths: Tensor | None, *, keep: float, weight: float) -> bool:
    """Make `total` (K, K), float32, keep * total + weight * XᵀX on and above its diagonal, for inputs X (tokens, K).

    Each token is divided by its one of the `lengths` (tokens,), float32, and rounded to bfloat16 again.
    Below the diagonal, at most within 64 of it, `total` then holds what nobody should read. Says whether it was done:
    not where inputs are not bfloat16, or our kernels are not there.
    """
    if inputs.dtype != torch.bfloat16 or inputs.device.type != "cpu" or (kernels := library()) is None:
        return False
    assert total.dtype == torch.float32
    assert total.is_contiguous()
    inputs = inputs.contiguous()
    kernels.maquette_second_moments(
        inputs.data_ptr(), None if lengths is None else lengths.data_ptr(), *inputs.shape, keep, weight,
        total.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return True
