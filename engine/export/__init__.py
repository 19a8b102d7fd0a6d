"""Export: an artifact in another format. One file for each, with a function `export`; `formats` finds them."""

import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path

from engine.errors import UnknownName
from engine.export._offer import notes, offered, room

__all__ = ["exporter", "formats", "notes", "offered", "room"]


def formats() -> list[str]:
    """The names of all formats, without importing what writes them."""
    return sorted(info.name for info in pkgutil.iter_modules(__path__) if not info.name.startswith("_"))


def exporter(name: str) -> Callable[[Path, Path], None]:
    """The function that writes an artifact's folder as a folder in the format.

    Raises:
        UnknownName: there is no such format.
    """
    if name not in formats():
        raise UnknownName("format", name, formats())
    found: Callable[[Path, Path], None] = importlib.import_module(f"{__name__}.{name}").export
    return found
