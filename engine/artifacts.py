"""Write a model as a folder that any `transformers` user can load, whole or not at all, and verify it.

Quantized weights are stored as compressed-tensors: the codes, scales and zero points that the solver found, packed
(`pack-quantized`), or plain where all weights and inputs are 8-bit integers (`int-quantized`) or all weights 8-bit
floats (`float-quantized`), which is what servers with such kernels expect. Files are written block by block and
fsynced; a manifest names each with its SHA-256; one rename publishes the folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from pydantic import JsonValue
from safetensors.torch import save_file
from torch import Tensor, nn

from engine.errors import BadArtifact
from engine.files import publish, sync
from engine.models import LoadedModel, blocks
from engine.packing import CACHE_KEY, QuantizedWeight, pack
from engine.records import Recipe

MANIFEST = "MANIFEST.json"
FORMAT = 1


def write(model: LoadedModel, recipe: Recipe, folder: Path) -> None:
    """Write the model to `folder`, through `folder`.tmp and a rename; what stood there is replaced."""
    temporary = folder.with_name(folder.name + ".tmp")
    for stale in (temporary, folder):
        if stale.exists():
            shutil.rmtree(stale)
    temporary.mkdir(parents=True)
    write_weights(model, temporary)
    model.network.config.save_pretrained(temporary)
    if model.network.generation_config is not None:
        model.network.generation_config.save_pretrained(temporary)
    model.tokenizer.save_pretrained(temporary)
    config = json.loads((temporary / "config.json").read_text())
    if model.stored_as is not None:
        config["quantization_config"] = model.stored_as
    elif packed := packed_modules(model):
        config["quantization_config"] = quantization_config(model.network, packed)
    if model.kv_cache is not None:  # a key of ours, which `transformers` keeps and does not read
        config[CACHE_KEY] = dataclasses.asdict(model.kv_cache)
    (temporary / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_manifest(temporary, recipe)
    publish(temporary, folder)


def packed_modules(model: LoadedModel) -> dict[str, QuantizedWeight]:
    """The quantized weights that the format can hold: those of `nn.Linear` itself.

    GPT-2's `Conv1D` it does not know, and Falcon's own linear reads its weight before it would be unpacked.
    """
    return {
        name: weight for name, weight in model.quantized.items() if type(model.network.get_submodule(name)) is nn.Linear
    }


def write_weights(model: LoadedModel, folder: Path) -> None:
    """One safetensors file for each block and one for the rest, with their index."""
    prefix, modules = blocks(model.network)
    shards = len(modules) + 1
    packed = packed_modules(model)
    index: dict[str, str] = {}
    total = 0
    for number in range(shards):
        wanted = f"{prefix}.{number - 1}." if number else None
        tensors = dict(stored_tensors(model, packed, prefix, wanted))
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    body = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(body, indent=2) + "\n")


def stored_tensors(
    model: LoadedModel, packed: Mapping[str, QuantizedWeight], prefix: str, block: str | None
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one block (by its name with a final dot), or of all that is outside the blocks.

    A tied weight is stored once, under the name that comes first.
    """
    seen: set[int] = set()
    for key, tensor in model.network.state_dict().items():
        inside = key.startswith(f"{prefix}.")
        if (block is None and inside) or (block is not None and not key.startswith(block)):
            continue
        module = key.removesuffix(".weight")
        if key.endswith(".weight") and module in packed:
            store = pack_quantized if format_of(packed) == "pack-quantized" else plain_quantized
            yield from store(module, packed[module])
        elif tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            yield key, tensor.detach().cpu().contiguous()


def pack_quantized(name: str, weight: QuantizedWeight) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one linear in compressed-tensors `pack-quantized`.

    Zero points of an asymmetric grid are packed along the rows into the first words of a tensor that is
    padded to the scales' shape: stock transformers 5.23 with compressed-tensors 0.20 allocates that
    shape, and reads the words it needs; it cannot load the unpadded tensor that its writer makes.
    """
    yield f"{name}.weight_packed", pack(weight.codes.cpu(), weight.bits)
    scale = weight.scale.cpu().contiguous()
    yield f"{name}.weight_scale", scale.view(1) if strategy(weight) == "tensor" else scale
    yield f"{name}.weight_shape", torch.tensor(weight.codes.shape, dtype=torch.int64)
    if not weight.symmetric:
        words = pack(weight.zero.cpu().t(), weight.bits).t()  # (ceil(N * bits / 32), G)
        padded = torch.zeros(weight.zero.shape, dtype=torch.int32)
        padded[: words.shape[0]] = words
        yield f"{name}.weight_zero_point", padded
    yield from _input_scale(name, weight)


def format_of(packed: Mapping[str, QuantizedWeight]) -> str:
    """The format's name: plain numbers where every weight has 8 bits, one scale a row and 8-bit inputs, or is float."""
    if all(weight.kind == "float" for weight in packed.values()):
        return "float-quantized"
    plain = all(
        weight.inputs is not None and weight.bits == 8 and weight.symmetric and strategy(weight) == "channel"
        for weight in packed.values()
    )
    return "int-quantized" if plain else "pack-quantized"


