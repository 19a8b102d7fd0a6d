"""Models of the hub: search, what a repo holds at which commit, and its headers before anything is downloaded.

What is here already is used first (`engine.snapshots`); downloading is `engine.download`'s. A token is passed from call
to call. Nothing here keeps it.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from pydantic import JsonValue

from engine import wire
from engine.configs import weight_names
from engine.errors import BadModel, HubError, MaquetteError, short
from engine.origin import INDEX, FolderOrigin, Origin, has_weights
from engine.records import Model
from engine.repos import Found, Listing, as_found, as_listing, check_token, refuse
from engine.snapshots import Snapshots
from engine.sources import Repo, classify

ENDPOINT = "https://huggingface.co"
KEPT = 60.0  # seconds for which what the hub said is believed
MOST = 64  # answers kept
LONGEST_ANSWER = 16 << 20  # bytes of JSON
AHEAD = 1 << 16  # bytes read of each weights file at once: most headers are shorter
MANY = 2000  # files of weights
BESIDE = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja",
)  # fmt: skip
OFFLINE = "{name} is not on this machine, and Maquette is offline (HF_HUB_OFFLINE)."
NOWHERE: Path | None = None
LARGEST = 64 << 20  # bytes of one piece of a file that is not here
T = TypeVar("T")


class RepoOrigin:
    """The files of a repo, read by HTTP range requests; what was read once is kept as long as this object."""

    def __init__(self, hub: Hub, listing: Listing, token: str) -> None:
        self.listing, self.folder = listing, NOWHERE
        self._hub, self._token = hub, token
        self._kept: dict[str, bytes] = {}
        self._guard = threading.Lock()

    @property
    def name(self) -> str:
        return self.listing.name

    @property
    def sizes(self) -> Mapping[str, int]:
        return self.listing.sizes

    def read(self, name: str, start: int, length: int) -> bytes:
        if name not in self.sizes:
            raise FileNotFoundError(name)
        end = min(start + length, self.sizes[name])
        if end - start > LARGEST:
            raise BadModel(f"{short(self.name)}: {short(name)} has a header of {length:,} bytes; that cannot be right.")
        with self._guard:
            have = self._kept.get(name, b"")
        if len(have) < end:
            if start > len(have):  # a piece further on, as the places of a bitmask: not worth keeping
                return self._hub.fetch(self.listing, name, start, end, self._token)
            have += self._hub.fetch(self.listing, name, len(have), max(end, min(AHEAD, self.sizes[name])), self._token)
            with self._guard:
                self._kept[name] = have
        return have[start:end]

    def read_ahead(self, names: list[str]) -> None:
        """Read the beginnings of many files at the same time."""
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda name: self.read(name, 0, 8), names))


class Hub:
    """One hub and one cache.

    folder: of the cache. endpoint: $HF_ENDPOINT, else the public hub. offline: nothing is asked of anybody, as
    $HF_HUB_OFFLINE says. trusting: what is in the cache may be used by whoever is here; else those who want a gated or
    private model show each time that the hub lets them.
    """

    def __init__(
        self, folder: Path, *, endpoint: str | None = None, offline: bool | None = None, trusting: bool = True
    ) -> None:
        self.here = Snapshots(folder)
        self.endpoint = (endpoint or os.environ.get("HF_ENDPOINT") or ENDPOINT).rstrip("/")
        said = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        self.offline = said if offline is None else offline
        self.trusting = trusting
        self._answers: dict[tuple[str, ...], tuple[float, object]] = {}
        self._guard = threading.Lock()
        self._allow: Callable[[], None] = lambda: None

    def allowing(self, allow: Callable[[], None]) -> Hub:
        """This hub for one asker: before each question that no kept answer answers, `allow` may raise."""
        hub = copy.copy(self)
        hub._allow = allow
        return hub

    # What the hub says

    def search(self, text: str, token: str = "", limit: int = 12) -> list[Found]:
        """Models that generate text whose names hold the text, those downloaded most first.

        Raises:
            HubError: the hub does not answer.
            NeedsToken: it does not accept the token.
        """
        query = [
            ("search", text.strip()[:100]), ("pipeline_tag", "text-generation"), ("filter", "safetensors"),
            ("sort", "downloads"), ("direction", "-1"), ("limit", str(limit)),
            *(("expand[]", name) for name in ("downloads", "gated", "safetensors")),
        ]  # fmt: skip
        path = f"/api/models?{urllib.parse.urlencode(query)}"
        body = self._once(("search", path, _digest(token)), lambda: self._json(path, token, "the search"))
        rows = body if isinstance(body, list) else []
        return [as_found(row) for row in rows[:limit] if isinstance(row, dict) and isinstance(row.get("id"), str)]

    def listing(self, repo: Repo, token: str = "") -> Listing:
        """What a repo holds at a revision; an answer is believed for a minute.

        Raises:
            NeedsToken: it is private, or does not exist: the hub says the same of both.
            BadModel: there is no such repo or revision.
            HubError: the hub does not answer.
        """
        revision = urllib.parse.quote(repo.revision or "main", safe="")
        path = f"/api/models/{repo.name}/revision/{revision}?blobs=true"

        def ask() -> Listing:
            body = self._json(path, token, repo.name, repo.revision)
            return as_listing(body, repo.name)

        return self._once(("listing", repo.name, repo.revision, _digest(token)), ask)

    def fetch(self, listing: Listing, file: str, start: int, end: int, token: str) -> bytes:
        """Bytes of a file.

        Raises:
            MaquetteError: as `listing`.
        """
        ask = wire.Ask(self.address(listing, file), token, start=start, stop=end)
        answer, body = wire.read(ask, end if start == 0 else end - start)
        refuse(answer, listing.name, token, listing.commit, file)
        if answer.status == 200:  # whoever knows no ranges begins at the beginning
            body = body[start:end]
        if len(body) != end - start:
            raise HubError(f"The hub sent {len(body)} of {end - start} bytes of {short(file)}. Try again.")
        return body

    def address(self, listing: Listing, file: str) -> str:
        """Where a file is read."""
        return f"{self.endpoint}/{listing.name}/resolve/{listing.commit}/{urllib.parse.quote(file)}"

    # What it means for a model

    def pin(self, model: Model, token: str = "") -> Model:
        """The model with the commit that its revision is now, and the name that a renamed repo has now.

        Raises:
            MaquetteError: as `listing`; or offline, where the revision was never asked for.
        """
        repo = _repo(model)
        if repo.pinned:
            return _as(model, repo.name, repo.revision)
        known = self.here.remembered(repo)
        if self.offline:
            if not known:
                raise HubError(OFFLINE.format(name=repo.name))
            return _as(model, repo.name, known)
        try:
            listing = self.listing(repo, token)
        except wire.Unreachable:
            if not known or not self.trusting:
                raise
            return _as(model, repo.name, known)
        if known:
            self.here.remember(repo, listing.commit)
        self._keep(("listing", listing.name, listing.commit, _digest(token)), listing, KEPT)
        return _as(model, listing.name, listing.commit)

    def remember(self, asked: Model, pinned: Model) -> None:
        """Note which commit a branch or tag was, so that it can be named again without a network."""
        repo = _repo(asked)
        if not repo.pinned:
            self.here.remember(Repo(_repo(pinned).name, repo.revision), pinned.revision)

    def origin(self, model: Model, token: str = "") -> Origin:
        """Where a model can be read from: the complete snapshot that is here, else the hub.

        Raises:
            MaquetteError: as `listing`; or offline, where the model is not here.
        """
        repo = _repo(self.pin(model, token))
        known = self.here.find(repo)
        if known is not None and (self.trusting or not self.here.restricted(repo)):
            return FolderOrigin(known, repo.name)
        if self.offline:
            raise HubError(OFFLINE.format(name=repo.name))
        origin = self._once(
            ("origin", repo.name, repo.revision, _digest(token)),
            lambda: self._open(self.listing(repo, token), token),
        )
        return origin if known is None else FolderOrigin(known, repo.name)

    def _open(self, listing: Listing, token: str) -> RepoOrigin:
        origin = RepoOrigin(self, listing, token)
        if "config.json" in listing.sizes:
            origin.read("config.json", 0, 1)  # a gated repo's list is public, its files are not
        if has_weights(listing.sizes):
            origin.read_ahead(_weights(origin))
        return origin

    def wanted(self, origin: Origin) -> dict[str, int]:
        """The files that are downloaded, and their bytes: weights as safetensors, config, tokenizer; no code.

        Raises:
            BadModel: there are no weights that can be used.
        """
        names = [*(name for name in (*BESIDE, INDEX) if name in origin.sizes), *_weights(origin)]
        return {name: origin.sizes[name] for name in names}

    def missing(self, model: Model, origin: Origin) -> int:
        """Bytes of a model that are still to be downloaded."""
        if not isinstance(origin, RepoOrigin):
            return 0
        return self.here.missing(_repo(model), self.wanted(origin), origin.listing.etags)

    def folder_of(self, model: Model) -> Path:
        """The complete snapshot of a model, for those who load it.

        Raises:
            BadModel: it is not here.
        """
        repo = _repo(model)
        if not repo.pinned:
            repo = Repo(repo.name, self.here.remembered(repo))
        folder = self.here.find(repo)
        if folder is None:
            raise BadModel(f"{repo.name} is not downloaded yet. Run it once, or give the folder of a run's model.")
        return folder.absolute()

    def _json(self, path: str, token: str, name: str, revision: str = "") -> JsonValue:
        if self.offline:
            raise HubError(OFFLINE.format(name=short(name)))
        answer, body = wire.read(wire.Ask(self.endpoint + path, check_token(token)), LONGEST_ANSWER, leave=False)
        refuse(answer, name, token, revision)
        try:
            found: JsonValue = json.loads(body)
        except (ValueError, RecursionError):
            raise HubError(f"What answers at {short(self.endpoint)} is no hub: its answer is not JSON.") from None
        return found

    def _once(self, key: tuple[str, ...], ask: Callable[[], T]) -> T:
        """What was answered within the last minute, else what is answered now; a refusal is kept too, but shorter."""
        with self._guard:
            until, known = self._answers.get(key, (0.0, None))
        if time.monotonic() < until:
            if isinstance(known, MaquetteError):
                raise known.with_traceback(None)
            return known  # type: ignore[return-value]
        self._allow()
        try:
            found: object = ask()
        except MaquetteError as error:
            found = error
        kept = KEPT if not isinstance(found, MaquetteError) else 0.0 if isinstance(found, HubError) else KEPT / 6
        self._keep(key, found, kept)
        if isinstance(found, MaquetteError):
            raise found
        return found  # type: ignore[return-value]

    def _keep(self, key: tuple[str, ...], found: object, kept: float) -> None:
        now = time.monotonic()
        with self._guard:
            for old in [key for key, (until, _) in self._answers.items() if until < now]:  # tokens among them
                del self._answers[old]
            while len(self._answers) >= MOST:
                self._answers.pop(next(iter(self._answers)))
            self._answers[key] = (now + kept, found)


def _repo(model: Model) -> Repo:
    found = classify(model, folders=False)
    if not isinstance(found, Repo):
        raise BadModel(f"{short(model.source)} is no model of the hub.")
    return found


def _as(model: Model, name: str, revision: str) -> Model:
    return model.model_copy(update={"source": name, "revision": revision})


def _weights(origin: Origin) -> list[str]:
    names = weight_names(origin)
    if len(names) > MANY:
        raise BadModel(f"{short(origin.name)} has its weights in {len(names):,} files; that cannot be right.")
    return names


def _digest(token: str) -> str:
    """What stands for a token among the keys of answers: an answer to one visitor is none to another."""
    return hashlib.sha256(token.encode()).hexdigest() if token else ""
