"""A published artifact as others get it: its files with a card that has the numbers, as one zip or file by file.

The manifest is rewritten for the card, and for a recipe without this machine's folders, so that whoever gets the files
can still check every one of them.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import JsonValue

from engine.card import CARD, shareable
from engine.errors import BadArtifact
from engine.files import MANIFEST
from engine.records import Recipe

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

CHUNK = 1 << 20  # bytes read at once
EPOCH = (1980, 1, 1, 0, 0, 0)  # of every file, so that the same files are the same zip


def contents(folder: Path, card: str) -> dict[str, Path | bytes]:
    """The files of an artifact by name: those that its manifest names, with another card and the manifest for it.

    Raises:
        BadArtifact: it has no manifest, or a file that it names is not there.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        named: dict[str, JsonValue] = manifest["files"]
        recipe = shareable(Recipe.model_validate(manifest["recipe"]))
    except (OSError, ValueError, KeyError):
        raise BadArtifact("The model's files are not complete any more. Start its recipe again.") from None
    text = card.encode()
    files: dict[str, Path | bytes] = {}
    for name in sorted({*named, CARD}):
        path = folder / name
        if path.parent != folder or path.is_symlink() or (name != CARD and not path.is_file()):
            raise BadArtifact(f"The model's file {name} is not there any more. Start its recipe again.")
        files[name] = text if name == CARD else path
    named[CARD] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    body = manifest | {"recipe": recipe.model_dump(mode="json"), "files": named}
    files[MANIFEST] = (json.dumps(body, indent=2, sort_keys=True) + "\n").encode()
    return files


def size(files: Mapping[str, Path | bytes]) -> int:
    """Bytes of all files together."""
    return sum(len(file) if isinstance(file, bytes) else file.stat().st_size for file in files.values())


def zipped(files: Mapping[str, Path | bytes], top: str) -> Iterator[bytes]:
    """A zip of the files below the folder `top`, piece by piece; stored, because weights do not get smaller.

    All files are opened at once: a run that is deleted meanwhile is still sent whole.
    """
    pipe = _Pipe()
    with ExitStack() as opened, zipfile.ZipFile(pipe, "w", zipfile.ZIP_STORED) as archive:
        streams = {
            name: opened.enter_context(file.open("rb")) for name, file in files.items() if isinstance(file, Path)
        }
        for name, file in files.items():
            about = zipfile.ZipInfo(f"{top}/{name}", EPOCH)
            about.external_attr = 0o644 << 16
            with archive.open(about, "w", force_zip64=True) as entry:
                if isinstance(file, bytes):
                    entry.write(file)
                else:
                    while piece := streams[name].read(CHUNK):
                        entry.write(piece)
                        yield pipe.take()
            yield pipe.take()
    yield pipe.take()


class _Pipe(io.RawIOBase):
    """What a zip is written to: nothing can go back to what was sent."""

    def __init__(self) -> None:
        super().__init__()
        self._pieces: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Buffer) -> int:
        self._pieces.append(bytes(data))
        return len(self._pieces[-1])

    def take(self) -> bytes:
        """What was written since the last time."""
        data = b"".join(self._pieces)
        self._pieces.clear()
        return data
