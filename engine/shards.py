"""How a model's tensors are stored: packed weights in compressed-tensors' formats, all others as they are.

Where a family's linears are none that compressed-tensors knows, packed weights are in a format of ours
(`engine.own_packed`).

The same file serves three times: a finished block is written at once, a resumed run goes on from it, and the artifact
takes it as it is. Quantized weights keep the codes, scales and zero points that the solver found: packed
(`pack-quantized`), or plain where both weights and inputs are 8-bit integers (`int-quantized`) or weights are 8-bit
floats (`float-quantized`), which is what servers with such kernels expect.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from pydantic import JsonValue
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from engine import bnb, low_rank, own_packed
from engine.bitmask import MASK, SHAPE, VALUES, pack_bitmask, packed_bytes, unpack_bitmask
from engine.checkpoint import finite, part_names, part_of
from engine.errors import BadModel, short
from engine.files import as_usual, publish, read_ahead
from engine.headers import is_placeholder, weight_files
from engine.models import LoadedModel, blocks, linears, put_tensor, quantize_inputs
from engine.orientation import rows_and_columns, turned
from engine.packing import InputGrid, Kind, QuantizedWeight, pack, unpack
from engine.wide import is_plain

GRIDS = "maquette_grids"  # the key of a shard's metadata that says how its packed weights are to be read
PRUNED = "maquette_pruned"  # and the one that names the linears whose zeros must stay
SPARSE = "maquette_sparse"  # those whose weights are to be stored as a bitmask
RANKS = "maquette_ranks"  # those that are a product of two, with their ranks
LIBRARY = "maquette_library"  # those that are a library's modules, and of which kind
PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "input_scale")
ROWS = 512  # that are packed or unpacked at a time: it takes a byte for every bit


def needs_own_format(network: PreTrainedModel) -> bool:
    """Whether linears of the blocks are none that compressed-tensors packs, or stock `transformers` reads when packed.

    GPT-2's `Conv1D` it does not know, and Falcon's own linear reads its weight before it would be unpacked.
    """
    if network.config.model_type in own_packed.BEGUN:
        return True
    return any(not is_plain(linear) for block in blocks(network)[1] for _, linear in linears(block))


@dataclass(frozen=True)
class Scheme:
    """How a packed weight is to be read. inputs: a scale for each `token`, one for all (`tensor`), or not rounded."""

    bits: int
    symmetric: bool
    inputs: str | None
    kind: Kind

    @classmethod
    def of(cls, weight: QuantizedWeight) -> Scheme:
        """That of a weight."""
        inputs = None if weight.inputs is None else ("token" if weight.inputs.scale is None else "tensor")
        return cls(weight.bits, weight.symmetric, inputs, weight.kind)


def write(model: LoadedModel, parts: Sequence[str], path: Path) -> None:
    """Write the tensors of parts to one file, whole or not at all."""
    packed = model.quantized
    tensors: dict[str, Tensor] = {}
    grids: dict[str, JsonValue] = {}
    for part in parts:
        with model.opened(part):
            tensors |= _stored(model, part)
        grids |= {name: asdict(Scheme.of(packed[name])) for name in sorted(packed) if _within(name, part)}

    def inside(names: Iterable[str]) -> list[str]:
        return sorted(name for name in names if any(_within(name, part) for part in parts))

    pruned, sparse, products = inside(model.pruned), inside(model.sparse), low_rank.ranks(model.network)
    about = {"format": "pt", **({GRIDS: json.dumps(grids)} if grids else {})}
    about |= {PRUNED: json.dumps(pruned)} if pruned else {}
    about |= {SPARSE: json.dumps(sparse)} if sparse else {}
    about |= {RANKS: json.dumps({name: products[name] for name in found})} if (found := inside(products)) else {}
    about |= {LIBRARY: json.dumps(theirs)} if (theirs := _of_library(model, parts)) else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata=about)
    as_usual(temporary)
    _sort_metadata(temporary)
    publish(temporary, path)


def _sort_metadata(path: Path) -> None:
    """Put the metadata of a safetensors file in order: the library writes it in one that changes from run to run."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        assert len(ordered) == length, "the same header in another order has the same length"
        file.seek(8)
        file.write(ordered)


