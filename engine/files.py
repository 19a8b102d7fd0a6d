"""Files that survive a power cut: written beside their place, made durable, renamed into it; and files that runs share.

A shared file is a link of what a run has in a folder of its own. The ones used longest ago make room: who uses one has
a link too, so that nothing is taken from under it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

MANIFEST = "MANIFEST.json"  # of an artifact: the size and SHA-256 of each file


@dataclass(frozen=True)
class Unused:
    """Files that nobody uses now and that can be had again; `used`: when they last were, in seconds since the epoch.

    remove: gives their disk back, at most what `folder` holds.
    """

    used: float
    name: str
    folder: Path
    remove: Callable[[], object]


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


def as_usual(path: Path) -> None:
    """Give a file the permissions of any other: safetensors keeps from others what it writes."""
    usual = path.with_name(f"{path.name}.usual")
    usual.touch()
    shutil.copymode(usual, path)
    usual.unlink()


def read_ahead(path: Path, start: int = 0, length: int = 0) -> None:
    """Ask the system to read bytes of a file (0: to its end) ahead; returns at once and takes none of our memory."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), start, length, os.POSIX_FADV_WILLNEED)


def publish(temporary: Path, path: Path) -> None:
    """Give a complete file or folder its final name: a reader sees the old state or the new, never a part."""
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """A second name for a file; on a disk without hard links a copy.

    Raises:
        OSError: neither can be made.
    """
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:
        shutil.copyfile(source, target)


def fetch(own: Path, shared: Path) -> bool:
    """Whether a shared file could be linked to a run's `own` place."""
    own.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(shared, own)
        os.utime(shared)
    except FileExistsError:  # another process of the run was first
        return True
    except OSError:  # gone, or on a disk without links
        return own.exists()
    return True


def give(own: Path, shared: Path, room: Path, share: float) -> None:
    """Share a run's own file in a folder of `room`, where its size is within that share of the free disk."""
    if make_room(room, "*/*", own.stat().st_size, share):
        with suppress(OSError):  # a disk without links; a folder that another run has just removed
            shared.parent.mkdir(parents=True, exist_ok=True)
            shared.unlink(missing_ok=True)
            os.link(own, shared)


def make_room(folder: Path, pattern: str, needed: int, share: float) -> bool:
    """Make `needed` bytes more fit in a share of the free disk; whether they can.

    Deletes the files and folders that `pattern` names, the ones used longest ago first.
    """
    found = []
    for each in folder.glob(pattern):
        with suppress(OSError):  # another run makes room, too
            files = each.iterdir() if each.is_dir() else [each]
            found.append((each.stat().st_mtime, each, sum(file.stat().st_size for file in files)))
    found.sort()
    held = sum(size for _, _, size in found)
    disk = next(parent for parent in (folder, *folder.parents) if parent.exists())
    limit = share * (shutil.disk_usage(disk).free + held)
    while found and held + needed > limit:
        _, oldest, size = found.pop(0)
        held -= size
        if oldest.is_dir():
            shutil.rmtree(oldest, ignore_errors=True)
        else:
            oldest.unlink(missing_ok=True)
            with suppress(OSError):  # other files are in it
                oldest.parent.rmdir()
    return needed <= limit
