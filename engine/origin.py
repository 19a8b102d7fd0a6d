"""Where a model's files are read from, a piece at a time: a folder of this machine, or a repo that is not here yet.

What judges a model (`engine.headers`) asks for names, sizes and a few bytes, and need not know which of the two it is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Protocol

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


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


def has_weights(files: Collection[str]) -> bool:
    """Whether there are weights among the files of these names."""
    return SINGLE in files or INDEX in files
