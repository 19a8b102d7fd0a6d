"""What every export does: open an artifact, refuse what weight-only formats cannot say, write block by block, publish.

The codes, scales and zero points are those of the artifact's files, so those that the solver found; nothing is
quantized again. One block's tensors are in memory at a time.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import JsonValue
from safetensors.torch import save_file
from torch import Tensor

from engine import artifacts, card, headers
from engine.bitmask import SPARSE_KEY
from engine.errors import BadModel, InputError, TooBig, short
from engine.export._offer import codes_of, room
from engine.files import as_usual, publish
from engine.packing import QuantizedWeight, pack, unpack
from engine.records import Recipe
from engine.runtime.load import Schemes
from engine.shards import PARTS, TensorFiles, read_quantized

# Where the hub's checkpoints, and all who read their like, have another name than transformers 5 has.
IN_CHECKPOINTS = {"mixtral": (".mlp.", ".block_sparse_moe.")}
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Packed:
    """What an artifact says of one packed linear: rows (outputs), columns (inputs), groups in a row, and grid."""

    name: str
    rows: int
    columns: int
    groups: int
    bits: int
    symmetric: bool

    def group_size(self, usual: int = -1) -> int:
        """Inputs that share a scale, -1 for all of a row; `usual` wherever that means the same."""
        own = -1 if self.groups == 1 else self.columns // self.groups
        return usual if usual * self.groups == self.columns else own


def open_artifact(folder: Path) -> tuple[Recipe, dict[str, JsonValue]]:
    """The recipe and the config.json of a run's artifact, whose files are what its manifest says.

    Raises:
        BadModel: no artifact of Maquette's.
        BadArtifact: a file is not what the manifest says.
    """
    manifest = folder / artifacts.MANIFEST
    if not manifest.is_file():
        raise BadModel(
            f"{short(folder.name)} has no {artifacts.MANIFEST}, so it is no artifact of a run. Give the folder that "
            "`run` printed."
        )
    artifacts.verify(folder)
    recipe = Recipe.model_validate(json.loads(manifest.read_text())["recipe"])
    return recipe, json.loads((folder / "config.json").read_text())


class Artifact:
    """The folder that a run saved, opened for export; its packed linears by name.

    Raises:
        BadModel: no artifact of Maquette's, nothing in it is packed, or it holds more than weights on integer grids.
        BadArtifact: a file is not what the manifest says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.label = folder, short(folder.name)
        self.recipe, self.config = open_artifact(folder)
        self.files = TensorFiles.of_folder(folder)
        stored, names = codes_of(self.label, self.config, self.files.names)
        del self.config["quantization_config"]
        self.config.pop(SPARSE_KEY, None)  # what stands there as a bitmask is written as the numbers it is
        self._schemes = Schemes(stored, folder)
        self._shapes = headers.inspect(folder).tensors
        self.packed = {name: self._packed(name) for name in names}

    def _packed(self, name: str) -> Packed:
        scheme = self._schemes.of(name)
        if scheme.inputs is not None:
            raise BadModel(
                f"{self.label}: the inputs of {name} are rounded to 8 bits, which weight-only formats cannot say. "
                "Use a weight-only method such as quantize/gptq."
            )
        rows, columns = self.files.read(f"{name}.weight_shape").tolist()
        shape = self._shapes[f"{name}.weight_scale"]
        groups = shape[1] if len(shape) == 2 else 1
        return Packed(name, rows, columns, groups, scheme.bits, scheme.symmetric)

    def grid(self, name: str) -> tuple[Tensor, Tensor]:
        """A linear's scales in the dtype that is stored, and its zero points in uint8: (N, G) each, for every row."""
        about = self.packed[name]
        scale = self.files.read(f"{name}.weight_scale")
        scale = scale.expand(about.rows, 1) if scale.numel() == 1 else scale  # one for the matrix is one for each row
        if about.symmetric:
            return scale, torch.full_like(scale, 2 ** (about.bits - 1), dtype=torch.uint8)
        words = self.files.read(f"{name}.weight_zero_point")[: -(-about.rows * about.bits // 32)]
        return scale, unpack(words.t().contiguous(), about.bits, about.rows).t()

    def weight(self, name: str) -> QuantizedWeight:
        """A linear's codes (N, K), with scales and zero points (N, G) for every row."""
        about = self.packed[name]
        found = read_quantized(self.files, name, about.rows, about.columns, self._schemes.of(name))
        scale, zero = (part.expand(about.rows, -1) for part in (found.scale, found.zero))
        return QuantizedWeight(found.codes, scale, zero, about.bits, about.symmetric)

    def in_checkpoints(self, name: str) -> str:
        """A tensor's or module's name in the checkpoints of its family."""
        ours, theirs = IN_CHECKPOINTS.get(str(self.config.get("model_type")), ("", ""))
        return name.replace(ours, theirs, 1) if ours else name

    def dense_linears(self) -> list[str]:
        """The matrices inside the blocks that were left as they were, as checkpoints name them."""
        return [
            self.in_checkpoints(name.removesuffix(".weight"))
            for name, shape in self._shapes.items()
            if name.endswith(".weight") and len(shape) == 2 and block_of(name) >= 0
        ]

    def dynamic(self) -> dict[str, JsonValue]:
        """GPTQModel's way to leave the dense linears alone: patterns of names, each with a minus sign."""
        return {f"-:^{re.escape(name)}$": {} for name in self.dense_linears()}

    def usual_group_size(self) -> int:
        """The group size that is right for most linears."""
        own = sorted({about.group_size() for about in self.packed.values()}, reverse=True)
        return max(own, key=lambda size: sum(about.group_size(size) == size for about in self.packed.values()))

    def others(self) -> list[str]:
        """The tensors that are no part of a packed linear; its bias is an ordinary tensor."""
        parts = {f"{name}.{part}" for name in self.packed for part in PARTS}
        return [name for name in self.files.names if name not in parts]


def check_halves(artifact: Artifact) -> None:
    """Refuse scales that float16 cannot hold exactly.

    Raises:
        InputError: names a linear and what to do.
    """
    for name in artifact.packed:
        scale, _ = artifact.grid(name)
        if not torch.equal(scale.half().float(), scale.float()):
            raise InputError(
                f"{artifact.label}: scales of {name} ({str(scale.dtype).removeprefix('torch.')}) are not exact in the "
                "float16 that this format stores. Run the recipe with dtype bfloat16 or float16; where weights are "
                "tiny, with fewer bits or larger groups."
            )


def check_divisible(artifact: Artifact, by: int) -> None:
    """Refuse linears whose rows or columns do not fill whole words.

    Raises:
        InputError: names the linear.
    """
    for about in artifact.packed.values():
        if about.rows % by or about.columns % by:
            raise InputError(
                f"{artifact.label}: {about.name} is {about.rows} x {about.columns}; this format needs multiples of "
                f"{by}. Leave it out with the setting `ignore`."
            )


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """`pack`, a few rows at a time: packing takes a byte for every bit."""
    return torch.cat([pack(part, bits) for part in torch.split(codes, 256)])


def write(
    artifact: Artifact, folder: Path, config: JsonValue, convert: Callable[[QuantizedWeight], Tensors],
    extra: Mapping[str, JsonValue] | None = None,
) -> None:  # fmt: skip
    """Write a folder in another format, whole or not at all.

    convert: makes the tensors of a packed linear; all others stay as they are. config: the new `quantization_config`.
    extra: further JSON files by name.

    Raises:
        InputError: the folder exists already, or its parent does not.
        TooBig: the disk is too full.
    """
    files = {"config.json": {**artifact.config, "quantization_config": config}, **(extra or {})}
    names = sorted([*artifact.others(), *artifact.packed], key=lambda name: (block_of(name), name))
    publish_folder(
        artifact.folder, folder, files, names, lambda name: _tensors(artifact, name, convert), artifact.recipe
    )


def publish_folder(
    source: Path, folder: Path, files: Mapping[str, JsonValue], names: Sequence[str],
    tensors: Callable[[str], Iterable[tuple[str, Tensor]]], recipe: Recipe, kind: str = "",
) -> None:  # fmt: skip
    """Write a folder with the other files of `source`, new JSON `files`, and `tensors` of names sorted by block.

    kind: of the export, where its tensors may be more than those of the source.

    Raises:
        InputError: the folder exists already, or its parent does not.
        TooBig: the disk is too full.
    """
    with publishing(source, folder, recipe, kind) as made:
        for file in source.iterdir():
            if file.suffix != ".safetensors" and file.name not in ("model.safetensors.index.json", artifacts.MANIFEST):
                shutil.copyfile(file, made.folder / file.name)
        for name, body in files.items():
            (made.folder / name).write_text(json.dumps(body, indent=2, sort_keys=True) + "\n")
        _write_weights(names, made.folder, tensors)
        card.write(made.folder, recipe)  # of the new format: the old one's tells how to load the old one


@dataclass(frozen=True)
class Made:
    """An export that is being written: its folder, and what is to be said of it."""

    folder: Path
    notes: list[str]


@contextlib.contextmanager
def publishing(source: Path, folder: Path, recipe: Recipe, kind: str) -> Iterator[Made]:
    """A folder to be filled with an export of `source`, which becomes `folder` with its manifest, or nothing does.

    Raises:
        InputError: the folder exists already, or its parent does not.
        TooBig: the disk is too full.
    """
    _check_place(folder, room(source, kind))
    made = Made(folder.with_name(f".{folder.name}.exporting"), [])
    shutil.rmtree(made.folder, ignore_errors=True)
    made.folder.mkdir()
    try:
        yield made
        artifacts.write_manifest(made.folder, recipe, made.notes)
        publish(made.folder, folder)
    except BaseException:
        shutil.rmtree(made.folder, ignore_errors=True)
        raise


def _check_place(folder: Path, needed: int) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{short(folder)} exists already. Name a folder that does not.")
    if not folder.parent.is_dir():
        raise InputError(f"There is no folder {short(folder.parent)} to write {short(folder.name)} into.")
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        raise TooBig(f"The export needs {needed / 2**30:.1f} GiB of disk, {free / 2**30:.1f} are free.")


def _write_weights(
    names: Sequence[str], folder: Path, of: Callable[[str], Iterable[tuple[str, Tensor]]]
) -> None:  # fmt: skip
    """One safetensors file for each block and one for the rest, with their index."""
    shards = [list(found) for _, found in itertools.groupby(names, block_of)]
    index: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        tensors = dict(pair for name in shard for pair in of(name))
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(
            {key: tensor.contiguous() for key, tensor in tensors.items()}, folder / file, metadata={"format": "pt"}
        )
        as_usual(folder / file)
        index |= dict.fromkeys(tensors, file)
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    body = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(body, indent=2) + "\n")


def _tensors(
    artifact: Artifact, name: str, convert: Callable[[QuantizedWeight], Tensors]
) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
    known = artifact.in_checkpoints(name)
    if name not in artifact.packed:
        yield known, artifact.files.read(name)
        return
    for part, tensor in convert(artifact.weight(name)).items():
        yield f"{known}.{part}", tensor.contiguous()


def block_of(name: str) -> int:
    """The number of the block that a tensor is in, -1 outside the blocks."""
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)
