"""Whom a server serves, and what each of them may take: the mode, and the one record of its limits.

    local     this machine alone: loopback, no login, no folder is out of reach
    team      people with a name and a password; each has own runs, and may share them with the others
    public    anybody, known by a signed cookie; small models, short runs, artifacts for a day

`MAQUETTE_MODE` names the mode; on a Space it is `public`. Each limit can be set by a variable of its own.
"""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from engine.errors import InputError, short

GIB = 1 << 30
ANYBODY = "*"
ORGANISATIONS = (
    "EleutherAI", "HuggingFaceTB", "Qwen", "TinyLlama", "allenai", "bigscience", "distilbert", "facebook", "google",
    "ibm-granite", "meta-llama", "microsoft", "mistralai", "openai-community", "stabilityai", "tiiuae",
)  # fmt: skip


class Mode(StrEnum):
    """Whom a server serves."""

    LOCAL = "local"
    TEAM = "team"
    PUBLIC = "public"


@dataclass(frozen=True)
class Limits:
    """What one visitor may take. None: as much as there is.

    running, queued: runs. seconds: of one start of a run. disk: bytes below the visitor's runs. floor: bytes that
    stay free on the disk, whoever asks. downloads: bytes of the hub's models that are kept, beside those in use.
    keep: seconds after which the files of a run that has ended are deleted. parameters, model_bytes: of a model
    that is compressed. folders: whether folders and texts of the server may be named. organisations: whose models
    of the hub may be. starts, streams, questions, requests: in a minute, of one visitor; `crowd` times as many of
    one address, behind which there may be several. questions: of the hub.
    """

    running: int = 1
    queued: int = 3
    seconds: float | None = None
    disk: int | None = None
    floor: int = 0
    downloads: int | None = None
    keep: float | None = None
    parameters: int | None = None
    model_bytes: int | None = None
    folders: bool = True
    organisations: tuple[str, ...] | None = None
    starts: int | None = None
    streams: int | None = None
    questions: int | None = None
    requests: int | None = None
    crowd: int = 8


LIMITS: Mapping[Mode, Limits] = {
    Mode.LOCAL: Limits(),
    Mode.TEAM: Limits(floor=2 * GIB, folders=False, starts=30, streams=30, questions=60, requests=1200),
    Mode.PUBLIC: Limits(
        queued=2, seconds=1800, disk=4 * GIB, floor=2 * GIB, downloads=16 * GIB, keep=86_400,
        parameters=1_500_000_000, model_bytes=4 * GIB, folders=False, organisations=ORGANISATIONS, starts=6,
        streams=12, questions=60, requests=600,
    ),
}  # fmt: skip
SETTINGS: Mapping[str, tuple[str, float]] = {  # variable: the limit it sets, and the unit it is given in
    "MAQUETTE_QUEUED_RUNS": ("queued", 1),
    "MAQUETTE_RUN_MINUTES": ("seconds", 60),
    "MAQUETTE_DISK_GIB": ("disk", GIB),
    "MAQUETTE_FREE_GIB": ("floor", GIB),
    "MAQUETTE_HUB_GIB": ("downloads", GIB),
    "MAQUETTE_KEEP_HOURS": ("keep", 3600),
    "MAQUETTE_MAX_PARAMETERS": ("parameters", 1),
    "MAQUETTE_MAX_MODEL_GIB": ("model_bytes", GIB),
}
WHOLE = frozenset({"queued", "disk", "floor", "downloads", "parameters", "model_bytes"})


def mode_of(environment: Mapping[str, str]) -> Mode:
    """The mode that the environment asks for.

    Raises:
        InputError: it names none.
    """
    named = environment.get("MAQUETTE_MODE", "").strip().lower()
    if not named:
        return Mode.PUBLIC if environment.get("SPACE_ID") else Mode.LOCAL
    try:
        return Mode(named)
    except ValueError:
        modes = ", ".join(Mode)
        raise InputError(f"MAQUETTE_MODE is {short(named)!r}; it must be one of {modes}.") from None


def limits_of(mode: Mode, environment: Mapping[str, str]) -> Limits:
    """The limits of a mode, with those that the environment sets.

    Raises:
        InputError: a variable holds no number above 0.
    """
    changes: dict[str, object] = {}
    for variable, (name, unit) in SETTINGS.items():
        text = environment.get(variable, "").strip()
        if text:
            value = _number(variable, text) * unit
            changes[name] = int(value) if name in WHOLE else value
    if text := environment.get("MAQUETTE_ORGANISATIONS", "").strip():
        names = tuple(name.strip() for name in text.split(",") if name.strip())
        changes["organisations"] = None if ANYBODY in names else names
    change: Callable[..., Limits] = replace
    return change(LIMITS[mode], **changes)


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's own, reached by nobody else."""
    name = host.strip("[]").rstrip(".").lower()
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")


def check_address(mode: Mode, host: str) -> None:
    """Refuse to listen where others could come as if they sat here.

    Raises:
        InputError: with what to do instead.
    """
    if mode is Mode.LOCAL and not is_loopback(host):
        raise InputError(
            f"In local mode Maquette listens on this machine alone, not on {short(host)!r}. Set MAQUETTE_MODE=team "
            "(with `python -m engine user add NAME`) or MAQUETTE_MODE=public, or HOST=127.0.0.1."
        )


def _number(variable: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value <= 0:
        raise InputError(f"{variable} is {short(text)!r}; it must be a number above 0.")
    return value
