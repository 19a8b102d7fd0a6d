"""Integer codes of a weight and how they are packed: the one source that files and kernels are made from.

`QuantizedWeight` keeps what a solver found: codes, scales and zero points. Nothing here derives codes
from rounded weights. Packing follows compressed-tensors `pack-quantized`: element i of a row stands at
bit i*b of little-endian 32-bit words, dense across word boundaries, value stored as code with the
signed range shifted to start at 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from engine.errors import BadModel, short

Kind = Literal["int", "float"]
LARGEST_FLOAT8 = 448.0  # of float8_e4m3fn
CACHE_KEY = "maquette_kv_cache"  # of config.json


@dataclass(frozen=True)
class InputGrid:
    """8 bits for each input of a linear, symmetric: a scale for each token as it comes, or one fixed `scale`.

    kind: integers, or 8-bit floats (e4m3).

    The arithmetic is that of compressed-tensors, in the inputs' own dtype, so that strangers compute the same.
    """

    scale: float | None = None
    kind: Kind = "int"

    @property
    def levels(self) -> float:
        """The largest input over its scale."""
        return 127.5 if self.kind == "int" else LARGEST_FLOAT8

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Whole numbers -128..127, or 8-bit floats, in x's dtype and shape (..., K), and their scales (..., 1)."""
        if self.scale is None:
            scale = x.abs().amax(-1, keepdim=True) / self.levels
            scale = torch.where(scale == 0, torch.finfo(x.dtype).eps, scale)
        else:
            scale = torch.full_like(x[..., :1], self.scale)
        if self.kind == "float":
            clamped = (x / scale).clamp_(-LARGEST_FLOAT8, LARGEST_FLOAT8)
            return clamped.to(torch.float8_e4m3fn).to(x.dtype), scale
        return torch.round(x / scale).clamp_(-128, 127), scale

    def fake(self, x: Tensor) -> Tensor:
        """x rounded to the grid."""
        codes, scale = self.encode(x)
        return codes * scale


