"""Linears that compute on packed integer weights, and the kernels they use.

Decoding reads every weight once for each token, so its time is the time of the bytes. Where our own kernels
(`native/`) are at hand they compute; elsewhere, and on GPUs, torch's do, in three layouts:

    int4pack-cpu    torch's CPU kernel of 4-bit codes, bfloat16 activations, groups of 32 to 256 inputs
    int8pack-cpu    torch's CPU kernel of 8-bit codes with one scale a row
    int4pack-cuda   torch's CUDA kernel of 4-bit codes ("tinygemm"), bfloat16 activations

Codes of 2 and 3 bits stand in 4-bit storage, those of 5 to 7 in 8-bit storage: files are smaller than memory
then. Codes of more than 4 bits with groups or zero points are two 4-bit halves, code = 16 * high + low, laid
side by side along the inputs: one product with the activations repeated, 8 bits a weight. Groups that no
kernel knows are split into smaller ones with repeated scales.

The 4-bit kernels compute w = (code - 8) * scale + zero with float32 sums. Scales are stored in bfloat16
and enter exactly. `zero` is (8 - zero_point) * scale: exactly 0 on symmetric grids and, after shifting the
codes, on all grids of 2 and 3 bits; split over the two halves it is exact for 8 bits; on asymmetric grids
of 4 bits it is rounded to bfloat16 (measured: relative error of a product 0.0020, dense bfloat16 0.0019).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from engine import wide
from engine.packing import QuantizedWeight
from engine.runtime.native.library import Matrix, available
from engine.runtime.native.linear import NativeLinear, multiply, native_kernel
from engine.runtime.pages import give_back

Kernel = Literal["int4pack-cpu", "int8pack-cpu", "int4pack-cuda"]
INT8 = "int8-int8"
GROUP_SIZES = (256, 128, 64, 32)
SIMULATED = "simulated: dense {dtype}"

# From this many rows on a product is bound by arithmetic, and unpacking a stretch of weights to bfloat16 for the dense
# kernel is faster than the integer kernels (measured on Zen 4, two cores: 4 bits, one scale a row, halves).
MANY_ROWS_INT4, MANY_ROWS_INT8, MANY_ROWS_HALVES = 80, 24, 40
MANY_ROWS_INT8_INT8 = {"amx": 17, "avx512": 17, "avx2": 48}  # from here on our own kernel orders the weights by panels
AMPERE = (8, 0)  # the oldest GPUs that torch compiles its 4-bit kernel for
STRETCH_BYTES = 1 << 21  # of unpacked weights at a time: they stay in the cache


def packed_linear(
    weight: QuantizedWeight, bias: Tensor | None, device: torch.device | str, dtype: torch.dtype
) -> NativeLinear | PackedLinear | None:
    """The linear that computes on `weight` for activations of `dtype`; None where no kernel knows it."""
    if native_kernel(weight, device, dtype) is not None:
        return NativeLinear(weight, bias)
    return PackedLinear(weight, bias, device) if kernel_for(weight, device, dtype) is not None else None


def kernel_for(weight: QuantizedWeight, device: torch.device | str, dtype: torch.dtype) -> Kernel | None:
    """torch's kernel that computes with `weight` on `device` for activations of `dtype`; None where there is none."""
    rows, columns = weight.codes.shape
    kind = torch.device(device).type
    if weight.kind == "float":
        return None
    if dtype != torch.bfloat16 or weight.scale.dtype != torch.bfloat16:
        return None
    if kind == "cpu" and weight.bits > 4 and weight.symmetric and weight.scale.shape[1] == 1:
        return "int8pack-cpu"
    if _kernel_group(weight.group_size) is None:
        return None
    if kind == "cpu" and rows % 16 == 0:
        return "int4pack-cpu"
    if kind == "cuda" and rows % 8 == 0 and columns % 128 == 0 and torch.cuda.get_device_capability(device) >= AMPERE:
        return "int4pack-cuda"
    return None


