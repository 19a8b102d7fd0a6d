"""Write a model as a folder that any `transformers` user can load, whole or not at all, and verify it.

Files are written block by block, as `engine.shards` says, and fsynced; config.json tells how they are to be read; a
manifest names each file with its SHA-256; one rename publishes the folder.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from pydantic import JsonValue
from torch import nn
from transformers.core_model_loading import dot_natural_key

from engine import bitmask, card, low_rank, shards
from engine.bitmask import MASK, SPARSE_KEY
from engine.checkpoint import part_names
from engine.errors import BadArtifact
from engine.files import MANIFEST as MANIFEST
from engine.files import digest, link_or_copy, publish, sync
from engine.fit import SAVED_TOGETHER
from engine.headers import OWN_KEYS, read_header
from engine.low_rank import RANKS_KEY
from engine.models import LoadedModel, blocks
from engine.own_packed import PACKED_KEY
from engine.packing import CACHE_KEY, QuantizedWeight
from engine.records import Recipe
from engine.shards import Scheme, Shard, format_of, needs_own_format, strategy

FORMAT = 1


def write(model: LoadedModel, recipe: Recipe, folder: Path) -> None:
    """Write the model to `folder`, through `folder`.tmp and a rename; what stood there is replaced."""
    temporary = folder.with_name(folder.name + ".tmp")
    for stale in (temporary, folder):
        if stale.exists():
            shutil.rmtree(stale)
    try:
        temporary.mkdir(parents=True)
        _fill(model, recipe, temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # on a full disk its room is needed to say so
        raise
    publish(temporary, folder)


def _fill(model: LoadedModel, recipe: Recipe, temporary: Path) -> None:
    stored = write_weights(model, temporary)
    model.network.config.save_pretrained(temporary)
    if model.network.generation_config is not None:
        model.network.generation_config.save_pretrained(temporary)
    model.tokenizer.save_pretrained(temporary)
    config = json.loads((temporary / "config.json").read_text())
    if model.stored_as is not None:
        config["quantization_config"] = model.stored_as
    if model.kv_cache is not None:  # a key of ours, which `transformers` keeps and does not read
        config[CACHE_KEY] = dataclasses.asdict(model.kv_cache)
    if config.get("tie_word_embeddings") and not model.tied:  # the source said so, and had other weights for the head
        config["tie_word_embeddings"] = False
    for key in OWN_KEYS:  # of the source, perhaps
        config.pop(key, None)
    if model.quantized and needs_own_format(model.network):
        config[PACKED_KEY] = packed_as(model.network, model.quantized, own=True)
    elif model.quantized:
        packed = packed_as(model.network, model.quantized)
        config["quantization_config"] = {"quant_method": "compressed-tensors", **packed}
    if any(name.endswith(f".{MASK}") for name in stored):
        config[SPARSE_KEY] = {"format": bitmask.FORMAT}
    if products := low_rank.ranks(model.network):
        config[RANKS_KEY] = dict(sorted(products.items()))
    (temporary / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    card.write(temporary, recipe)
    write_manifest(temporary, recipe)


def write_weights(model: LoadedModel, folder: Path) -> list[str]:
    """One safetensors file for each block, a few for the rest, and their index; the names of all tensors.

    A block that stands in a finished file already is linked, not written again.
    """
    prefix, _ = blocks(model.network)
    parts = part_names(model.network, prefix)
    alone = [part for part in parts if part.startswith(f"{prefix}.") or _shard(model, part)]
    groups = [*_together(model, [part for part in parts if part not in alone]), *([part] for part in alone)]
    index: dict[str, str] = {}
    total = 0
    for number, group in enumerate(groups, 1):
        file = folder / f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        if finished := _shard(model, group[0]):
            link_or_copy(finished.path, file)
        else:
            shards.write(model, group, file)
        stored = read_header(file)
        index |= dict.fromkeys(stored, file.name)
        total += sum(header.length for header in stored.values())
    body = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(body, indent=2) + "\n")
    return list(index)


def _shard(model: LoadedModel, part: str) -> Shard | None:
    """The file that holds a finished part."""
    place = None if model.parts is None else model.parts.where[part]
    return place if isinstance(place, Shard) else None


def _together(model: LoadedModel, parts: list[str]) -> Iterator[list[str]]:
    """Parts to be written in one file, so that no file with several is larger than `SAVED_TOGETHER`."""
    group: list[str] = []
    size = 0
    for part in parts:
        module = model.network.get_submodule(part)
        own = sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])
        if group and size + own > SAVED_TOGETHER:
            yield group
            group, size = [], 0
        group.append(part)
        size += own
    if group:
        yield group


def packed_as(
    network: nn.Module, packed: Mapping[str, QuantizedWeight], own: bool = False
) -> dict[str, JsonValue]:  # fmt: skip
    """What config.json says of packed modules: a group of them for each different grid; by name in our `own` format."""
    grids: dict[tuple[int, bool, str, int | None, str | None, str], list[str]] = {}
    groups_of = {weight.group_size for weight in packed.values() if strategy(weight) == "group"}
    for name in sorted(packed, key=dot_natural_key):
        weight = packed[name]
        kind, inputs = strategy(weight), Scheme.of(weight).inputs
        format_ = format_of(weight, network.get_submodule(name), own)
        if kind == "channel" and format_ == "pack-quantized" and weight.group_size in groups_of:
            kind = "group"  # as wide as one group of the others: experts are told apart by no name
        size = weight.group_size if kind == "group" else None
        grids.setdefault((weight.bits, weight.symmetric, kind, size, inputs, format_), []).append(name)
    groups: dict[str, JsonValue] = {}
    for number, ((bits, symmetric, kind, size, inputs, format_), names) in enumerate(grids.items()):
        numbers = "float" if format_ == "float-quantized" else "int"
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
            "targets": ["Linear"] if len(grids) == 1 and not own else _targets(names),
            "format": format_,  # compressed-tensors would infer another for 4-bit weights with 8-bit inputs
            "input_activations": activations,
            "output_activations": None,
            "weights": weights,
        }
    others = [n for n, m in network.named_modules() if isinstance(m, nn.Linear) and n not in packed]
    return {
        "format": formats.pop() if len(formats := {key[-1] for key in grids}) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": list[JsonValue](others),
        "config_groups": groups,
    }


def _targets(names: list[str]) -> list[JsonValue]:
    """The modules of a group by name; experts by a pattern, for that is what `transformers` looks for."""
    experts = [name for name in names if ".experts." in name]
    return [*([r"re:.*\.experts\..*"] if experts else []), *(name for name in names if name not in experts)]


def write_manifest(folder: Path, recipe: Recipe, notes: Sequence[str] = ()) -> None:
    """Sizes and hashes of all files, the recipe and the versions that made them; then fsync everything.

    notes: what is to be said of an export; without any there is no such key.
    """
    files: dict[str, JsonValue] = {}
    for file in sorted(folder.iterdir()):
        files[file.name] = {"bytes": file.stat().st_size, "sha256": digest(file)}
    body: dict[str, JsonValue] = {
        "format": FORMAT,
        "recipe": recipe.model_dump(mode="json"),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "files": files,
        **({"notes": list[JsonValue](notes)} if notes else {}),
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
