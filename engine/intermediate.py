"""The models between the steps of a recipe, kept for recipes that begin alike: another last step repeats no first.

    HOME/cache/steps/<key>/    an artifact: the model as it was after some steps

The key names everything the model follows from: the original's files, the steps with all their settings and the files
they read, dtype, seed, calibration text, versions and our own code. Models with packed weights are not kept: what
follows them takes seconds. The ones used longest ago make room; a run that uses one holds links of its own to the
files, so that nothing is taken from under it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path

from engine import artifacts, headers, methods, models, places
from engine.errors import BadArtifact, MaquetteError
from engine.files import Unused, digest, link_or_copy, make_room
from engine.hub import Hub
from engine.methods import Method, Params
from engine.models import LoadedModel
from engine.records import Recipe
from engine.shards import Shard
from engine.sources import place

log = logging.getLogger(__name__)

SHARE = 0.2  # of the free disk that kept models may take
Steps = Sequence[tuple[Method, Params]]


def keep(model: LoadedModel, recipe: Recipe, source: Path, steps: Steps, cache: Path, device: str) -> None:
    """Keep the model as it is after these `steps`, where it may be kept and there is room."""
    if model.quantized or model.stored_as is not None or model.kv_cache is not None:
        return
    folder = cache / "steps" / key(recipe, source, steps, device)
    needed = model.network.num_parameters() * model.network.dtype.itemsize
    if folder.exists() or not make_room(folder.parent, "*", needed, SHARE):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    artifacts.write(model, recipe.model_copy(update={"steps": recipe.steps[: len(steps)]}), folder)


def find(
    recipe: Recipe, source: Path, steps: Steps, cache: Path, folder: Path, device: str
) -> tuple[LoadedModel | None, int]:
    """The model after as many of the steps as were kept, and their number. Links go to `folder`."""
    for count in range(len(steps), 0, -1):
        kept = cache / "steps" / key(recipe, source, steps[:count], device)
        if not kept.is_dir():
            continue
        try:
            artifacts.verify(kept)
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(kept, folder, copy_function=link_or_copy)
        except (BadArtifact, OSError) as error:
            log.warning("a kept model cannot be used and is made again: %s", error)
            shutil.rmtree(kept, ignore_errors=True)
            continue
        with suppress(OSError):  # made room just now: the links stay
            os.utime(kept)
        return read(folder, recipe.model.dtype, device, source), count
    return None, 0


def read(folder: Path, dtype: str, device: str, source: Path) -> LoadedModel:
    """A model that was written between steps as an artifact; `source` is the original's folder."""
    model = models.stream(folder, dtype, device)
    model.source = source
    for file in headers.weight_files(folder):
        model.pruned |= Shard(file).pruned()
        model.sparse |= Shard(file).sparse()
    return model


def unused(cache: Path) -> list[Unused]:
    """The kept models, each in a folder of its key's name, of which no run has links."""
    found = []
    for folder in (cache / "steps").glob("*"):
        with suppress(OSError):  # a run makes room, too
            if all(file.stat().st_nlink == 1 for file in folder.iterdir()):
                remove = partial(shutil.rmtree, folder, ignore_errors=True)
                found.append(Unused(folder.stat().st_mtime, f"the kept model {folder.name}", folder, remove))
    return found


def keys(recipe: Recipe, hub: Hub) -> set[str]:
    """The keys of all models that a run of the recipe may keep or begin with, on whichever device."""
    try:
        steps, source = methods.check(places.located(recipe, hub)), places.locate(recipe.model, hub)
        return {
            key(recipe, source, steps[:count], device)
            for count in range(1, len(steps) + 1)
            for device in ("cpu", "cuda")
        }
    except (MaquetteError, OSError):  # a model or a file is not here, so nothing was made of it
        return set()


def key(recipe: Recipe, source: Path, steps: Steps, device: str) -> str:
    """What the model in `source` after these steps follows from, as 24 hexadecimal digits."""
    body = {
        "model": _files(source),
        "dtype": recipe.model.dtype,
        "device": device,
        "seed": recipe.seed,
        "calibration": digest(places.calibration_file(recipe.calibration)),
        "steps": [[method.name, params.model_dump(mode="json"), _read_by(params)] for method, params in steps],
        "versions": [version("torch"), version("transformers"), _code()],
    }
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:24]


def _read_by(params: Params) -> list[object]:
    """What stands in the texts and models that the settings name; patterns and choices are no names."""
    names = dict.fromkeys([*(value for value in params.rooted().values() if isinstance(value, str)), *params.models()])
    return [found for name in names if (found := _standing_in(name)) is not None]


def _standing_in(name: str) -> object:
    """What stands in a file or folder; None where a name, such as `demo`, is no path of one."""
    try:
        path = place(name)
        if path.is_file():
            return digest(path)
        return _files(path) if path.is_dir() else None
    except (OSError, RuntimeError, ValueError):  # too long a name; a home of nobody; a NUL
        return None


def _files(folder: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of change of a folder's files: reading a large model would take longer than it saves."""
    return sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in folder.iterdir())


@functools.cache
def _code() -> str:
    """A hash of the engine's own source: another version may compute something else."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*")):
        if file.suffix in (".py", ".cpp", ".h"):
            digest.update(file.read_bytes())
    return digest.hexdigest()
