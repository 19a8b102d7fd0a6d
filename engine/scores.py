"""What was measured once about a model's weights on a text is kept: another ratio or budget needs no new calibration.

Kept in the cache that runs share, under a fingerprint of all that the measuring depended on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from pydantic import JsonValue

from engine.files import publish
from engine.methods import Context
from engine.models import LoadedModel

SAMPLED = 4096  # weights of each tensor that enter the fingerprint


def measured(
    model: LoadedModel, context: Context, kind: str, about: Mapping[str, JsonValue], measure: Callable[[], JsonValue]
) -> JsonValue:
    """What `measure` finds, or what it found before for the same weights, calibration text and `about`.

    kind: what is measured, in a word; it names the file. about: the settings that enter, and a version to raise when
    the measuring changes.
    """
    file = context.cache / f"{kind.replace(' ', '-')}-{fingerprint(model, context, about)}.json"
    found = read(file)
    if found is not None:
        context.log(f"{kind}: measured before, now reused")
        return found
    found = measure()
    keep(found, file)
    return found


def fingerprint(model: LoadedModel, context: Context, about: Mapping[str, JsonValue]) -> str:
    """A digest of the weights as they are, opened part by part, the calibration text and the settings."""
    digest = hashlib.sha256()
    digest.update(json.dumps({"dtype": str(model.network.dtype), **about}, sort_keys=True).encode())
    digest.update(context.calibration.read_bytes())
    for part in [""] if model.parts is None else model.parts.where:
        with model.opened(part):
            for name, weight in model.network.get_submodule(part).named_parameters(prefix=part):
                sample = weight.detach().flatten()[:: max(1, weight.numel() // SAMPLED)].float().cpu()
                digest.update(f"{name} {tuple(weight.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:24]


def keep(found: JsonValue, file: Path) -> None:
    """Write what was measured, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(found))
    publish(temporary, file)


def read(file: Path) -> JsonValue:
    """What was kept, None where nothing was or it cannot be read."""
    try:
        found: JsonValue = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return found
