"""GGUF, version 3: one file that llama.cpp reads, and with it Ollama, LM Studio and others.

Codes, scales and zero points are those that the solver found, in whichever of ggml's block types holds their grid
exactly (`_gguf_types`): what is read is w = (code - zero) scale, which `transformers` rounds to 16 bits once more.
Where no type holds a grid, its weights are written in the 16 or 32 bits of their scales, and the file's card says which
and why. Weights that are not quantized keep their dtype; norms, biases and routers are in float32, as llama.cpp wants
them.

The layout of the file is the `gguf` package's (docs/gguf.md of ggml has the format); which tensor stands for which is
in `_gguf_tensors`, what the file says of the network in `_gguf_metadata`, of the tokenizer in `_gguf_tokens`. One
tensor's numbers are in memory at a time: first every scale is read, to know the types, then each tensor is written.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from torch import Tensor

from engine import card
from engine.export._folder import publishing
from engine.export._gguf_blocks import blocks, exact
from engine.export._gguf_families import family_of
from engine.export._gguf_metadata import add_network
from engine.export._gguf_source import Grid, Weights
from engine.export._gguf_tensors import EMBEDDINGS, Planned, plan
from engine.export._gguf_tokens import vocabulary
from engine.export._gguf_types import BLOCK, Type, fitting
from engine.export._offer import GGUF
from engine.packing import CACHE_KEY, QuantizedWeight
from engine.shards import ROWS

NAMED = 3  # tensors of which a note gives the names
PLAIN: Mapping[str, int] = MappingProxyType({"F32": 4, "F16": 2, "BF16": 2})  # bytes of a number


@dataclass(frozen=True)
class Stored:
    """A tensor of the file with its shape and type: a block type, or the name of a plain one.

    fell: why it is plain, where its weights are on a grid.
    """

    planned: Planned
    shape: tuple[int, ...]
    type: Type | str
    fell: str = ""

    @property
    def name(self) -> str:
        return self.type if isinstance(self.type, str) else self.type.name

    @property
    def bytes(self) -> int:
        count = math.prod(self.shape)
        if isinstance(self.type, str):
            return count * PLAIN[self.type]
        return count // self.type.weights * self.type.bytes


def export(artifact: Path, folder: Path) -> None:
    """Write an artifact as `folder`, with one GGUF in it, named after the model and the type of its blocks.

    Raises:
        InputError: `folder` exists, or its parent does not; one line.
        BadModel: no artifact of Maquette's, or one that GGUF or llama.cpp cannot say.
        BadArtifact: the artifact is damaged.
    """
    weights = Weights(artifact)
    config, label = weights.config, weights.label
    family = family_of(config, label)
    planned = plan(config, family, weights.names, label)
    (embedded,) = (each for each in planned if each.name == EMBEDDINGS)
    tokens = vocabulary(artifact, label, weights.shape(embedded.sources[0])[0])
    stored = [_stored(weights, each) for each in planned]
    usual = _usual(stored)
    with publishing(artifact, folder, weights.recipe, GGUF) as made:
        title = _title(weights)
        file = made.folder / f"{title}-{usual}.gguf"
        writer = GGUFWriter(file, family.arch)
        writer.add_type("model")
        writer.add_name(title)
        writer.add_quantized_by("Maquette")
        if (base := card.base_model(weights.recipe.model.source)) is not None:
            writer.add_base_model_count(1)
            writer.add_base_model_name(0, base)
            writer.add_base_model_repo_url(0, f"https://huggingface.co/{base}")
        writer.add_file_type(_file_type(usual))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        network = add_network(writer, config, family)
        made.notes.extend([*_said(weights, stored), *network, *tokens.notes, *_beside(weights)])
        writer.add_vocab_size(len(tokens.tokens))
        tokens.write(writer)
        _write(writer, weights, stored)
        card.write_gguf(made.folder, weights.recipe, file.name, made.notes)


def _title(weights: Weights) -> str:
    """The model's name, as a part of a file's."""
    source = card.shareable(weights.recipe).model.source.rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", source).strip("-.") or "model"


def _stored(weights: Weights, planned: Planned) -> Stored:
    """The type of a tensor, by the scales of its sources."""
    if planned.made is not None:
        return Stored(planned, tuple(planned.made.shape), "F32")
    shape = weights.shape(planned.sources[0])
    if len(shape) == 2 and shape[0] == 1:  # of one output: a vector, as llama.cpp has it
        shape = shape[1:]
    if planned.stacked:
        shape = (len(planned.sources), *shape)
    plain = "F32" if planned.wide or len(shape) == 1 else weights.dtype(planned.sources[0])
    if plain not in PLAIN:
        plain = "F32"
    grids = [weights.grid(source) for source in planned.sources]
    if all(grid is None for grid in grids):
        return Stored(planned, shape, plain)
    if plain == "F32" and planned.wide:
        return Stored(planned, shape, plain, "llama.cpp wants them in 32 bits")
    left: list[Type] | None = None
    for source, grid in zip(planned.sources, grids, strict=True):
        found, why = _holding(weights, source, grid)
        left = found if left is None else [each for each in left if each in found]
        if not left:
            return Stored(planned, shape, plain, why or "no type of GGUF holds all experts of a block")
    assert left
    return Stored(planned, shape, left[0])


def _holding(weights: Weights, source: str, grid: Grid | None) -> tuple[list[Type], str]:
    """The types that hold a weight exactly, the smallest first; where there are none, why."""
    if grid is None or grid.kind == "float":
        return [], "8-bit floats are in no type of GGUF" if grid else ""
    width = weights.shape(source)[1]
    if width % BLOCK:
        return [], f"rows of {width} weights fill no blocks of {BLOCK}"
    if grid.group_size % BLOCK:
        return [], f"groups of {grid.group_size} weights fill no blocks of {BLOCK}"
    found = fitting(grid.bits, grid.symmetric, grid.group_size)
    if not found:
        return [], f"{grid.bits} bits with zero points have more levels than a type of GGUF"
    scale, zero = weights.scales(source)
    found = [each for each in found if exact(scale, zero, each)]
    return found, "" if found else "their scales are not exact in float16"


def _usual(stored: Sequence[Stored]) -> str:
    """The type of most weights inside the blocks."""
    counts: Counter[str] = Counter()
    for each in stored:
        if each.planned.name.startswith("blk."):
            counts[each.name] += math.prod(each.shape)
    return counts.most_common(1)[0][0]


def _file_type(usual: str) -> LlamaFileType:
    names = {"F32": "ALL_F32", **{f"Q{bits}_K": f"MOSTLY_Q{bits}_K_S" for bits in (3, 4, 5)}}
    return LlamaFileType[names.get(usual, f"MOSTLY_{usual}")]


def _write(writer: GGUFWriter, weights: Weights, stored: Sequence[Stored]) -> None:
    """First what the file says and where its tensors are, then their numbers, one after the other."""
    for each in stored:
        kind = GGMLQuantizationType[each.name]
        writer.add_tensor_info(each.planned.name, each.shape, np.dtype(np.float32), each.bytes, kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for each in stored:
            writer.write_tensor_data(_bytes(weights, each))
    finally:
        writer.close()


def _bytes(weights: Weights, stored: Stored) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """A tensor's bytes, as the file has them."""
    planned = stored.planned
    if planned.made is not None:
        return _plain(planned.made, stored.name)
    parts = [_part(weights, source, stored) for source in planned.sources]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _part(weights: Weights, source: str, stored: Stored) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    order = stored.planned.rows
    if isinstance(stored.type, str):
        numbers = weights.numbers(source, wide=stored.type == "F32")
        numbers = numbers if order is None else numbers[order]
        return _plain(numbers.float() + stored.planned.add if stored.planned.add else numbers, stored.type)
    weight = weights.quantized(source)
    if order is not None:
        codes, scale, zero = (part[order] for part in (weight.codes, weight.scale, weight.zero))
        weight = QuantizedWeight(codes, scale, zero, weight.bits, weight.symmetric)
    rows = weight.codes.shape[0]
    pieces = [blocks(weight.rows(start, min(start + ROWS, rows)), stored.type) for start in range(0, rows, ROWS)]
    found: np.ndarray[tuple[int], np.dtype[np.uint8]] = torch.cat(pieces).flatten().numpy()
    return found


