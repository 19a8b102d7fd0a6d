"""One file of the hub into the cache: from where an earlier attempt stopped, checked, then put in its place.

huggingface_hub 2.4 cannot do the first: it writes to a name of its own process, and a process that dies takes what came
with it. So what a killed run had downloaded is kept here, in the layout of huggingface_hub's cache.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path

from engine import wire
from engine.errors import BadModel, HubError, short
from engine.files import publish
from engine.hub import Hub
from engine.repos import Listing, refuse
from engine.snapshots import bytes_of
from engine.sources import Repo

NEVER = 1e18  # whoever watches ends it
Count = Callable[[int, int], None]


class Damaged(HubError):
    """The content that came is not what its name says."""


def transfer(hub: Hub, listing: Listing, name: str, token: str, count: Count) -> None:
    """Bring one file here; `count` hears how many bytes of it are, and how many of these have just come.

    Raises:
        HubError: it broke off, or the hub is busy: what came is kept.
        BadModel: it is not what the hub had announced.
        NeedsToken: it may not be read.
    """
    repo = Repo(listing.name, listing.commit)
    url = hub.address(listing, name)
    answer, _ = wire.read(wire.Ask(url, token, method="HEAD"), 0)
    _look(answer, listing, token, name)
    etag, size = answer.etag, answer.size
    if not re.fullmatch(r"[\w.-]{8,128}", etag) or etag.startswith("."):
        raise HubError(f"The hub names no content for {short(name)}: it gives no ETag that can be used.")
    if size is None or size != listing.sizes[name]:
        raise BadModel(f"{short(name)} has {size} bytes where the hub had announced {listing.sizes[name]}.")
    blob = hub.here.place(repo) / "blobs" / etag
    if bytes_of(blob) != size or not blob.is_file():
        blob.parent.mkdir(parents=True, exist_ok=True)
        partial = blob.with_name(f"{etag}.incomplete")
        _append(wire.Ask(url, token, start=_resumable(partial, size)), partial, size, listing, count)
        _check(partial, etag, size, name)
        publish(partial, blob)
    hub.here.link(repo, name, etag)


def _append(ask: wire.Ask, partial: Path, size: int, listing: Listing, count: Count) -> None:
    if ask.start == size:
        return
    name = ask.url.rpartition("/")[2]
    with wire.answered(ask) as (answer, body), partial.open("ab") as file:
        _look(answer, listing, ask.token, name)
        if answer.status == 200:  # ranges are not known there: from the beginning
            file.truncate(0)
        elif not answer.headers.get("content-range", "").startswith(f"bytes {ask.start}-"):
            raise HubError(f"The hub sent another part of {short(name)} than was asked for. Try again.")
        written = file.tell() if answer.status != 200 else 0
        count(written, 0)
        for piece in wire.parts(body, NEVER, size - written + 1):
            file.write(piece)
            file.flush()
            written += len(piece)
            count(written, len(piece))
        os.fsync(file.fileno())
    if written < size:
        raise HubError(f"The download of {short(name)} broke off at {written:,} of {size:,} bytes.")


def _resumable(partial: Path, size: int) -> int:
    """How many bytes an earlier attempt has left; what cannot be right is thrown away."""
    have = bytes_of(partial)
    if have > size:
        partial.unlink()
        return 0
    return have


def _check(partial: Path, etag: str, size: int, name: str) -> None:
    """Believe a file only where its content is what its name says: large files are named by their SHA-256."""
    right = bytes_of(partial) == size
    if right and re.fullmatch(r"[0-9a-f]{64}", etag):
        with partial.open("rb") as stream:
            right = hashlib.file_digest(stream, "sha256").hexdigest() == etag
    if not right:
        partial.unlink(missing_ok=True)
        raise Damaged(f"{short(name)} arrived damaged: its content is not what the hub had announced.")


def _look(answer: wire.Answer, listing: Listing, token: str, name: str) -> None:
    if not (300 < answer.status < 309 and "x-linked-etag" in answer.headers):  # the head of what another host holds
        refuse(answer, listing.name, token, listing.commit, name)
