"""What an artifact's config.json and the names of its tensors say about its export: no tensor is read.

What only tensors tell, as rows that fill no words, the export itself refuses.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path

from pydantic import JsonValue

from engine.errors import BadModel, short
from engine.export._gguf_families import family_of
from engine.export._gguf_types import bits_at_most
from engine.files import MANIFEST
from engine.headers import Shape, inspect, is_own
from engine.low_rank import RANKS_KEY
from engine.own_packed import PACKED_KEY, rounds_inputs

CODES, SCALE = ".weight_packed", ".weight_scale"
DENSE, GGUF = "dense", "gguf"
LIBRARY_FREE = ("pack-quantized", "int-quantized", "float-quantized", "mixed-precision")
BITS = {"awq": (4,), "gptq": (2, 3, 4, 8), "gptq_v2": (2, 3, 4, 8)}  # formats of codes, those that most read first


def offered(artifact: Path) -> list[str]:
    """The formats against which nothing speaks so far; none where the artifact cannot be read."""
    try:
        config = json.loads((artifact / "config.json").read_text())
        names = json.loads((artifact / "model.safetensors.index.json").read_text())["weight_map"]
    except (OSError, ValueError, KeyError):
        return []
    plain = [DENSE] if is_own(config) and not rounds_inputs(config) else []
    try:
        check_plain(config, artifact.name)
        family_of(config, artifact.name)
        plain = [GGUF, *plain]
    except BadModel:
        pass
    try:
        stored, _ = codes_of(artifact.name, config, names)
    except BadModel:
        return plain
    groups = stored["config_groups"]
    assert isinstance(groups, dict)
    found = [group for group in groups.values() if isinstance(group, dict)]
    if any(group.get("input_activations") is not None for group in found):
        return plain
    bits = [weights["num_bits"] for group in found if isinstance(weights := group.get("weights"), dict)]
    return [*(name for name, known in BITS.items() if all(number in known for number in bits)), *plain]


def codes_of(
    label: str, config: Mapping[str, JsonValue], names: Collection[str]
) -> tuple[dict[str, JsonValue], list[str]]:
    """The `quantization_config` of an artifact whose codes other formats can hold, and the names of its packed linears.

    Raises:
        BadModel: nothing in it is packed, or it holds more than weights on integer grids.
    """
    if RANKS_KEY in config:
        raise BadModel(
            f"{label} has linears that are products of two, which this format does not know. Export it as "
            "dense, or quantize without prune/low_rank."
        )
    if PACKED_KEY in config:
        raise BadModel(
            f"{label} holds linears of {config.get('model_type')}, which readers of this format do not "
            "know. Export it as dense."
        )
    stored = config.get("quantization_config")
    if not isinstance(stored, dict):
        raise BadModel(f"{label} holds no quantized weights: there is nothing to export.")
    packed = [name.removesuffix(CODES) for name in names if name.endswith(CODES)]
    if stored.get("format") != "pack-quantized" or not packed:
        what = stored.get("format", stored.get("quant_method"))
        raise BadModel(
            f"{label} is stored as {short(what)}; only weights in groups or rows of integers, with inputs as "
            "they are, can be exported. Use a weight-only method such as quantize/gptq."
        )
    if beyond := [name for name in packed if not any(word.isdigit() for word in name.split("."))]:
        raise BadModel(
            f"{label} has packed weights beside its blocks ({beyond[0]}), which readers of these formats do "
            "not expect. Quantize with `head` and `embeddings` off to export."
        )
    return stored, packed


def check_plain(config: Mapping[str, JsonValue], label: str) -> None:
    """Refuse what a file of weights alone cannot say, by config.json.

    Raises:
        BadModel: the weights are a library's, or inputs are rounded.
    """
    stored = config.get("quantization_config")
    if isinstance(stored, dict) and stored.get("format") not in LIBRARY_FREE:
        what = stored.get("format", stored.get("quant_method"))
        raise BadModel(
            f"{label} is stored as {short(what)}, a library's format, of which no GGUF is made. Use a weight-only "
            "method such as quantize/gptq."
        )
    inputs = any(group.get("input_activations") is not None for group in _groups(stored))
    if inputs or rounds_inputs(config):
        raise BadModel(
            f"{label}: the inputs of its linears are rounded to 8 bits, which a GGUF cannot say. Use a weight-only "
            "method such as quantize/gptq."
        )


def _groups(stored: JsonValue) -> list[dict[str, JsonValue]]:
    groups = stored.get("config_groups") if isinstance(stored, dict) else None
    return [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []


def notes(folder: Path) -> list[str]:
    """What is to be said of an export: how it differs from its artifact. Empty where nothing is."""
    try:
        return [str(note) for note in json.loads((folder / MANIFEST).read_text()).get("notes", [])]
    except (OSError, ValueError, AttributeError):
        return []


def room(artifact: Path, name: str) -> int:
    """Bytes of disk that an export needs, rounded up: dense weights take two a number, all others are repacked.

    Raises:
        BadModel: the artifact cannot be read.
    """
    size = sum(file.stat().st_size for file in artifact.iterdir())
    if name in (DENSE, GGUF):
        shape = inspect(artifact)
        size = max(size, 2 * shape.parameters) if name == DENSE else size + _unpacked(shape)
    return size * 11 // 10


def _unpacked(shape: Shape) -> int:
    """How many bytes packed weights can grow by in a GGUF, at most: in wider types, or in 16 bits where none fits."""
    stored = shape.config.get("quantization_config", shape.config.get(PACKED_KEY))
    most = 32 if shape.config.get("dtype") == "float32" else 16
    bits = [0.0]
    for group in _groups(stored):
        weights = group.get("weights")
        if isinstance(weights, dict):
            number, size = weights.get("num_bits"), weights.get("group_size")
            size = size if isinstance(size, int) and size > 0 else 32
            fits = isinstance(number, int) and weights.get("type") == "int" and most == 16
            bits.append(bits_at_most(int(str(number)), bool(weights.get("symmetric")), size, most) if fits else most)
            if weights.get("type") == "float":
                return most * shape.parameters // 8
    return int(sum(shape.packed.values()) * max(bits) / 8)