def _plain(numbers: Tensor, name: str) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[name]
    found: np.ndarray[tuple[int], np.dtype[np.uint8]] = (
        numbers.to(dtype).contiguous().flatten().view(torch.uint8).numpy()
    )
    return found


def _said(weights: Weights, stored: Sequence[Stored]) -> Iterator[str]:
    """How the weights are stored: which types hold which grids, and what had to be written as plain numbers."""
    held: Counter[tuple[int, bool, Type]] = Counter()
    fell: dict[tuple[str, str], list[str]] = {}
    for each in stored:
        if isinstance(each.type, Type):
            grids = {weights.grid(source) for source in each.planned.sources}
            for bits, symmetric in {(grid.bits, grid.symmetric) for grid in grids if grid}:
                held[bits, symmetric, each.type] += 1
        elif each.fell:
            fell.setdefault((each.fell, each.name), []).append(each.planned.sources[0].removesuffix(".weight"))
    for (bits, symmetric, kind), count in sorted(held.items(), key=lambda pair: (pair[0][:2], pair[0][2].name)):
        grid = f"{bits} bits" if symmetric else f"{bits} bits with zero points"
        yield f"Tensors of {grid}: {count}, exact in {kind.name}, which takes {kind.bits:g} bits a weight."
    for (why, name), names in fell.items():
        shown = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
        yield f"Written in {name}, for {why}: {shown}."


def _beside(weights: Weights) -> Iterator[str]:
    """What an artifact says beside its weights, and a GGUF does not."""
    if CACHE_KEY in weights.config:
        yield "Keys and values stay as they are: llama.cpp packs them with --cache-type-k and --cache-type-v."