@dataclass(frozen=True)
class _Int4:
    """What a 4-bit kernel reads: codes 0..15 (N, K'), scales and zero terms (N, K' / group), K' = K or 2K."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    group: int

    @property
    def scales_and_zeros(self) -> Tensor:
        """(K' / group, N, 2), as both kernels want it."""
        return torch.stack([self.scale.T, self.zero.T], dim=-1).to(torch.bfloat16).contiguous()


class PackedLinear(nn.Module):
    """y = x W^T + bias with W packed for torch's kernels: x (..., K), y (..., N). Holds no dense weight.

    Raises:
        ValueError: no kernel of this device can compute with the weight (ask `kernel_for` first).
    """

    packed: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None = None, device: torch.device | str = "cpu") -> None:
        super().__init__()
        kernel = kernel_for(weight, device, torch.bfloat16)
        if kernel is None:
            raise ValueError(f"no kernel for {weight.bits} bits in groups of {weight.group_size} on {device}")
        self.kernel: Kernel = kernel
        self.bits = weight.bits
        self.out_features, self.in_features = weight.codes.shape
        self.group = 0
        self._product = _product(kernel)
        self.halves = False
        if kernel == "int8pack-cpu":
            packed = (weight.codes.to(torch.int16) - 2 ** (weight.bits - 1)).to(torch.int8)
            scales = weight.scale.expand(self.out_features, 1).reshape(-1).contiguous()
        else:
            layout = _int4_layout(weight)
            self.group = layout.group
            self.halves = weight.bits > 4
            packed, scales = _pack_int4(layout.codes, kernel, device), layout.scales_and_zeros
        self.register_buffer("packed", packed.to(device))
        self.register_buffer("scales", scales.to(device))
        self.register_buffer("bias", None if bias is None else bias.detach().to(device, torch.bfloat16))
        self.many_rows: int | None = None
        if kernel == "int8pack-cpu":
            self.many_rows = MANY_ROWS_INT8
        elif kernel == "int4pack-cpu" and _knows_layout(self.out_features):
            self.many_rows = MANY_ROWS_HALVES if self.halves else MANY_ROWS_INT4

    def forward(self, x: Tensor) -> Tensor:
        """The product, by the integer kernel for few rows and through dense stretches for many."""
        rows = x.reshape(-1, self.in_features)  # (M, K)
        if self.many_rows is not None and rows.shape[0] >= self.many_rows:
            y = self._many(rows)
        elif self.kernel == "int8pack-cpu":
            y = torch._weight_int8pack_mm(rows.contiguous(), self.packed, self.scales)
        else:
            wide = torch.cat((rows, rows), dim=1) if self.halves else rows.contiguous()  # (M, K')
            y = self._product(wide, self.packed, self.group, self.scales)
        if self.bias is not None:
            y = y + self.bias
        return y if x.dim() == 2 else y.view(*x.shape[:-1], self.out_features)

    def _many(self, rows: Tensor) -> Tensor:
        """`rows` (M, K) times W^T, a stretch of W's rows at a time so that the dense copy stays small."""
        y = rows.new_empty(rows.shape[0], self.out_features)
        step = max(64, STRETCH_BYTES // (2 * self.in_features) // 64 * 64)
        for start in range(0, self.out_features, step):
            stop = min(start + step, self.out_features)
            if self.kernel == "int8pack-cpu":
                dense = self.packed[start:stop].to(torch.bfloat16) * self.scales[start:stop, None]
                y[:, start:stop] = wide.linear(rows, dense)
            else:
                parts = torch.matmul(rows, self._unpack(start, stop))  # (blocks, M, 64)
                y[:, start:stop] = parts.transpose(0, 1).reshape(rows.shape[0], stop - start)
        return y

    def _unpack(self, start: int, stop: int) -> Tensor:
        """Rows start..stop of W in bfloat16 as (blocks, K, 64), from torch's storage for AVX-512: blocks of 64
        rows, in which one byte holds an input's code for row r in its low and for row r + 32 in its high half."""
        blocks = (stop - start) // 64
        halves = self.packed[start:stop].view(blocks, -1, self.in_features, 32)  # (blocks, 1 or 2, K, 32)
        # (2, blocks, G, 64), contiguous: strided scales would keep the products below from being vectorized
        scale, zero = self.scales[:, start:stop].view(-1, blocks, 64, 2).permute(3, 1, 0, 2).contiguous()
        if self.halves:
            high, low = halves.unbind(1)
            pair, middle = ((high << 4) | (low & 15), (high & 240) | (low >> 4)), 136
            coarse, fine = zero.chunk(2, dim=1)
            scale, zero = scale.chunk(2, dim=1)[1], coarse + fine
        else:
            pair, middle = (halves[:, 0] & 15, halves[:, 0] >> 4), 8
        codes = torch.empty(blocks, self.in_features, 2, 32, dtype=torch.bfloat16)  # whole numbers, exact
        codes[:, :, 0], codes[:, :, 1] = pair
        grouped = codes.sub_(middle).view(blocks, -1, self.group, 64)  # (blocks, G, group, 64)
        torch.addcmul(zero.unsqueeze(2), grouped, scale.unsqueeze(2), out=grouped)
        return grouped.view(blocks, self.in_features, 64)

    @classmethod
    def joined(cls, parts: Sequence[PackedLinear]) -> PackedLinear | None:
        """One linear with the outputs of all `parts` in a row; None where they cannot be joined.

        The parts' packed weights become views of the joined one, so only the scales exist twice; it is kept with
        the first of them.
        """
        first = parts[0]
        known: PackedLinear | None = vars(first).get("_joined")
        if known is not None:
            return known
        alike = all((p.kernel, p.bits, p.group, p.in_features) == (
            first.kernel, first.bits, first.group, first.in_features) for p in parts)  # fmt: skip
        hooked = any(p._forward_pre_hooks for p in parts)  # what rounds the inputs of one does not see the joined
        # The CPU's 4-bit storage is made of blocks of 64 rows; other numbers of rows have smaller blocks at the end.
        whole_blocks = first.kernel != "int4pack-cpu" or all(p.out_features % 64 == 0 for p in parts)
        biased = [p.bias is not None for p in parts]
        if not alike or hooked or not whole_blocks or any(biased) != all(biased):
            return None
        return _join(parts, "packed", ("kernel", "bits", "in_features", "group", "_product", "halves", "many_rows"))

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, kernel={self.kernel}"


class Int8Linear(nn.Module):
    """y = x W^T + bias with 8-bit weights and inputs: integer products, exact sums, then both scales.

    weight: int8 (N, K); scales: (N,); x (..., K) in bfloat16, y (..., N). Our own kernel where it is at hand, else
    `torch._int_mm`: both use the integer instructions of the processor, ours also for what stands around the product.
    """

    weight: Tensor
    scales: Tensor
    sums: Tensor | None  # int32 (N,): of each row's codes, for our own kernel
    bias: Tensor | None

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None = None, device: torch.device | str = "cpu") -> None:
        super().__init__()
        assert weight.inputs is not None
        self.inputs = weight.inputs
        self.out_features, self.in_features = weight.codes.shape
        codes = (weight.codes.to(torch.int16) - 2 ** (weight.bits - 1)).to(torch.int8)
        scales = weight.scale.expand(self.out_features, 1).reshape(-1).contiguous()
        processor = available()
        native = torch.device(device).type == "cpu" and weight.scale.dtype == torch.bfloat16 and processor is not None
        self.kernel = f"{INT8}-{processor}" if native else INT8
        self.many_rows = MANY_ROWS_INT8_INT8.get(processor or "", 0)
        self.register_buffer("weight", codes.to(device))
        self.register_buffer("scales", scales.to(device))
        self.register_buffer("sums", codes.sum(dim=1, dtype=torch.int32) if native else None)
        self.register_buffer("bias", None if bias is None else bias.detach().to(device, torch.bfloat16))

    def matrix(self) -> Matrix | None:
        """What our own kernels read, pointing into the buffers; None where they do not compute this linear."""
        if self.sums is None:
            return None
        parts = (self.weight, self.scales, None, self.sums, self.bias)
        pointers = [None if part is None else part.data_ptr() for part in parts]
        shape = (self.out_features, self.in_features, self.in_features)
        return Matrix(Matrix.INT8_INT8, *shape, *pointers, self.inputs.scale or 0.0)

    @staticmethod
    def knows(weight: QuantizedWeight, device: torch.device | str) -> bool:
        """Whether this class computes with the weight on the device."""
        rows, columns = weight.codes.shape
        plain = (
            weight.kind == "int"
            and weight.inputs is not None
            and weight.symmetric
            and weight.bits > 4
            and weight.scale.shape[1] == 1
        )
        # CUDA's integer product wants multiples of 8.
        return plain and (torch.device(device).type == "cpu" or (rows % 8 == 0 and columns % 8 == 0))

    @classmethod
    def joined(cls, parts: Sequence[Int8Linear]) -> Int8Linear | None:
        """As `PackedLinear.joined`; inputs are rounded once for all parts."""
        first = parts[0]
        known: Int8Linear | None = vars(first).get("_joined")
        biased = [p.bias is not None for p in parts]
        if known is not None or any(p.inputs != first.inputs for p in parts) or any(biased) != all(biased):
            return known
        return _join(parts, "weight", ("inputs", "in_features", "kernel", "many_rows"))

    def forward(self, x: Tensor) -> Tensor:
        """The product, by our own kernel where it knows the shape, else by torch's."""
        rows = x.reshape(-1, self.in_features)
        matrix = self.matrix()
        if matrix is not None and (self.in_features % 4 == 0 or rows.shape[0] < self.many_rows):
            return multiply(matrix, x, self.many_rows)
        codes, scale = self.inputs.encode(rows)
        integers = codes.to(torch.int8)
        missing = max(0, 17 - rows.shape[0]) if x.is_cuda else 0  # CUDA's wants more than 16 rows
        if missing:
            integers = torch.cat((integers, integers.new_zeros(missing, self.in_features)))
        sums = torch._int_mm(integers, self.weight.t())[: rows.shape[0]]
        y = (sums.float() * scale.float() * self.scales.float()).to(x.dtype)
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, kernel={self.kernel}"


