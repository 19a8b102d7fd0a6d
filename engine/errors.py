"""The errors a user may read. Each says what happened, to what, and what to do.

MaquetteError
├── InputError            refused before any work; exit code 2
│   ├── UnknownName       no such method, measurement, key: with the nearest valid names
│   ├── BadParams         a value out of its bounds
│   ├── BadRecipe         the recipe's shape or the order of its steps
│   ├── BadModel          the model cannot be used: not found, unsafe, broken, not a causal LM
│   │   └── NeedsToken    gated or private, and no token came that may read it
│   ├── BadText           calibration or training text that cannot be used
│   ├── TooBig            does not fit in the memory or on the disk that is free
│   └── TooMany           more than one visitor may have at a time
├── RunError              a run that had started ended without a result
│   ├── Cancelled         the user asked for it
│   ├── Interrupted       the process was stopped from outside; can be resumed
│   ├── Diverged          training went to NaN or above its limit
│   ├── BadArtifact       the saved model is not the model that was in memory
│   └── HubError          the hub cannot be reached, is busy, or sends nothing; can be tried again
└── StoreError            the run store cannot be opened or used
    ├── StoreBusy         another server uses this folder
    ├── DiskFull          there is no room for what was to be stored
    └── StoreTooNew       written by a later version of Maquette
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable


class MaquetteError(Exception):
    """Root of everything a user may read; `str(error)` is one helpful line."""


class InputError(MaquetteError):
    """The request was refused before any work started."""


class UnknownName(InputError):
    """A name that does not exist."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        near = difflib.get_close_matches(name, names, n=2, cutoff=0.5)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        listed = f" Available: {', '.join(names)}." if names else ""
        super().__init__(f"Unknown {kind} {short(name)!r}.{hint}{listed}")


class BadParams(InputError):
    """A setting of a method is out of its bounds."""


class BadRecipe(InputError):
    """The recipe cannot be read or its steps cannot follow one another."""


class BadModel(InputError):
    """The model cannot be used."""


class NeedsToken(BadModel):
    """The model may be read only with a token, and none that may came along."""


class BadText(InputError):
    """The calibration or training text cannot be used."""


class TooBig(InputError):
    """The work does not fit into what is free."""


class TooMany(InputError):
    """More than one visitor may have, or too soon."""


class RunError(MaquetteError):
    """A run ended without a result."""


class Cancelled(RunError):
    """The user cancelled the run."""


class Interrupted(RunError):
    """The run was stopped from outside and can be resumed."""


class Diverged(RunError):
    """Training diverged."""


class BadArtifact(RunError):
    """The saved model does not compute what the model in memory computed."""


class HubError(RunError):
    """The hub does not answer as it should; nothing is wrong with what was asked."""


class StoreError(MaquetteError):
    """The run store cannot be used."""


class StoreBusy(StoreError):
    """Another server holds the store."""


class DiskFull(StoreError):
    """There is no room for what was to be stored."""


class StoreTooNew(StoreError):
    """The store was written by a later version."""


def short(text: object, limit: int = 60) -> str:
    """`text` cut to `limit` characters, for quoting a user's input in an error."""
    line = str(text)
    return line if len(line) <= limit else line[: limit - 1] + "…"


def os_reason(error: OSError) -> str:
    """One line about a file that could not be written, or read."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "The disk is full. Delete old runs or choose another folder with MAQUETTE_HOME, then try again."
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return "The data folder cannot be written. Choose another with MAQUETTE_HOME, or let this user write to it."
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "Too many files are open. Raise the limit (ulimit -n) or end other programs, then try again."
    named = f" {short(str(error.filename).rpartition('/')[2])}" if error.filename else ""
    return f"The file{named} could not be used: {error.strerror or error}. The log has the details."