@dataclass(frozen=True)
class QuantizedWeight:
    """A linear's weight on a grid: w[n, k] = (codes[n, k] - zero[n, g]) * scale[n, g], g the group of k.

    codes: uint8 (N, K), 0 .. 2^bits - 1.
    scale: (N, G), in the dtype that is stored. G groups of K / G inputs; per tensor it is (1, 1).
    zero: uint8 of scale's shape; symmetric grids have 2^(bits - 1) everywhere.
    inputs: the grid of the linear's inputs, None where they stay as they are.
    kind: integers, or the bytes of 8-bit floats (e4m3), which know no zero point: w = float8(codes) * scale.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    symmetric: bool
    inputs: InputGrid | None = None
    kind: Kind = "int"

    @property
    def group_size(self) -> int:
        """Inputs that share one scale."""
        return self.codes.shape[1] // self.scale.shape[1]

    def dequantize(self) -> Tensor:
        """The weight (N, K) in the scale's dtype: the integer difference times the scale, rounded once."""
        rows, columns = self.codes.shape
        if self.kind == "float":
            return self.codes.view(torch.float8_e4m3fn).to(self.scale.dtype) * self.scale
        grouped = self.codes.view(rows, self.scale.shape[1], -1)  # (N, G, group_size)
        steps = grouped.to(torch.int16) - self.zero.to(torch.int16).unsqueeze(-1)
        return (steps.to(self.scale.dtype) * self.scale.unsqueeze(-1)).view(rows, columns)

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        """The rows `start` to `stop` of the weight; nothing is copied."""
        grid = slice(None) if self.scale.shape[0] == 1 else slice(start, stop)
        return replace(self, codes=self.codes[start:stop], scale=self.scale[grid], zero=self.zero[grid])

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The weight with its tensors on a device."""
        return replace(self, codes=self.codes.to(device), scale=self.scale.to(device), zero=self.zero.to(device))

    def bits_per_weight(self) -> float:
        """Stored bits per weight: codes, scales and, where the grid is asymmetric, zero points."""
        per_scale = self.scale.element_size() * 8 + (0 if self.symmetric else self.bits)
        return self.bits + per_scale * self.scale.numel() / self.codes.numel()


@dataclass(frozen=True)
class CacheGrid:
    """How a model holds keys and values while it generates: codes of `bits`, a scale and a low for each group.

    group_size: tokens (of keys) or channels (of values) that share a scale.
    window: the newest tokens that stay as they are, at least; groups are packed as soon as they are full beyond it.
    """

    bits: Literal[4, 8]
    group_size: int
    window: int

    @classmethod
    def read(cls, entry: object, name: str) -> CacheGrid:
        """The grid that config.json of the model `name` holds under `CACHE_KEY`.

        Raises:
            BadModel: it is none that we write.
        """
        if isinstance(entry, dict) and set(entry) == {"bits", "group_size", "window"}:
            bits, size, window = entry["bits"], entry["group_size"], entry["window"]
            if bits in (4, 8) and all(type(n) is int for n in (size, window)) and size > 0 and window >= 0:
                return cls(bits, size, window)
        raise BadModel(f"{short(name)}: config.json says {CACHE_KEY} = {short(entry)}; no such KV cache is known.")

    @property
    def label(self) -> str:
        """What they are called; `generate.cache_label` says how they are read, too."""
        return f"KV cache {self.bits} bit"

    def packed_tokens(self, tokens: int) -> int:
        """How many of `tokens` tokens are packed."""
        return max(0, tokens - self.window) // self.group_size * self.group_size

    def bytes(self, tokens: int, head_size: int, width: int) -> int:
        """Bytes of the keys and values of one head after `tokens` tokens; numbers that are not packed take `width`."""
        packed = self.packed_tokens(tokens)
        scales = 2 * packed * head_size // self.group_size  # of keys and of values
        return 2 * packed * head_size * self.bits // 8 + 2 * 2 * scales + 2 * (tokens - packed) * head_size * width


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes (N, K) below 2^bits into int32 (N, ceil(K * bits / 32)), dense along K.

    Example: bits=4, codes [[1, 2, 3, 4, 5, 6, 7, 8]] gives the word 0x87654321.
    """
    rows, columns = codes.shape
    words = -(-columns * bits // 32)
    if 8 % bits == 0:  # no code straddles a byte
        each = 8 // bits
        whole = torch.zeros(rows, words * 4 * each, dtype=torch.uint8)
        whole[:, :columns] = codes
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
        return (whole.view(rows, -1, each) << shifts).sum(-1, dtype=torch.uint8).view(torch.int32)
    # One row of single bits, least significant first, then bytes, then words.
    spread = (codes.to(torch.uint8).unsqueeze(-1) >> torch.arange(bits, dtype=torch.uint8)) & 1  # (N, K, bits)
    padded = torch.zeros(rows, words * 32, dtype=torch.uint8)
    padded[:, : columns * bits] = spread.reshape(rows, -1)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
    packed = (padded.view(rows, words * 4, 8) * weights).sum(-1, dtype=torch.uint8)  # (N, 4 * words)
    return packed.view(torch.int32)


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack`: uint8 codes (N, columns)."""
    rows = packed.shape[0]
    if 8 % bits == 0:  # no code straddles a byte
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
        spread = packed.contiguous().view(torch.uint8).unsqueeze(-1) >> shifts  # (N, bytes, codes of a byte)
        codes: Tensor = spread & (2**bits - 1)
        return codes.reshape(rows, -1)[:, :columns].contiguous()
    bytes_ = packed.contiguous().view(torch.uint8)  # (N, 4 * words)
    spread = (bytes_.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1
    spread = spread.view(rows, -1)[:, : columns * bits].reshape(rows, columns, bits)
    weights = torch.tensor([1 << i for i in range(bits)], dtype=torch.uint8)
    return (spread * weights).sum(-1, dtype=torch.uint8)