Part = TypeVar("Part", PackedLinear, Int8Linear)


def _join(parts: Sequence[Part], matrix: str, alike: Sequence[str]) -> Part:
    """A linear with the outputs of all parts in a row; their buffers `matrix` become views of its own.

    It has the first part's attributes `alike`, and is kept with it, but not as a submodule of the network.
    """
    first = parts[0]
    joined = type(first).__new__(type(first))
    nn.Module.__init__(joined)
    for name in alike:
        setattr(joined, name, getattr(first, name))
    joined.out_features = sum(part.out_features for part in parts)
    whole = torch.cat([part.get_buffer(matrix) for part in parts])
    for part in parts:
        give_back(part.get_buffer(matrix))
    biases = [part.bias for part in parts if part.bias is not None]
    joined.register_buffer(matrix, whole)
    rows = 0 if first.scales.dim() == 1 else 1  # (N,) or (G, N, 2)
    joined.register_buffer("scales", torch.cat([part.scales for part in parts], dim=rows))
    joined.register_buffer("bias", torch.cat(biases) if biases else None)
    if isinstance(first, Int8Linear):
        sums = [part.get_buffer("sums") for part in parts] if first.sums is not None else None
        joined.register_buffer("sums", None if sums is None else torch.cat(sums))
    lengths = [part.get_buffer(matrix).shape[0] for part in parts]  # rows, or tiles of them
    for part, view in zip(parts, torch.split(whole, lengths), strict=True):
        setattr(part, matrix, view)
    vars(first)["_joined"] = joined
    return joined


