"""What was measured once about a model's weights on a text is kept: another ratio or budget needs no new calibration.

Kept in the cache that runs share, under a fingerprint of all that the measuring depended on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

from pydantic import JsonValue

from engine.files import publish
from engine.methods import Context
from engine.models import LoadedModel

SAMPLED = 4096  # weights of each tensor that enter the fingerprint


class Pieces:
    """What a measuring found so far, a line of JSON for each piece: one that was killed goes on where it was."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._found: dict[str, JsonValue] = {}
        for line in file.read_text().splitlines() if file.exists() else []:
            with contextlib.suppress(ValueError):  # the line that was being written
                self._found |= json.loads(line)

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, name: object) -> bool:
        return name in self._found

    def __getitem__(self, name: str) -> JsonValue:
        return self._found[name]

    def of(self, name: str, find: Callable[[], JsonValue]) -> JsonValue:
        """The piece of that name: as it was found before, or as `find` finds it now, which is kept."""
        if name not in self._found:
            self._found[name] = find()
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a") as file:
                file.write("\n" + json.dumps({name: self._found[name]}))  # first: a torn line takes no other with it
        return self._found[name]


def measured(
    model: LoadedModel, context: Context, kind: str, about: Mapping[str, JsonValue],
    measure: Callable[[Pieces], JsonValue],
) -> JsonValue:  # fmt: skip
    """What `measure` finds, or what it found before for the same weights, calibration text and `about`.

    kind: what is measured, in a word; it names the file. about: the settings that enter, and a version to raise when
    the measuring changes. `measure` may find piece by piece what takes long.
    """
    file = context.cache / f"{kind.replace(' ', '-')}-{fingerprint(model, context, about)}.json"
    found = read(file)
    if found is not None:
        context.log(f"{kind}: measured before, now reused")
        return found
    partly = file.with_suffix(".pieces")
    pieces = Pieces(partly)
    if len(pieces):
        context.log(f"{kind}: {len(pieces)} pieces were measured before, the others follow")
    found = measure(pieces)
    keep(found, file)
    partly.unlink(missing_ok=True)
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
    """Write what was measured, whole or not at all; two runs may measure the same at once."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{uuid.uuid4().hex}.tmp")
    temporary.write_text(json.dumps(found))
    publish(temporary, file)


def read(file: Path) -> JsonValue:
    """What was kept, None where nothing was or it cannot be read."""
    try:
        found: JsonValue = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return found
