"""Where a model's files are read from, a piece at a time: a folder of this machine, or a repo that is not here yet.

What judges a model (`engine.headers`) asks for names, sizes and a few bytes, and need not know which of the two it is.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Protocol

from engine.errors import BadModel, short

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
LONGEST = 64 << 20  # bytes of a JSON file that is read whole; the index of the largest models has a few million


class Origin(Protocol):
    """The files of one model. `folder`: where they are on this machine, None where they are not."""

    @property
    def name(self) -> str:
        """As an error names the model."""

    @property
    def folder(self) -> Path | None: ...

    @property
    def sizes(self) -> Mapping[str, int]:
        """Bytes of each file, by name."""

    def read(self, name: str, start: int, length: int) -> bytes:
        """So many bytes of a file, fewer where it ends before.

        Raises:
            OSError: there is no such file, or it cannot be read.
            MaquetteError: the hub refuses it, or does not answer.
        """


class FolderOrigin:
    """A model folder of this machine."""

    def __init__(self, folder: Path, name: str = "") -> None:
        self.folder: Path | None = folder
        self._folder, self._name = folder, name or folder.name

    @property
    def name(self) -> str:
        return self._name

    @property
    def sizes(self) -> Mapping[str, int]:
        try:
            return {file.name: file.stat().st_size for file in self._folder.iterdir() if file.is_file()}
        except OSError:
            return {}

    def read(self, name: str, start: int, length: int) -> bytes:
        with (self._folder / name).open("rb") as stream:
            stream.seek(start)
            return stream.read(length)


def text(origin: Origin, name: str) -> str:
    """A small file as text.

    Raises:
        OSError: there is no such file.
        ValueError: it is not UTF-8.
        BadModel: it is far larger than such a file ever is.
    """
    size = origin.sizes.get(name)
    if size is None:
        raise FileNotFoundError(name)
    if size > LONGEST:
        raise BadModel(f"{short(origin.name)}: {short(name)} has {size:,} bytes; that cannot be right.")
    return origin.read(name, 0, size).decode()


def weight_names(origin: Origin) -> list[str]:
    """The names of a model's safetensors files.

    Raises:
        BadModel: there are none, or the index names others.
    """
    name, files = short(origin.name), origin.sizes
    if SINGLE in files:
        return [SINGLE]
    if INDEX not in files:
        if any(file.endswith(PICKLED) for file in files):
            raise BadModel(f"{name} has pickled weights only; they can run code. Convert them to safetensors.")
        raise BadModel(f"{name} has no {SINGLE}.")
    try:
        names = set(json.loads(text(origin, INDEX))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise BadModel(f"{name}: {INDEX} is damaged.") from None
    for part in names:
        if not isinstance(part, str) or Path(part).name != part or part not in files:
            raise BadModel(f"{name}: the index names {short(part)!r}, which is not a file of this folder.")
    return sorted(names)


def has_weights(files: Collection[str]) -> bool:
    """Whether there are weights among the files of these names."""
    return SINGLE in files or INDEX in files