def _kernel_group(group_size: int) -> int | None:
    """The largest group of a 4-bit kernel that divides `group_size`."""
    return next((size for size in GROUP_SIZES if group_size % size == 0), None)


def _int4_layout(weight: QuantizedWeight) -> _Int4:
    """`weight` as the 4-bit kernels want it, exact but for asymmetric zero terms of 4 bits (see the file's top)."""
    group = _kernel_group(weight.group_size)
    assert group is not None
    rows, columns = weight.codes.shape
    repeats = weight.group_size // group
    scale = weight.scale.float().expand(rows, -1).repeat_interleave(repeats, dim=1)  # (N, K / group)
    zero = weight.zero.to(torch.int32).expand(rows, -1).repeat_interleave(repeats, dim=1)
    codes = weight.codes.to(torch.int32)
    if 4 < weight.bits < 8:
        # At most 7 bits: code - zero + 128 always lies in 1..255, and the zero term is a whole multiple of the scale.
        codes = (codes.view(rows, -1, group) + (128 - zero).unsqueeze(-1)).view(rows, columns)
        zero = torch.full_like(zero, 128)
    if weight.bits > 4:
        # (16 high + low - zero) scale = (high - 8)(16 scale) + (low - 8) scale + (136 - zero) scale
        term = (136 - zero) * scale
        coarse = term.to(torch.bfloat16).float()
        return _Int4(
            torch.cat((codes >> 4, codes & 15), dim=1), torch.cat((16 * scale, scale), dim=1),
            torch.cat((coarse, term - coarse), dim=1), group,
        )  # fmt: skip
    if weight.bits < 4:
        # At most 3 bits: code - zero + 8 always lies in 1..15, and the zero term vanishes.
        shifted = codes.view(rows, -1, group) + (8 - zero).unsqueeze(-1)
        return _Int4(shifted.view(rows, columns), scale, torch.zeros_like(scale), group)
    return _Int4(codes, scale, (8 - zero) * scale, group)


def _pack_int4(codes: Tensor, kernel: Kernel, device: torch.device | str) -> Tensor:
    """int32 codes 0..15 (N, K) in the kernel's own storage."""
    if kernel == "int4pack-cpu":
        return torch._convert_weight_to_int4pack_for_cpu(codes, 1)
    pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)  # the earlier input in the high half
    return torch._convert_weight_to_int4pack(pairs.to(device), 8)


def _product(kernel: Kernel) -> torch._ops.OpOverloadPacket:
    """The 4-bit product (x, packed, group, scales_and_zeros) -> y."""
    if kernel == "int4pack-cpu":
        return torch.ops.aten._weight_int4pack_mm_for_cpu
    return torch.ops.aten._weight_int4pack_mm


def _knows_layout(rows: int) -> bool:
    """Whether torch packs weights of this many rows here as `PackedLinear._unpack` reads them.

    The storage is torch's own business and depends on the processor, so one block is packed and compared.
    """
    if rows % 64:
        return False
    codes = torch.arange(64 * 4, dtype=torch.int32).view(64, 4) * 7 % 16
    packed = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
    blocks = packed.view(-1).view(1, 4, 32)
    seen = torch.cat((blocks & 15, blocks >> 4), dim=-1).transpose(1, 2).reshape(64, 4)
    return bool((seen == codes).all())
