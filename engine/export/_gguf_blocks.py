"""The bytes of ggml's blocks, from the codes, scales and zero points that a solver found: nothing is rounded again.

Bytes of a block in order, d and m in f16; `low` are 4-bit codes two a byte, weight j beside j + 16; by hand, the codes
0 to 31 of a Q5_0 block have `low` 0x00 0x11 .. 0xFF, and `high`, their fifth bits from the lowest, 0xFFFF0000:

    Q4_0  d, low            Q5_0  d, high, low         Q8_0  d, codes as int8
    Q4_1  d, m, low         Q5_1  d, m, high, low
    Q2_K  16 x (scale, min) in 4 bits each, 2-bit codes, d, dmin
    Q3_K  third bits, 2-bit codes, 16 scales in 6 bits, d
    Q4_K  d, dmin, 8 x (scale, min) in 6 bits each, 4-bit codes      Q5_K  the same, fifth bits before the codes
    Q6_K  4-bit codes, their upper 2 bits, 16 scales in int8, d

As llama.cpp reads them (ggml-common.h, ggml-quants.c). In K-blocks all small scales are 1 here, and all small minima
the zero point.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from engine.export._gguf_types import Type
from engine.packing import QuantizedWeight

Packer = Callable[[Tensor, Tensor, Tensor], Tensor]


def exact(scale: Tensor, zero: Tensor, kind: Type) -> bool:
    """Whether scales, and minima where the type has any, are f16 numbers as they are."""
    if not _halves(scale.float()):
        return False
    return kind.minimum != "f16" or _halves(scale.float() * zero.float())  # 11 bits by 5: exact in float32


def _halves(numbers: Tensor) -> bool:
    return torch.equal(numbers.half().float(), numbers)


def blocks(weight: QuantizedWeight, kind: Type) -> Tensor:
    """uint8 (N, bytes of a row) of a weight (N, K) whose grid the type holds exactly."""
    rows, columns = weight.codes.shape
    each = (weight.group_size // kind.weights, columns // kind.weights)  # blocks of a group, and of a row
    spread = [part.expand(rows, -1).repeat_interleave(each[0], 1) for part in (weight.scale, weight.zero)]
    scale, zero = (part.reshape(-1, 1) for part in spread)  # (blocks, 1)
    codes = weight.codes.reshape(-1, kind.weights)
    if not kind.minimum:  # as it stands for signed numbers: 0 is the lowest
        codes = (codes.to(torch.int16) - zero.to(torch.int16) - kind.lowest).to(torch.uint8)
    packed = PACKERS[kind.name](codes, scale.float(), zero)
    assert packed.shape == (rows * each[1], kind.bytes)
    return packed.reshape(rows, -1)


def _half(numbers: Tensor) -> Tensor:
    """(B, 1) as the two bytes of an f16."""
    return numbers.half().contiguous().view(torch.uint8)


def _low(codes: Tensor) -> Tensor:
    """The lower 4 bits of codes (B, 32), j and j + 16 in a byte."""
    return (codes[:, :16] & 15) | ((codes[:, 16:] & 15) << 4)


def _bits(flags: Tensor) -> Tensor:
    """Numbers of one bit (B, 8 n) as n bytes, from the lowest bit."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return (flags.reshape(flags.shape[0], -1, 8) << shifts).sum(-1, dtype=torch.uint8)


def _q4_0(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return torch.cat([_half(scale), _low(codes)], 1)


def _q4_1(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return torch.cat([_half(scale), _half(-scale * zero), _low(codes)], 1)


def _q5_0(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return torch.cat([_half(scale), _bits(codes >> 4), _low(codes)], 1)


def _q5_1(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return torch.cat([_half(scale), _half(-scale * zero), _bits(codes >> 4), _low(codes)], 1)


def _q8_0(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return torch.cat([_half(scale), codes ^ 128], 1)  # from 0 .. 255 to the bytes of -128 .. 127


def _fours(codes: Tensor) -> Tensor:
    """2-bit codes (B, 256): of each half byte l has the codes l, l + 32, l + 64 and l + 96, from the lowest bits."""
    parts = (codes & 3).view(-1, 2, 4, 32) << torch.tensor([0, 2, 4, 6], dtype=torch.uint8).view(4, 1)
    return parts.sum(2, dtype=torch.uint8).view(-1, 64)


def _eighths(flags: Tensor) -> Tensor:
    """One bit of each code (B, 256): byte l has those of the codes l, l + 32, .., l + 224."""
    shifts = torch.arange(8, dtype=torch.uint8).view(8, 1)
    return (flags.view(-1, 8, 32) << shifts).sum(1, dtype=torch.uint8)


def _pairs(codes: Tensor) -> Tensor:
    """The lower 4 bits of codes (B, 256): of each 64 byte l has the codes l and l + 32."""
    parts = (codes & 15).view(-1, 4, 2, 32)
    return (parts[:, :, 0] | (parts[:, :, 1] << 4)).reshape(-1, 128)


def _sixes(zero: Tensor) -> Tensor:
    """Eight scales of 1 and eight minima (B, 1) below 64, in 6 bits each."""
    first = torch.ones_like(zero).expand(-1, 4)
    second = (zero | (zero >> 4 << 6)).expand(-1, 4)
    third = (1 | (zero << 4)).expand(-1, 4)
    return torch.cat([first, second, third], 1)


def _q2_k(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return torch.cat([(1 | (zero << 4)).expand(-1, 16), _fours(codes), _half(scale), _half(scale)], 1)


def _q3_k(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    ones = torch.tensor([0x11] * 8 + [0xAA] * 4, dtype=torch.uint8).expand(codes.shape[0], 12)  # 1 + 32, 16 times
    return torch.cat([_eighths(codes >> 2), _fours(codes), ones, _half(scale)], 1)


def _q4_k(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return torch.cat([_half(scale), _half(scale), _sixes(zero), _pairs(codes)], 1)


def _q5_k(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return torch.cat([_half(scale), _half(scale), _sixes(zero), _eighths(codes >> 4), _pairs(codes)], 1)


def _q6_k(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    parts = (codes & 15).view(-1, 2, 2, 64)  # of each half byte l has the codes l and l + 64
    low = (parts[:, :, 0] | (parts[:, :, 1] << 4)).reshape(-1, 128)
    ones = torch.ones(codes.shape[0], 16, dtype=torch.uint8)
    return torch.cat([low, _fours(codes >> 4), ones, _half(scale)], 1)


PACKERS: Mapping[str, Packer] = MappingProxyType(
    {
        "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_0": _q4_0, "Q4_K": _q4_k, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_K": _q5_k,
        "Q5_1": _q5_1, "Q6_K": _q6_k, "Q8_0": _q8_0,
    }
)  # fmt: skip
