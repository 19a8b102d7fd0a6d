"""What the hub says of its models, read with care: hits of a search, what a repo holds, and why it says no."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from pydantic import JsonValue

from engine.errors import BadModel, HubError, MaquetteError, NeedsToken, short
from engine.records import Model
from engine.sources import COMMIT, Repo, classify
from engine.wire import Answer

WIDTHS = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2, "F4": 0.5}


@dataclass(frozen=True)
class Found:
    """One hit of a search. `size`: bytes of its weights, None where the hub does not tell."""

    name: str
    downloads: int = 0
    size: int | None = None
    gated: bool = False


@dataclass(frozen=True)
class Listing:
    """What a repo holds at one commit. `restricted`: gated or private, so that not everybody may read it."""

    name: str
    commit: str
    sizes: Mapping[str, int]
    restricted: bool = False
    licence: str = ""
    etags: Mapping[str, str] = field(default_factory=dict)


def as_listing(body: JsonValue, name: str) -> Listing:
    """A repo as `/api/models/.../revision` tells it; only files at the top can belong to a model."""
    row = body if isinstance(body, dict) else {}
    commit, siblings = row.get("sha"), row.get("siblings")
    if not isinstance(commit, str) or not COMMIT.fullmatch(commit) or not isinstance(siblings, list):
        raise HubError(f"The hub says nothing usable about {short(name)}. Try again later.")
    sizes: dict[str, int] = {}
    etags: dict[str, str] = {}
    for each in siblings:
        if not isinstance(each, dict) or not isinstance(file := each.get("rfilename"), str) or "/" in file:
            continue
        if isinstance(size := each.get("size"), int) and size >= 0:
            sizes[file] = size
            large = each.get("lfs")
            etag = large.get("sha256") if isinstance(large, dict) else each.get("blobId")
            etags[file] = etag if isinstance(etag, str) else ""
    card = row.get("cardData")
    licence = card.get("license") if isinstance(card, dict) else None
    if not isinstance(licence, str):
        tags = row.get("tags")
        words = [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else []
        licence = next((tag.removeprefix("license:") for tag in words if tag.startswith("license:")), "")
    known = row.get("id")
    canonical = known if isinstance(known, str) and _is_name(known) else name
    return Listing(canonical, commit, sizes, bool(row.get("gated") or row.get("private")), licence[:60], etags)


def _is_name(text: str) -> bool:
    try:
        return classify(Model.model_validate(text), folders=False) == Repo(text)
    except (MaquetteError, ValueError):
        return False


def as_found(row: Mapping[str, JsonValue]) -> Found:
    downloads, weights = row.get("downloads"), row.get("safetensors")
    size = None
    if isinstance(weights, dict) and isinstance(by_dtype := weights.get("parameters"), dict):
        size = round(sum(WIDTHS.get(kind, 1) * n for kind, n in by_dtype.items() if isinstance(n, int)))
    return Found(str(row["id"])[:200], downloads if isinstance(downloads, int) else 0, size, bool(row.get("gated")))


class Busy(HubError):
    """The hub asks to come back; `after` so many seconds, where it says."""

    def __init__(self, text: str, after: float | None) -> None:
        super().__init__(text)
        self.after = after


def check_token(token: str) -> str:
    """The token, if it can be one.

    Raises:
        BadModel: it holds what cannot be sent; it is not quoted.
    """
    if token and not (len(token) <= 500 and re.fullmatch(r"[\x21-\x7e]+", token)):
        raise BadModel("The token holds spaces or other characters that no token has. Paste it again.")
    return token


def refuse(answer: Answer, name: str, token: str, revision: str = "", file: str = "") -> None:
    """Say in one line why the hub did not give what was asked.

    Raises:
        NeedsToken: gated, private, or unknown to whoever asks.
        BadModel: no such repo, revision or file.
        HubError: it is busy or broken.
    """
    status, code, shown = answer.status, answer.headers.get("x-error-code", ""), short(name)
    if status < 300:
        return
    if code == "GatedRepo" or (status == 403 and code != "RepoNotFound"):
        raise NeedsToken(
            f"{shown} is gated: accept its conditions at huggingface.co/{shown} and give a token of that account."
            if not token
            else f"{shown} is gated, and this token's account may not read it: ask for it at huggingface.co/{shown}."
        )
    if status == 401 and token and code != "RepoNotFound":
        raise NeedsToken(f"The hub does not accept this token (for {shown}). It may have expired: give another.")
    if status in (401, 404) and code in ("RepoNotFound", "") and not file:
        raise NeedsToken(
            f"There is no model {shown} on the hub, or it is private. Check its name"
            + (", or whether the token's account may read it." if token else ", or give a token that may read it.")
        )
    if code == "RevisionNotFound":
        raise BadModel(f"{shown} has no revision {short(revision)!r}. Give a branch, a tag or a commit of it.")
    if status == 404:
        raise BadModel(f"{shown} has no file {short(file)} at this revision.")
    why = "too many requests" if status == 429 else "it is out of order"
    text = answer.headers.get("retry-after", "")
    after = float(text) if re.fullmatch(r"\d{1,9}(\.\d+)?", text) else None
    raise Busy(f"The hub answers {status} for {shown}: {why}. Try again in a few minutes.", after)
