"""Columns of a weight solved one after another on a grid, with our own kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.runtime.native.library import library


def solve_columns(
    wanted: Tensor, part: Tensor, factor: Tensor, scale: Tensor, zero: Tensor, group: Tensor, top: int
) -> tuple[Tensor, Tensor] | None:
    """Codes (C, N), uint8, and what they miss of `wanted` (C, N), float32; None where our kernel is not there.

    Each column j counts as part_j + sum over k < j of missed_k factor_kj, and is rounded to the nearest of the levels
    (code - zero) * scale, code 0..top, of its group. part: (C, N); factor: (C, C); scale, zero: (G, N); group: (C,).
    """
    if wanted.device.type != "cpu" or (kernels := library()) is None:
        return None
    columns, rows = wanted.shape
    codes, missed = torch.empty(columns, rows, dtype=torch.uint8), torch.empty(columns, rows)
    given = [each.contiguous() for each in (wanted, part, factor.t(), scale, zero, group)]
    kernels.maquette_solve_columns(
        *(each.data_ptr() for each in given), columns, rows, top, codes.data_ptr(), missed.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return codes, missed