def _within(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


def _of_library(model: LoadedModel, parts: Sequence[str]) -> dict[str, JsonValue]:
    """Of the linears of open parts that are a library's modules, by name, of which kind they are."""
    named = [pair for part in parts for pair in model.network.get_submodule(part).named_modules(prefix=part)]
    return {name: asdict(bnb.kind_of(module)) for name, module in named if bnb.is_library(module)}


def _stored(model: LoadedModel, part: str) -> dict[str, Tensor]:
    """The tensors of an open part by the names of the file."""
    found: dict[str, Tensor] = {}
    own = needs_own_format(model.network)
    parts = part_names(model.network, blocks(model.network)[0])
    for key, tensor in model.network.get_submodule(part).state_dict(prefix=f"{part}.").items():
        module, _, leaf = key.rpartition(".")
        if part_of(key, parts) != part:
            continue
        if leaf == "weight" and (weight := model.quantized.get(module)) is not None:
            found |= dict(_writer(weight, model.network.get_submodule(module), own)(module, weight))
        elif key not in model.tied:
            numbers = tensor.detach().cpu().contiguous()
            if leaf == "weight" and module in model.sparse and packed_bytes(numbers) < numbers.nbytes:
                found |= {f"{module}.{name}": each for name, each in pack_bitmask(numbers).items()}
            else:
                found[key] = numbers
    for name in low_rank.ranks(model.network):
        if _within(name, part):
            found[f"{name}.weight"] = torch.empty(0, dtype=model.network.dtype)  # strangers are to stumble over it
    return found


@dataclass(frozen=True)
class Shard:
    """A part in a file that `write` made."""

    path: Path

    def fill(self, model: LoadedModel, part: str) -> None:
        """Give the part its weights; quantized ones dense, beside their codes, but for those of a library."""
        files = TensorFiles([self.path], self.path.name)
        packed, theirs = self.schemes(), self.library()
        for name in theirs:
            files.fill_library(name, model.network.get_submodule(name), model.device)
        for name, scheme in packed.items():
            linear = model.network.get_submodule(name)
            weight = read_quantized(files, name, *rows_and_columns(linear), scheme).to(model.device)
            model.quantized[name] = weight
            linear._parameters["weight"] = nn.Parameter(dense_of(linear, weight), requires_grad=False)
        for key in files.names:
            module, _, leaf = key.rpartition(".")
            if (module in packed and leaf in (*PARTS, "weight")) or any(_within(key, name) for name in theirs):
                continue
            put_tensor(model.network, key, files.read(key).to(model.device))

    def prefetch(self, part: str) -> None:
        """Ask the system to read it ahead: of a model larger than memory the next step reads it again."""
        read_ahead(self.path)

    def schemes(self) -> dict[str, Scheme]:
        """How its packed weights are to be read, by module name."""
        return {name: Scheme(**scheme) for name, scheme in json.loads(self._about().get(GRIDS, "{}")).items()}

    def pruned(self) -> set[str]:
        """The linears whose zeros must stay."""
        return set(json.loads(self._about().get(PRUNED, "[]")))

    def sparse(self) -> set[str]:
        """The linears whose weights are to be stored as a bitmask."""
        return set(json.loads(self._about().get(SPARSE, "[]")))

    def ranks(self) -> dict[str, int]:
        """The linears that are a product of two."""
        return dict(json.loads(self._about().get(RANKS, "{}")))

    def library(self) -> dict[str, bnb.Kind]:
        """The linears that are a library's modules, and of which kind."""
        return {name: bnb.Kind(**kind) for name, kind in json.loads(self._about().get(LIBRARY, "{}")).items()}

    def _about(self) -> dict[str, str]:
        with safe_open(self.path, framework="pt") as file:
            return dict(file.metadata() or {})


def place(model: LoadedModel, part: str, path: Path) -> None:
    """The part of a streamed model is from now on what stands in the file."""
    if model.parts is not None:
        model.parts.where[part] = Shard(path)


def adopt(model: LoadedModel, part: str, path: Path) -> None:
    """Take a part as another process finished it, with all that its file says of it."""
    shard = Shard(path)
    place(model, part, path)
    low_rank.factor(model.network, shard.ranks())
    for name, kind in shard.library().items():
        linear = model.network.get_submodule(name)
        bias = linear._parameters.get("bias") is not None
        model.put(name, bnb.hollow(*rows_and_columns(linear), kind, model.network.dtype, bias=bias))
    model.pruned = {name for name in model.pruned if not _within(name, part)} | shard.pruned()
    model.sparse = {name for name in model.sparse if not _within(name, part)} | shard.sparse()
    with contextlib.ExitStack() as stack:
        if model.parts is None:
            shard.fill(model, part)
        else:
            stack.enter_context(model.opened(part))
        for name in shard.schemes():
            if (inputs := model.quantized[name].inputs) is not None:
                quantize_inputs(model.network.get_submodule(name), inputs)


def dense(weight: QuantizedWeight) -> Tensor:
    """The weight (N, K) that the codes stand for, some rows at a time."""
    rows = weight.codes.shape[0]
    return torch.cat([weight.rows(start, min(start + ROWS, rows)).dequantize() for start in range(0, rows, ROWS)])


def dense_of(module: nn.Module, weight: QuantizedWeight) -> Tensor:
    """As `dense`, the way round in which the module holds its weight: GPT-2's `Conv1D` as (K, N)."""
    return turned(module, dense(weight)).contiguous()


class TensorFiles:
    """The tensors of safetensors files by the names that a network has for them; `owner` names their model in errors.

    Weights that are stored as a bitmask are read as the weights that they are; `sparse` are their modules.
    """

    def __init__(self, files: Iterable[Path], owner: str) -> None:
        self._owner = owner
        self._file_of: dict[str, Path] = {}
        for path in files:
            try:
                with safe_open(path, framework="pt") as handle:
                    self._file_of |= dict.fromkeys(handle.keys(), path)
            except (OSError, SafetensorError) as error:
                raise self.bad(f"{path.name} is no complete safetensors file ({short(error)})") from None
        self.sparse = {name.rpartition(".")[0] for name in self._file_of if name.endswith(f".{MASK}")}
        hidden = {f"{module}.{leaf}" for module in self.sparse for leaf in (MASK, VALUES, SHAPE)}
        hidden |= {name for name in self._file_of if is_placeholder(name, self._file_of)}
        self.names = sorted(set(self._file_of) - hidden)

    @classmethod
    def of_folder(cls, folder: Path) -> TensorFiles:
        """Those of a model folder.

        Raises:
            BadModel: a file is missing, damaged, or outside the folder.
        """
        return cls(weight_files(folder), folder.name)

    def read(self, name: str) -> Tensor:
        """A tensor in memory of its own.

        Raises:
            BadModel: there is none of that name, or it holds NaN or infinite values.
        """
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and module in self.sparse:
            try:
                return unpack_bitmask(*(self.read(f"{module}.{part}") for part in (MASK, VALUES, SHAPE)))
            except ValueError as error:
                raise self.bad(f"{name}: {error}") from None
        if name not in self._file_of:
            raise self.bad(f"{name} is missing")
        with safe_open(self._file_of[name], framework="pt", backend="pread") as handle:
            tensor: Tensor = handle.get_tensor(name)
        if not finite(tensor):
            raise self.bad(f"{name} holds NaN or infinite values")
        return tensor

    def get(self, name: str) -> Tensor | None:
        """The tensor, or None where there is none of that name."""
        return self.read(name) if name in self._file_of else None

    def fill_library(self, name: str, module: nn.Module, device: torch.device) -> None:
        """Give a library's module its weight.

        Raises:
            BadModel: as `read`.
        """
        leaves = [each.removeprefix(f"{name}.") for each in self.names if each.startswith(f"{name}.")]
        bnb.fill(module, {leaf: self.read(f"{name}.{leaf}") for leaf in leaves}, device)

    def bad(self, problem: str) -> BadModel:
        """The error that says what is wrong with this folder."""
        return BadModel(f"{short(self._owner)}: {problem}; save or download the model again.")


def pack_quantized(name: str, weight: QuantizedWeight) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one linear in compressed-tensors `pack-quantized`.

    Zero points of an asymmetric grid are packed along the rows into the first words of a tensor that is
    padded to the scales' shape: stock transformers 5.23 with compressed-tensors 0.20 allocates that
    shape, and reads the words it needs; it cannot load the unpadded tensor that its writer makes.
    """
    yield (
        f"{name}.weight_packed",
        torch.cat([pack(rows.cpu(), weight.bits) for rows in torch.split(weight.codes, ROWS)]),
    )
    scale = weight.scale.cpu().contiguous()
    yield f"{name}.weight_scale", scale.view(1) if strategy(weight) == "tensor" else scale
    yield f"{name}.weight_shape", torch.tensor(weight.codes.shape, dtype=torch.int64)
    if not weight.symmetric:
        words = pack(weight.zero.cpu().t(), weight.bits).t()  # (ceil(N * bits / 32), G)
        padded = torch.zeros(weight.zero.shape, dtype=torch.int32)
        padded[: words.shape[0]] = words
        yield f"{name}.weight_zero_point", padded
    yield from _input_scale(name, weight)


def plain_quantized(name: str, weight: QuantizedWeight) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one linear in `int-quantized` or `float-quantized`: int8 or float8 (N, K), scales (N, 1)."""
    codes = weight.codes.cpu()
    plain = codes.view(torch.float8_e4m3fn) if weight.kind == "float" else (codes.to(torch.int16) - 128).to(torch.int8)
    yield f"{name}.weight", plain
    yield f"{name}.weight_scale", weight.scale.cpu().contiguous()
    yield from _input_scale(name, weight)


def own_quantized(name: str, weight: QuantizedWeight) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one linear in the format of `engine.own_packed`, with the one that strangers stumble over."""
    yield f"{name}.weight", torch.empty(0, dtype=weight.scale.dtype)
    if weight.kind == "int":
        yield from pack_quantized(name, weight)
        return
    plain = dict(plain_quantized(name, weight))
    yield f"{name}.weight_packed", plain.pop(f"{name}.weight")
    yield f"{name}.weight_shape", torch.tensor(weight.codes.shape, dtype=torch.int64)
    yield from plain.items()


def _writer(
    weight: QuantizedWeight, module: nn.Module, own: bool
) -> Callable[[str, QuantizedWeight], Iterator[tuple[str, Tensor]]]:
    if own:
        return own_quantized
    return pack_quantized if format_of(weight, module) == "pack-quantized" else plain_quantized


def _input_scale(name: str, weight: QuantizedWeight) -> Iterator[tuple[str, Tensor]]:
    if weight.inputs is not None and weight.inputs.scale is not None:
        yield f"{name}.input_scale", torch.tensor([weight.inputs.scale], dtype=weight.scale.dtype)


def strategy(weight: QuantizedWeight) -> str:
    """The format's name for what shares a scale."""
    rows, groups = weight.scale.shape
    if groups > 1:
        return "group"
    return "tensor" if rows == 1 else "channel"


def format_of(weight: QuantizedWeight, module: nn.Module, own: bool = False) -> str:
    """The format's name: plain numbers for floats, and for 8 bits with a scale a row in embeddings and W8A8 linears.

    `transformers` loads embeddings from plain numbers only. Our `own` format has all integers packed.
    """
    if weight.kind == "float":
        return "float-quantized"
    if own:
        return "pack-quantized"
    plain = (
        (weight.inputs is not None or isinstance(module, nn.Embedding))
        and weight.bits == 8
        and weight.symmetric
        and strategy(weight) == "channel"
    )
    return "int-quantized" if plain else "pack-quantized"


def read_quantized(files: TensorFiles, name: str, rows: int, columns: int, scheme: Scheme) -> QuantizedWeight:
    """The codes, scales and zero points of a packed module, as they were found.

    Raises:
        BadModel: a part is missing or misshapen.
    """
    bits, symmetric, kind = scheme.bits, scheme.symmetric, scheme.kind
    inputs = None
    if scheme.inputs is not None:
        inputs = InputGrid(None if scheme.inputs == "token" else float(files.read(f"{name}.input_scale")), kind)
    scale = files.read(f"{name}.weight_scale")
    if f"{name}.weight_packed" not in files.names:
        if not symmetric:
            raise files.bad(f"{name}: 8-bit weights with zero points have no kernel here")
        return _read_plain(files, name, (rows, columns), files.read(f"{name}.weight"), scale, kind, inputs)
    packed, shape = (files.read(f"{name}.{part}") for part in ("weight_packed", "weight_shape"))
    if kind == "float":
        return _read_plain(files, name, (rows, columns), packed, scale, kind, inputs)
    words = -(-columns * bits // 32)
    if packed.dtype != torch.int32 or packed.shape != (rows, words) or shape.tolist() != [rows, columns]:
        raise files.bad(f"{name}: {bits}-bit codes of shape {tuple(packed.shape)} do not fit {rows} x {columns}")
    if files.get(f"{name}.weight_g_idx") is not None:
        raise files.bad(f"{name} has groups in activation order, which have no kernel here")
    scale = scale.view(1, 1) if scale.numel() == 1 else scale
    if scale.dim() != 2 or scale.shape[0] not in (1, rows) or columns % scale.shape[1]:
        raise files.bad(f"{name}: scales of shape {tuple(scale.shape)} do not fit {rows} x {columns}")
    zero = torch.full_like(scale, 2 ** (bits - 1), dtype=torch.uint8)
    if not symmetric:
        points = files.read(f"{name}.weight_zero_point")
        points = points.view(1, 1) if points.numel() == 1 else points
        # Packed along dim 0, so transposed rows of codes. Stock transformers wants it padded with rows of zeros.
        needed = -(-scale.shape[0] * bits // 32)
        if points.dim() != 2 or points.shape[0] < needed or points.shape[1] != scale.shape[1]:
            raise files.bad(f"{name}: zero points of shape {tuple(points.shape)} do not fit")
        zero = unpack(points[:needed].T.contiguous(), bits, scale.shape[0]).T.contiguous()
    codes = torch.cat([unpack(part, bits, columns) for part in torch.split(packed, ROWS)])
    return QuantizedWeight(codes, scale, zero, bits, symmetric, inputs)


def _read_plain(
    files: TensorFiles, name: str, shape: tuple[int, int], weight: Tensor, scale: Tensor, kind: Kind,
    inputs: InputGrid | None,
) -> QuantizedWeight:  # fmt: skip
    """A weight that stands in the file as int8 or float8 (N, K), with one scale a row."""
    dtype = torch.int8 if kind == "int" else torch.float8_e4m3fn
    if weight.dtype != dtype or weight.shape != shape or scale.shape != (shape[0], 1):
        raise files.bad(f"{name}: 8-bit weights of shape {tuple(weight.shape)} do not fit {shape[0]} x {shape[1]}")
    codes = weight.view(torch.uint8) if kind == "float" else (weight.to(torch.int16) + 128).to(torch.uint8)
    return QuantizedWeight(codes, scale, torch.full_like(scale, 128, dtype=torch.uint8), 8, True, inputs, kind)
