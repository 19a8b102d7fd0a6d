"""A linear that computes on packed weights with our own kernels.

Two layouts, both exact: w = (code - zero) * scale, and the zero points through the sum of a group's inputs.

    int4-amx, int4-avx512, int4-avx2    codes of 2 to 4 bits, 4 bits a weight
    int8-amx, int8-avx512, int8-avx2    codes of 5 to 8 bits, 8 bits a weight

Blocks of 16 rows lie side by side, so that 64 bytes are 8 (4) inputs of 16 rows and a lane sums a row. AVX-512
multiplies codes as whole bfloat16 numbers, and unpacks the weights some rows at a time into the cache where the inputs
have `MANY_ROWS` rows or more; AMX does the same by tiles of 16 rows of inputs. AVX2, and both of them for one row of
inputs, multiply whole numbers of 16 bits: inputs are such numbers times a power of two for 128 of them at most, which
changes none by more than a 128th of what bfloat16 rounds in the largest of them.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.packing import QuantizedWeight
from engine.runtime.native.library import Matrix, available, library

ROWS = 16  # of a block
# AMX: more than a tile has; AVX-512: measured on Zen 4; AVX2: rows that are taken at once.
MANY_ROWS = {"amx": 17, "avx512": 32, "avx2": 256}


def native_kernel(weight: QuantizedWeight, device: torch.device | str, dtype: torch.dtype) -> str | None:
    """The name of our kernel for `weight` and activations of `dtype`; None where there is none, or no library.

    Groups are multiples of 8 inputs (4 for more than 4 bits); rows of any number.
    """
    if torch.device(device).type != "cpu" or weight.kind == "float":
        return None
    if dtype != torch.bfloat16 or weight.scale.dtype != torch.bfloat16:
        return None
    stored = 4 if weight.bits <= 4 else 8
    processor = available()
    return None if processor is None or weight.group_size % (32 // stored) else f"int{stored}-{processor}"


class NativeLinear(nn.Module):
    """y = x W^T + bias with W packed: x (..., K) in bfloat16, y (..., N). Holds no dense weight.

    Raises:
        ValueError: our kernels do not know the weight, or are not there (ask `native_kernel` first).
    """

    packed: Tensor  # uint8, blocks of 16 rows: (N / 16, K / 8 or K / 4, 64)
    scales: Tensor  # (N / 16, groups, 16)
    zeros: Tensor | None  # int8 like scales, from the middle of the codes; None where all stand there
    bias: Tensor | None

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        kernel = native_kernel(weight, "cpu", torch.bfloat16)
        if kernel is None:
            raise ValueError(f"no kernel of ours for {weight.bits} bits in groups of {weight.group_size}")
        self.kernel = kernel
        self.many_rows = MANY_ROWS[kernel.partition("-")[2]]
        self.bits = weight.bits
        self.group = weight.group_size
        self.out_features, self.in_features = weight.codes.shape
        steps, zero = _centered(weight)
        self.register_buffer("packed", _pack_int4(steps) if self.bits <= 4 else _pack_int8(steps))
        self.register_buffer("scales", _by_block(weight.scale.expand(self.out_features, -1)))
        self.register_buffer("zeros", None if zero is None else _by_block(zero.expand(self.out_features, -1)))
        self.register_buffer("bias", None if bias is None else bias.detach().to("cpu", torch.bfloat16))

    def matrix(self) -> Matrix:
        """What the kernels read; it points into the buffers of this linear."""
        pointers = [None if part is None else part.data_ptr() for part in (self.scales, self.zeros, None, self.bias)]
        kind = Matrix.INT4 if self.bits <= 4 else Matrix.INT8
        return Matrix(kind, self.out_features, self.in_features, self.group, self.packed.data_ptr(), *pointers, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        """The product, weight by weight for few rows and through unpacked panels for many."""
        return multiply(self.matrix(), x, self.many_rows)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, kernel={self.kernel}"


def multiply(matrix: Matrix, x: Tensor, many: int | None = None) -> Tensor:
    """x (..., K) in bfloat16 times the matrix, (..., N); by panels from `many` rows on.

    Raises:
        ValueError: x is not bfloat16, or has other than K inputs.
    """
    if x.dtype != torch.bfloat16 or x.shape[-1] != matrix.columns:
        raise ValueError(f"inputs of {x.dtype}, {tuple(x.shape)} do not fit a kernel of {matrix.columns} bfloat16")
    kernels = library()
    assert kernels is not None
    x = x.contiguous()
    rows = x.numel() // matrix.columns
    y = x.new_empty(*x.shape[:-1], matrix.rows)
    product = kernels.maquette_multiply if many is None or rows < many else kernels.maquette_multiply_many
    product(ctypes.byref(matrix), x.data_ptr(), rows, y.data_ptr(), torch.get_num_threads())
    return y


def _centered(weight: QuantizedWeight) -> tuple[Tensor, Tensor | None]:
    """(int8 codes, int8 zero points or None), both from the middle: -8..7 where 4 bits store them, else -128..127.

    Where a code less its zero point fits the storage, that difference is stored and no zero point is needed.
    """
    codes = weight.codes.to(torch.int16)
    zero = weight.zero.to(torch.int16)
    if weight.bits not in (4, 8):
        grouped = codes.view(codes.shape[0], weight.scale.shape[1], -1)  # (N, groups, group)
        return (grouped - zero.unsqueeze(-1)).view_as(codes).to(torch.int8), None
    middle = 2 ** (weight.bits - 1)
    uneven = bool((zero != middle).any())
    return (codes - middle).to(torch.int8), (zero - middle).to(torch.int8) if uneven else None


def _whole_blocks(rows: Tensor) -> Tensor:
    """With rows of zeros at the end, up to whole blocks."""
    return F.pad(rows, (0, 0, 0, -rows.shape[0] % ROWS))


def _by_block(rows: Tensor) -> Tensor:
    """(N, n) as (N / 16, n, 16)."""
    whole = _whole_blocks(rows)
    return whole.view(-1, ROWS, rows.shape[1]).transpose(1, 2).contiguous()


def _pack_int4(steps: Tensor) -> Tensor:
    """int8 -8..7 (N, K) as (N / 16, K / 8, 64): two bytes hold inputs p, 2 + p, 4 + p and 6 + p of a row, p 0 or 1."""
    codes = (_whole_blocks(steps) + 8).to(torch.uint8).view(-1, ROWS, steps.shape[1] // 8, 4, 2)
    nibble = codes.permute(3, 0, 2, 1, 4)  # (4, N / 16, K / 8, 16, 2)
    pair = torch.stack((nibble[0] | nibble[1] << 4, nibble[2] | nibble[3] << 4), dim=-1)
    return pair.view(-1, steps.shape[1] // 8, 64)


def _pack_int8(steps: Tensor) -> Tensor:
    """int8 (N, K) as (N / 16, K / 4, 64): two inputs of each of 16 rows, then the two after them."""
    blocks = _whole_blocks(steps).view(-1, ROWS, steps.shape[1] // 4, 2, 2)
    return blocks.permute(0, 2, 3, 1, 4).contiguous().view(torch.uint8).view(-1, steps.shape[1] // 4, 64)
