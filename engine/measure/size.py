"""Size: bytes of the weight files, stored bits per weight, zeros among the weights of the blocks."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

from pydantic import JsonValue
from safetensors import safe_open

from engine.bitmask import MASK, SHAPE, VALUES
from engine.headers import weight_files
from engine.records import Measurement

BITSANDBYTES = (".weight.absmax", ".weight.quant_", ".weight.nested_", ".SCB", ".weight_format")
STORED = (
    ".weight_packed",
    ".weight_scale",
    ".weight_shape",
    ".weight_zero_point",
    ".input_scale",
    f".{MASK}",
    f".{VALUES}",
)


def measure(folder: Path) -> list[Measurement]:
    """Size of the model in `folder`, read from its files one tensor at a time."""
    files = sorted(weight_files(folder))
    size = sum(file.stat().st_size for file in files)
    parameters = stored = zeros = weights = 0
    for file in files:
        with safe_open(file, "pt") as tensors:
            names = set(tensors.keys())
            for name in sorted(names):
                tensor = tensors.get_tensor(name)
                stored += tensor.numel() * tensor.element_size()
                if any(mark in name for mark in BITSANDBYTES) or f"{name}.absmax" in names:
                    # Scales and tables are no parameters; each byte of a 4-bit weight holds two.
                    parameters += 2 * tensor.numel() if f"{name}.absmax" in names else 0
                elif name.endswith(".weight_shape"):
                    parameters += math.prod(tensor.tolist())
                    if name.replace(SHAPE, VALUES) in names:  # the others are integers
                        weights += math.prod(tensor.tolist())
                        zeros += (
                            math.prod(tensor.tolist()) - tensors.get_slice(name.replace(SHAPE, VALUES)).get_shape()[0]
                        )
                elif not name.endswith(STORED):
                    parameters += tensor.numel()
                    if tensor.dim() == 2 and any(part.isdigit() for part in name.split(".")):
                        zeros += int((tensor == 0).sum())
                        weights += tensor.numel()
    found = [
        Measurement(
            name="size.bytes", value=size, unit="B", higher_is_better=False, details={"protocol": "all weight files"}
        ),
        Measurement(
            name="size.bits_per_weight",
            value=8 * stored / parameters,
            unit="bit",
            higher_is_better=False,
            details={"protocol": "all stored tensors, scales and zero points included, over all parameters"},
        ),
        Measurement(name="size.parameters", value=parameters, unit="1", higher_is_better=False, details=family(folder)),
    ]
    if weights:
        found.append(
            Measurement(
                name="size.sparsity",
                value=zeros / weights,
                unit="1",
                details={"protocol": "zeros among the dense matrices of the blocks"},
            )
        )
    return found


def family(folder: Path) -> dict[str, JsonValue]:
    """What models of one family have in common whatever their size: the architecture's name and the vocabulary.

    `vocabulary` is a digest of the tokenizer's: where it is equal, also perplexities can be compared.
    """
    found: dict[str, JsonValue] = {}
    if architecture := _read(folder / "config.json").get("model_type"):
        found["architecture"] = architecture
    model = _read(folder / "tokenizer.json").get("model")
    if vocabulary := model.get("vocab") if isinstance(model, dict) else None:
        found["vocabulary"] = hashlib.sha256(json.dumps(vocabulary, sort_keys=True).encode()).hexdigest()[:12]
    return found


def _read(file: Path) -> dict[str, JsonValue]:
    try:
        body = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}  # the size is known all the same
    return body if isinstance(body, dict) else {}
