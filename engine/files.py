"""Files that survive a power cut: written beside their place, made durable, renamed into it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

MANIFEST = "MANIFEST.json"  # of an artifact: the size and SHA-256 of each file


def digest(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Make a file's content, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, path: Path) -> None:
    """Give a complete file or folder its final name: a reader sees the old state or the new, never a part."""
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)
