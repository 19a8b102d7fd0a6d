"""`python -m engine.download`: the process that downloads a model of the hub; `engine.fetch` starts and watches it.

One line of JSON on stdin says what, with the token, which stands nowhere else. Lines on stdout say how far it is:

    {"done": bytes, "total": bytes, "came": bytes that this process received}
    {"rest": seconds in which nothing will come} · {"log": text}
    {"error": kind or nothing, "text"}      the last one
"""

from __future__ import annotations

import fcntl
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from pydantic import JsonValue

from engine.errors import BadModel, HubError, TooBig, os_reason, short
from engine.hub import Hub, RepoOrigin
from engine.records import Model
from engine.repos import Busy
from engine.snapshots import bytes_of
from engine.sources import Repo, classify
from engine.transfer import Damaged, transfer

TELL = 0.25  # seconds between two lines of the process
Json = dict[str, JsonValue]
T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
    """How long a hub may misbehave. `window`: seconds in which `floor` bytes a second must come on average.

    tries: in a row without a byte more. pause: seconds before the second try, doubled before each further one up to
    `longest`, which also bounds what a Retry-After may ask for.
    """

    window: float = 30.0
    floor: float = 1024.0
    tries: int = 6
    pause: float = 1.0
    longest: float = 120.0

    @property
    def enough(self) -> float:
        """Bytes that must come within a window."""
        return self.floor * self.window

    def before(self, number: int) -> float:
        """Seconds before the try of that number, from 1."""
        return float(min(self.longest, self.pause * 2 ** (number - 1)))


def main() -> int:
    """Download what the line on stdin asks for; says how far it is on stdout, last an `error` that may be empty."""
    order = json.loads(sys.stdin.readline())
    said = 0.0

    def tell(body: Json) -> None:
        sys.stdout.write(json.dumps(body) + "\n")
        sys.stdout.flush()

    def done(count: int, total: int, came: int) -> None:
        nonlocal said
        if time.monotonic() - said >= TELL or count == total:
            said = time.monotonic()
            tell({"done": count, "total": total, "came": came})

    tell({"rest": 0})  # here I am
    try:
        hub = Hub(Path(order["folder"]), endpoint=order["endpoint"], offline=False)
        model = Model.model_validate({"source": order["source"], "revision": order["revision"]})
        work(hub, model, order["token"], Patience(**order["patience"]), done, tell)
    except (BadModel, TooBig) as error:
        tell({"error": type(error).__name__, "text": str(error)})
        return 1
    except HubError as error:
        tell({"error": "HubError", "text": str(error)})
        return 1
    except OSError as error:
        tell({"error": "HubError", "text": os_reason(error)})
        return 1
    tell({"error": "", "text": ""})
    return 0


def work(
    hub: Hub, model: Model, token: str, patience: Patience, done: Callable[[int, int, int], None],
    tell: Callable[[Json], None],
) -> None:  # fmt: skip
    """All files that a model needs and that are not here, each retried where the hub is busy.

    Raises:
        MaquetteError: one line that says why it cannot be done.
    """
    repo = classify(model, folders=False)
    assert isinstance(repo, Repo)
    here = hub.here
    with _alone(here.folder, repo, tell):
        tried = Tries(patience, tell)
        listing = replace(tried(lambda: hub.listing(repo, token)), name=repo.name)
        sizes = tried(lambda: hub.wanted(RepoOrigin(hub, listing, token)))
        left = here.missing(repo, sizes, listing.etags)
        if left > (free := here.free()):
            raise TooBig(
                f"{repo.name} needs {left / 2**30:.2f} GiB more on the disk, {max(0, free) / 2**30:.2f} are free. "
                "Delete old runs, or choose another folder with MAQUETTE_HOME."
            )
        here.want(repo, sizes, listing.restricted)
        total, before, came, gained = sum(sizes.values()), 0, 0, 0
        furthest = dict.fromkeys(sizes, 0)

        def count(name: str, written: int, piece: int) -> None:
            nonlocal came, gained
            came += piece
            gained += max(0, min(piece, written - furthest[name]))  # not what comes again, from a hub without ranges
            furthest[name] = max(furthest[name], written)
            tried.heard(gained)
            done(before + written, total, came)

        for name, size in sizes.items():
            if bytes_of(here.place(repo) / "snapshots" / repo.revision / name) != size:
                tried(partial(transfer, hub, listing, name, token, partial(count, name)))
            before += size
            done(before, total, came)


class Tries:
    """Does things again where the hub is busy, later and later."""

    def __init__(self, patience: Patience, tell: Callable[[Json], None]) -> None:
        self._patience, self._tell, self._failed = patience, tell, 0
        self._damaged = False
        self._mark = 0  # bytes that had been gained when the count began

    def heard(self, gained: int) -> None:
        """So many bytes have come that were not here before: where it is enough, the count begins again."""
        if gained - self._mark >= self._patience.enough or not self._failed:
            self._mark, self._failed = gained, 0

    def __call__(self, work: Callable[[], T]) -> T:
        while True:
            try:
                return work()
            except HubError as error:
                self._failed += 1
                pause = self._patience.before(self._failed)
                if isinstance(error, Busy) and error.after is not None:
                    pause = max(pause, error.after)
                twice, self._damaged = self._damaged, isinstance(error, Damaged)
                if (twice and self._damaged) or self._failed >= self._patience.tries or pause > self._patience.longest:
                    raise
                self._tell({"rest": pause, "log": f"{short(error, 300)} Going on in {pause:.0f} s."})
                time.sleep(pause)


@contextmanager
def _alone(folder: Path, repo: Repo, tell: Callable[[Json], None]) -> Iterator[None]:
    """Only one process downloads a repo at a time; others wait for it."""
    path = folder / ".locks" / f"{repo.name.replace('/', '--')}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as lock:
        waited = False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                tell({"rest": 5.0} if waited else {"rest": 5.0, "log": "Another run downloads this model; waiting."})
                waited = True
                time.sleep(0.5)
        yield


if __name__ == "__main__":
    sys.exit(main())
