"""Which kind of model a text means: the bundled one, a folder of this machine, or a repo of the hub."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import ValidationError

from engine.errors import BadModel, short
from engine.records import Model

BUNDLED = "demo"
HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
WAYS = "Write `demo`, a model of the hub as owner/name, or a folder that begins with / ./ ../ or ~."
LONGEST = 96  # characters of a repo's name, as the hub has it
COMMIT = re.compile(r"[0-9a-f]{40}")
_NAME = re.compile(r"[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?(?:/[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?)?", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9][\w.+-]*(?:/[\w.+-]+)*", re.ASCII)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


@dataclass(frozen=True)
class Bundled:
    """The model that comes with Maquette."""


@dataclass(frozen=True)
class Folder:
    """A folder of this machine; whether it is there is not said."""

    path: Path


@dataclass(frozen=True)
class Repo:
    """A repo of the hub, `owner/name` or an old-style `name`, at a branch, tag or commit; empty: main."""

    name: str
    revision: str = ""

    @property
    def pinned(self) -> bool:
        """Whether the revision is a commit, which never changes."""
        return COMMIT.fullmatch(self.revision) is not None


def split(text: str) -> list[str]:
    """The names of several, separated by spaces; one that holds a space stands in quotes, as in a shell.

    Raises:
        ValueError: a quote is not closed.
    """
    try:
        return shlex.split(text)
    except ValueError:
        raise ValueError("a quote is not closed. Put a name that holds spaces or quotes in quotes") from None


def named(text: str) -> Model:
    """The model that a text names, as the field of a recipe's model takes it.

    Raises:
        BadModel: it names none.
    """
    try:
        return Model.model_validate({"source": text.strip()})
    except ValidationError:
        if text.strip():
            raise BadModel(f"{short(text)!r} is too long for the name of a model. {WAYS}") from None
        raise BadModel(f"The model is empty or holds a NUL character. {WAYS}") from None


def written(model: Model) -> str:
    """The text that names a model, its revision too."""
    return f"{model.source}@{model.revision}" if model.revision else model.source


def classify(model: Model, *, folders: bool = True) -> Bundled | Folder | Repo:
    """What a recipe's model is. `folders`: whether this machine's may be named, or even looked at.

    Raises:
        BadModel: it is none of the three, or could be two; one line says how to write what is meant.
    """
    text, revision = model.source.strip(), model.revision
    if not text or "\0" in text:
        raise BadModel(f"The model is empty or holds a NUL character. {WAYS}")
    if text == BUNDLED:
        if revision:
            raise BadModel("The bundled model has no revisions. Write `demo` alone.")
        return Bundled()
    if _SCHEME.match(text):
        text, named = _address(text)
        revision = revision or named
        return Repo(_checked(text), _revision(revision))
    like_path = is_path(model)
    if like_path or (folders and not revision and _is_folder(text)):
        if not folders:
            raise BadModel("Folders of the server cannot be named here. Write `demo` or a model of the hub.")
        if revision:
            raise BadModel(f"The folder {short(text)!r} has no revisions; only a model of the hub has.")
        if not like_path and _NAME.fullmatch(text):
            raise BadModel(
                f"{short(text)!r} is a folder here and may be a model of the hub too. "
                f"Write ./{short(text)} for the folder, {short(text)}@main for the hub's."
            )
        return Folder(_home(text))
    return Repo(_checked(text), _revision(revision))


_base: list[Path] = []  # none: where this process stands


def stay_in(folder: Path) -> None:
    """Let relative paths go on from a folder, wherever this process will stand: the page's server leaves its own."""
    _base[:] = [folder]


def place(text: str) -> Path:
    """The whole path of a file or folder that somebody has named; whether it is there is not said.

    Raises:
        RuntimeError: it begins with `~` and a name that nobody has here.
    """
    return Path(*_base, Path(text).expanduser()).absolute()


def _home(text: str) -> Path:
    try:
        return place(text)
    except RuntimeError:
        raise BadModel(f"There is no model folder {short(text)!r}. {WAYS}") from None  # nobody of that name


def is_path(model: Model) -> bool:
    """Whether a model is written as a folder; nothing is looked at."""
    text = model.source.strip()
    return text.startswith(("/", "./", "../", "~")) or text in (".", "..")


def _is_folder(text: str) -> bool:
    try:
        return place(text).is_dir()
    except (OSError, ValueError, RuntimeError):
        return False


def _address(text: str) -> tuple[str, str]:
    """The repo and revision in an address of the hub's pages, as visitors paste it."""
    try:
        parts = urlsplit(text)
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or (parts.hostname or "") not in HOSTS:
        raise BadModel(f"{short(text)!r} is no address of a model at huggingface.co. {WAYS}")
    words = [word for word in parts.path.split("/") if word]
    if len(words) > 3 and words[2] in ("tree", "blob", "resolve", "commit"):
        return "/".join(words[:2]), words[3]
    if not words or len(words) > 2 or words[0] in ("datasets", "spaces", "models", "docs"):
        raise BadModel(f"{short(text)!r} is not the address of a model. It reads https://huggingface.co/owner/name.")
    return "/".join(words), ""


def _checked(text: str) -> str:
    """A repo's name, as the hub allows it."""
    shown = short(text)
    if len(text) > LONGEST:
        raise BadModel(f"{shown!r} is too long for a model of the hub, whose names have up to {LONGEST} characters.")
    if text.count("/") > 1:
        raise BadModel(f"{shown!r} has more than one slash: a model of the hub is owner/name. {WAYS}")
    if ".." in text or "--" in text or text.endswith(".git") or not _NAME.fullmatch(text):
        raise BadModel(
            f"{shown!r} cannot be the name of a model of the hub: letters, digits, single - and ., and _. {WAYS}"
        )
    return text


def _revision(text: str) -> str:
    if text and (len(text) > 255 or ".." in text or not _REVISION.fullmatch(text)):
        raise BadModel(f"{short(text)!r} cannot be a revision. Write a branch, a tag or a commit, or leave it empty.")
    return text
