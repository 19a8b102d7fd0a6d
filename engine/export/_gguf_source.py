"""An artifact's weights one by one: quantized where their codes stand in the files, else as the numbers that they are.

What is stored as a bitmask comes with its zeros, a product of two linears multiplied out in float32; both whatever
format the artifact has, one of ours (`engine.own_packed`) too.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from engine import headers
from engine.errors import short
from engine.export._folder import open_artifact
from engine.export._offer import SCALE, check_plain
from engine.low_rank import RANKS_KEY
from engine.own_packed import CONV1D, PACKED_KEY
from engine.packing import QuantizedWeight, unpack
from engine.runtime.load import Schemes
from engine.shards import PARTS, TensorFiles, dense, read_quantized


class Grid(NamedTuple):
    """What is known of a packed weight before its codes are read; kind: `int` or `float`."""

    bits: int
    symmetric: bool
    group_size: int
    kind: str


class Weights:
    """An artifact opened for reading; `names` are those of its tensors as checkpoints with plain numbers have them.

    Raises:
        BadModel: no artifact of Maquette's, a library's, or one whose inputs are rounded.
        BadArtifact: a file is not what the manifest says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.label = folder, short(folder.name)
        self.recipe, self.config = open_artifact(folder)
        check_plain(self.config, self.label)
        stored = self.config.get(PACKED_KEY, self.config.get("quantization_config"))
        self._files = TensorFiles.of_folder(folder)
        self._schemes = Schemes(stored, folder) if isinstance(stored, dict) else None
        self._shapes = headers.inspect(folder).tensors
        found = (headers.read_header(file) for file in headers.weight_files(folder))
        self._dtypes = {name: header.dtype for file in found for name, header in file.items()}
        self._transposed = self.config.get("model_type") in CONV1D
        products = self.config.get(RANKS_KEY, {})
        assert isinstance(products, dict)
        self._products = set(products)
        self._packed = {name.removesuffix(SCALE) for name in self._files.names if name.endswith(SCALE)}
        self.names = sorted({self._plain(name) for name in self._files.names})

    def _plain(self, name: str) -> str:
        """The tensor with plain numbers that one of the files is a part of."""
        module, _, leaf = name.rpartition(".")
        above, _, half = module.rpartition(".")
        if above in self._products and half in ("down", "up"):
            return f"{above}.bias" if leaf == "bias" else f"{above}.weight"
        return f"{module}.weight" if leaf in PARTS else name

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor: of a weight (out, in)."""
        module = name.rpartition(".")[0]
        if module in self._products:
            out, rank = (self._matrix(f"{module}.{part}")[index] for index, part in enumerate(("up", "down")))
            return (out, rank) if name.endswith(".weight") else (out,)
        if name.endswith(".weight") and module in self._packed:
            return self._matrix(module)
        shape = self._shapes[name]
        return shape[::-1] if self._turned(name, shape) else shape

    def _matrix(self, module: str) -> tuple[int, int]:
        if f"{module}.weight_shape" in self._files.names:
            rows, columns = self._files.read(f"{module}.weight_shape").tolist()
        else:
            rows, columns = self._shapes[f"{module}.weight"]
        return rows, columns

    def _turned(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a tensor is the weight of a `Conv1D`, which stands there as (in, out)."""
        inside = any(word.isdigit() for word in name.split("."))
        return self._transposed and inside and len(shape) == 2 and name.endswith(".weight")

    def grid(self, name: str) -> Grid | None:
        """That of a weight whose codes stand in the files; None of all others."""
        module = name.removesuffix(".weight")
        if module not in self._packed or self._schemes is None:
            return None
        scheme, (_, columns) = self._schemes.of(module), self._matrix(module)
        shape = self._shapes[f"{module}.weight_scale"]
        groups = shape[1] if len(shape) == 2 else 1
        return Grid(scheme.bits, scheme.symmetric, columns // groups, scheme.kind)

    def scales(self, name: str) -> tuple[Tensor, Tensor]:
        """The scales of a weight that has a `grid`, as they are stored, and its zero points: (N, G) or (1, 1) each."""
        module = name.removesuffix(".weight")
        grid, (rows, _) = self.grid(name), self._matrix(module)
        assert grid is not None
        scale = self._files.read(f"{module}{SCALE}")
        scale = scale.view(1, 1) if scale.numel() == 1 else scale
        if grid.symmetric:
            return scale, torch.full_like(scale, 2 ** (grid.bits - 1), dtype=torch.uint8)
        words = self._files.read(f"{module}.weight_zero_point")[: -(-rows * grid.bits // 32)]
        return scale, unpack(words.t().contiguous(), grid.bits, rows).t()

    def dtype(self, name: str) -> str:
        """As which safetensors' dtype the numbers of a tensor come."""
        module = name.rpartition(".")[0]
        modules = [f"{module}.up", module] if module in self._products else [module]
        for each in modules:
            for stored in (f"{each}{SCALE}", f"{each}.weight_values", f"{each}.weight"):
                if name.endswith(".weight") and stored in self._dtypes:
                    return self._dtypes[stored]
        return self._dtypes.get(name, self._dtypes.get(f"{module}.up.bias", "F32"))

    def quantized(self, name: str) -> QuantizedWeight:
        """The codes, scales and zero points of a weight that has a `grid`; scales of every row."""
        module = name.removesuffix(".weight")
        assert self._schemes is not None
        found = read_quantized(self._files, module, *self._matrix(module), self._schemes.of(module))
        rows = found.codes.shape[0]
        scale, zero = (part.expand(rows, -1) for part in (found.scale, found.zero))
        return QuantizedWeight(found.codes, scale, zero, found.bits, found.symmetric, kind=found.kind)

    def numbers(self, name: str, *, wide: bool = False) -> Tensor:
        """A tensor as numbers: of a weight (out, in), of codes what they stand for in their scales' dtype.

        wide: those of codes in float32, exactly.
        """
        module = name.rpartition(".")[0]
        if module in self._products:
            if name.endswith(".bias"):
                return self._files.read(f"{module}.up.bias")
            down, up = (self._numbers(f"{module}.{part}") for part in ("down", "up"))
            return (up.float() @ down.float()).to(up.dtype)
        if wide and self.grid(name) is not None:
            weight = self.quantized(name)
            return replace(weight, scale=weight.scale.float()).dequantize()
        if name.endswith(".weight"):
            found = self._numbers(module)
            return found.t() if self._turned(name, tuple(found.shape)) and module not in self._packed else found
        return self._files.read(name)

    def _numbers(self, module: str) -> Tensor:
        name = f"{module}.weight"
        return dense(self.quantized(name)) if module in self._packed else self._files.read(name)