def plain_quantized(name: str, weight: QuantizedWeight) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one linear in `int-quantized` or `float-quantized`: int8 or float8 (N, K), scales (N, 1)."""
    codes = weight.codes.cpu()
    plain = codes.view(torch.float8_e4m3fn) if weight.kind == "float" else (codes.to(torch.int16) - 128).to(torch.int8)
    yield f"{name}.weight", plain
    yield f"{name}.weight_scale", weight.scale.cpu().contiguous()
    yield from _input_scale(name, weight)


def _input_scale(name: str, weight: QuantizedWeight) -> Iterator[tuple[str, Tensor]]:
    if weight.inputs is not None and weight.inputs.scale is not None:
        yield f"{name}.input_scale", torch.tensor([weight.inputs.scale], dtype=weight.scale.dtype)


def strategy(weight: QuantizedWeight) -> str:
    """The format's name for what shares a scale."""
    rows, groups = weight.scale.shape
    if groups > 1:
        return "group"
    return "tensor" if rows == 1 else "channel"


def quantization_config(network: nn.Module, packed: Mapping[str, QuantizedWeight]) -> dict[str, JsonValue]:
    """The `quantization_config` of config.json: a group of modules for each different grid."""
    grids: dict[tuple[int, bool, str, int | None, str | None], list[str]] = {}
    for name, weight in packed.items():
        kind = strategy(weight)
        inputs = None if weight.inputs is None else ("token" if weight.inputs.scale is None else "tensor")
        size = weight.group_size if kind == "group" else None
        grids.setdefault((weight.bits, weight.symmetric, kind, size, inputs), []).append(name)
    kind_of_file = format_of(packed)
    groups: dict[str, JsonValue] = {}
    for number, ((bits, symmetric, kind, size, inputs), names) in enumerate(grids.items()):
        numbers = "float" if kind_of_file == "float-quantized" else "int"
        common: dict[str, JsonValue] = {
            "type": numbers, "actorder": None, "block_structure": None, "observer_kwargs": {},
        }  # fmt: skip
        weights: dict[str, JsonValue] = {
            **common, "num_bits": bits, "symmetric": symmetric, "strategy": kind, "group_size": size,
            "dynamic": False, "observer": "minmax",
        }  # fmt: skip
        activations: dict[str, JsonValue] | None = None
        if inputs is not None:
            activations = {
                **common, "num_bits": 8, "symmetric": True, "strategy": inputs, "group_size": None,
                "dynamic": inputs == "token", "observer": None if inputs == "token" else "minmax",
            }  # fmt: skip
        groups[f"group_{number}"] = {
            "targets": ["Linear"] if len(grids) == 1 else list(names),
            "format": kind_of_file,  # compressed-tensors would infer another for 4-bit weights with 8-bit inputs
            "input_activations": activations,
            "output_activations": None,
            "weights": weights,
        }
    others = [n for n, m in network.named_modules() if isinstance(m, nn.Linear) and n not in packed]
    return {
        "quant_method": "compressed-tensors",
        "format": kind_of_file,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": list[JsonValue](others),
        "config_groups": groups,
    }


def write_manifest(folder: Path, recipe: Recipe) -> None:
    """Sizes and hashes of all files, the recipe and the versions that made them; then fsync everything."""
    files: dict[str, JsonValue] = {}
    for file in sorted(folder.iterdir()):
        files[file.name] = {"bytes": file.stat().st_size, "sha256": digest(file)}
    body = {
        "format": FORMAT,
        "recipe": recipe.model_dump(mode="json"),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(body, indent=2, sort_keys=True) + "\n")
    for file in folder.iterdir():
        sync(file)
    sync(folder)


def verify(folder: Path) -> None:
    """Compare a folder with its manifest.

    Raises:
        BadArtifact: a file is missing, of another size or content, or not named.
    """
    try:
        named = json.loads((folder / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError):
        raise BadArtifact(f"{folder.name} has no readable {MANIFEST}.") from None
    present = {file.name for file in folder.iterdir()} - {MANIFEST}
    if present != set(named):
        raise BadArtifact(f"{folder.name}: files differ from the manifest: {sorted(present ^ set(named))}.")
    for name, entry in named.items():
        file = folder / name
        if file.stat().st_size != entry["bytes"] or digest(file) != entry["sha256"]:
            raise BadArtifact(f"{folder.name}: {name} is not what the manifest says.")


def digest(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
