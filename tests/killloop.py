"""Kill workers and servers at named points and at random, go on, and check that nothing is lost or half done.

    python tests/killloop.py --runs 200 [--seed 0] [--lanes 2] [--mutant NAME]

What is checked, after each kill and at the end of each run:
    G1  a run that is marked succeeded, or names an artifact, has it complete: every file with the size and
        SHA-256 of its manifest; and a folder called `artifact` is never half written, whoever looks at it
    G2  a dead run becomes interrupted, a live one is adopted by the next server; resumed, it reads every
        block that was finished instead of computing it again
    G3  the artifact is byte for byte that of a run that nobody disturbed

Starting Python with torch takes seconds, a run of the tiny model half of one. So a `nursery` process that has
imported everything and computed nothing forks the servers and the workers; see `nursery.py`. `--mutant` breaks
the product on purpose: the loop must then fail, or it proves nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from engine.attempts import attempt_folder, is_live, read_pid  # noqa: E402
from engine.records import Run, Status  # noqa: E402
from engine.store import Store  # noqa: E402
from tests.nursery import MUTANTS, ask  # noqa: E402

log = logging.getLogger("killloop")

BLOCKS = 4
PATIENCE = 120.0  # seconds for a run to reach its next state

# Where a worker may be killed: before or after the n-th event of a kind, replacement of a file, or fsync.
POINTS = (
    *(f"{when}:progress:{n}" for when in ("before", "after") for n in range(1, BLOCKS + 1)),
    *(f"{when}:{what}:1" for when in ("before", "after") for what in ("artifact", "finished")),
    *(f"{when}:replace:{n}" for when in ("before", "after") for n in range(1, BLOCKS + 3)),
    *(f"before:fsync:{n}" for n in range(1, 14)),
)


class BrokenPromiseError(AssertionError):
    """A promise was not kept."""


# The loop


@dataclass
class Tally:
    """What happened; `reused` and `finished` count blocks."""

    runs: int = 0
    kills: dict[str, int] = field(default_factory=dict)
    servers_killed: int = 0
    adopted: int = 0
    reused: int = 0
    finished: int = 0


class Lane:
    """One data folder with its server, on which runs follow one another."""

    def __init__(self, home: Path, nursery: str, recipe: str, seed: int, mutant: str | None) -> None:
        self.home, self.tally = home, Tally()
        self._nursery, self._recipe, self._mutant = nursery, recipe, mutant
        self._chance = random.Random(seed)
        self._server, self._commands = 0, -1
        self._planned: str | None = None
        self._expect_reuse: tuple[int, int] | None = None  # attempt, blocks that were finished when it began
        home.mkdir()
        self._serve()

    def reference(self) -> str:
        """The manifest of a run that nobody disturbs."""
        self._command({"do": "submit", "recipe": self._recipe})
        run = self._wait(lambda run: run.status.final)
        if run.status is not Status.SUCCEEDED:
            raise BrokenPromiseError(f"an undisturbed run {run.status}: {run.reason}")
        return check_artifact(Path(str(run.artifact)))

    def once(self, reference: str) -> None:
        """One run: killed once, sometimes twice, then finished and compared with the reference."""
        self._command({"do": "submit", "recipe": self._recipe}, self._plan())
        deaths = 1 + (self._chance.random() < 0.3)
        while True:
            run = self._disturb() if deaths else self._wait(lambda run: run.status.final)
            deaths = max(0, deaths - 1)
            self.check(run)
            if run.status is Status.SUCCEEDED:
                break
            if run.status is not Status.INTERRUPTED:
                raise BrokenPromiseError(f"run {run.id} was killed and is {run.status}: {run.reason}")
            before = self._finished_blocks(run)
            self._command({"do": "resume", "run": run.id}, self._plan() if deaths else None)
            self._expect_reuse = (run.attempt + 1, before)
            self._wait(self._has_begun)
        if check_artifact(Path(str(run.artifact))) != reference:
            raise BrokenPromiseError(f"run {run.id}: the manifest differs from an undisturbed run's")
        self._check_reuse(run)
        self.tally.runs += 1

    def close(self) -> None:
        with suppress(OSError):
            os.close(self._commands)

    def check(self, run: Run) -> None:
        """The promises about files, whatever state the run is in."""
        if run.artifact is not None or run.status is Status.SUCCEEDED:
            if run.artifact is None:
                raise BrokenPromiseError(f"run {run.id} succeeded without an artifact")
            check_artifact(Path(run.artifact))
        for folder in self.home.glob("runs/*/*/artifact"):
            check_artifact(folder)

    def _has_begun(self, run: Run) -> bool:
        return self._expect_reuse is not None and run.attempt >= self._expect_reuse[0]

    def _plan(self) -> str | None:
        """The next kill point; None: a kill from outside, at a random time."""
        return self._chance.choice(POINTS) if self._chance.random() < 0.7 else None

    def _disturb(self) -> Run:
        """Let the planned kill happen, or kill the worker or the server or both, and wait for the run to settle."""
        if self._planned is not None:
            run = self._wait(lambda run: run.status.final)
            self._count(self._planned)
            return run
        run = self._wait(lambda run: run.status is not Status.QUEUED)
        time.sleep(self._chance.random() * 0.8)
        victim = self._chance.choice(("worker", "server", "both"))
        self._count(victim)
        if victim in ("worker", "both"):
            kill_worker(attempt_folder(self.home, run.id, run.attempt))
        if victim in ("server", "both"):
            os.kill(self._server, signal.SIGKILL)
            until(lambda: not exists(self._server), "the killed server to be gone")  # its lock goes with it
            os.close(self._commands)
            self.tally.servers_killed += 1
            self.check(self._latest())
            self._serve()
            self.tally.adopted += victim == "server" and not self._latest().status.final
        return self._wait(lambda run: run.status.final)

    def _count(self, how: str) -> None:
        self.tally.kills[how] = self.tally.kills.get(how, 0) + 1

    def _serve(self) -> None:
        (self.home / "serving").unlink(missing_ok=True)
        reading, self._commands = os.pipe()
        with os.fdopen(reading, "rb") as commands:
            body = {"do": "serve", "home": str(self.home), "nursery": self._nursery, "mutant": self._mutant}
            self._server = ask(self._nursery, body, commands)
        until(lambda: (self.home / "serving").exists(), "the server to start")

    def _command(self, body: dict[str, str], point: str | None = None) -> None:
        self._planned = point
        before = self._count_runs()
        if point is not None:
            (self.home / "kill-point").write_text(point)
        os.write(self._commands, json.dumps(body).encode() + b"\n")
        if body["do"] == "submit":
            self._expect_reuse = None
            until(lambda: self._count_runs() > before, "the run to be queued")

    def _latest(self) -> Run:
        return Store(self.home / "maquette.db", read_only=True).runs(limit=1)[0]

    def _count_runs(self) -> int:
        return len(Store(self.home / "maquette.db", read_only=True).runs(limit=10_000))

    def _wait(self, reached: Callable[[Run], bool]) -> Run:
        try:
            until(lambda: reached(self._latest()), "a run")
        except BrokenPromiseError as error:
            run = self._latest()
            live = is_live(attempt_folder(self.home, run.id, run.attempt))
            raise BrokenPromiseError(f"{error}, planned {self._planned}, worker lives {live}: {run}") from None
        return self._latest()

    def _finished_blocks(self, run: Run) -> int:
        return sum(1 for _ in self.home.glob(f"runs/{run.id}/*/blocks/step-0/block-*.safetensors"))

    def _check_reuse(self, run: Run) -> None:
        """What the last attempt read back is at least what stood finished when it began."""
        if self._expect_reuse is None:
            return
        attempt, finished = self._expect_reuse
        logs = Store(self.home / "maquette.db", read_only=True).events(run.id, kinds=("log", "progress"))
        said = [event for event in logs if event.attempt == attempt]
        reused = sum("reused" in str(event.data.get("text")) for event in said)
        earlier = [event for event in logs if event.attempt < attempt and event.kind == "progress"]
        announced = max((int(str(event.data["done"])) for event in earlier), default=0)
        if reused < max(finished, announced):
            raise BrokenPromiseError(
                f"run {run.id}: {max(finished, announced)} blocks were finished, {reused} were reused"
            )
        self.tally.reused += reused
        self.tally.finished += finished


def exists(pid: int) -> bool:
    """Whether there is a process of that number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def kill_worker(folder: Path) -> None:
    """kill -9 on the worker of an attempt, where it lives."""
    pid = read_pid(folder)
    if pid is not None and is_live(folder):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def check_artifact(folder: Path) -> str:
    """The text of a folder's manifest, once every file is there with its size and hash, and no other."""
    try:
        text = (folder / "MANIFEST.json").read_text()
        files = json.loads(text)["files"]
        for name, entry in files.items():
            data = (folder / name).read_bytes()
            if len(data) != entry["bytes"] or hashlib.sha256(data).hexdigest() != entry["sha256"]:
                raise BrokenPromiseError(f"{folder / name} is not what the manifest says")
    except (OSError, ValueError, KeyError) as error:
        raise BrokenPromiseError(f"{folder} is half written: {error!r}") from error
    others = {path.name for path in folder.iterdir()} - {*files, "MANIFEST.json"}
    if others:
        raise BrokenPromiseError(f"{folder} holds files that no manifest names: {sorted(others)}")
    return text


def until(reached: Callable[[], object], what: str) -> None:
    """Wait.

    Raises:
        BrokenPromiseError: it does not happen.
    """
    deadline = time.monotonic() + PATIENCE
    while not reached():
        if time.monotonic() > deadline:
            raise BrokenPromiseError(f"waited {PATIENCE:.0f} s for {what}")
        time.sleep(0.02)


def loop(runs: int, folder: Path, *, seed: int = 0, lanes: int = 2, mutant: str | None = None) -> list[Tally]:
    """Do the whole loop below `folder`; returns what each lane saw.

    Raises:
        BrokenPromiseError: a promise was not kept.
    """
    recipe = (
        f"model: {folder / 'model'}\nsteps: [{{quantize/gptq: {{group_size: 32, samples: 4, sequence_length: 32}}}}]\n"
        f"measure: []\ncalibration: {folder / 'text.txt'}\n"
    )
    nursery = str(folder / "nursery")
    failures: list[BaseException] = []

    def run_lane(lane: Lane, count: int) -> None:
        try:
            reference = lane.reference()
            for _ in range(count):
                if failures:
                    return
                lane.once(reference)
        except BaseException as error:  # handed to the caller, who is in another thread
            failures.append(error)

    with running_nursery(nursery, folder):
        found = [Lane(folder / f"home-{n}", nursery, recipe, seed * 1000 + n, mutant) for n in range(lanes)]
        try:
            shares = [runs // lanes + (n < runs % lanes) for n in range(lanes)]
            threads = [threading.Thread(target=run_lane, args=work) for work in zip(found, shares, strict=True)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            for lane in found:
                lane.close()
    if failures:
        raise failures[0]
    return [lane.tally for lane in found]


@contextmanager
def running_nursery(path: str, folder: Path) -> Iterator[None]:
    """The nursery process, for as long as the block lasts; it writes the model first."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    quiet = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    environment = {**os.environ, **threads, **quiet}
    tests = ROOT / "tests"
    subprocess.run(
        [sys.executable, tests / "small_model.py", folder], env=environment, check=True, stderr=subprocess.DEVNULL
    )
    with subprocess.Popen(
        [sys.executable, tests / "nursery.py", path], stdout=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None
        try:
            if process.stdout.readline() != b"ready\n":
                raise RuntimeError("the nursery did not start")
            yield
        finally:
            process.kill()


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill runs again and again; see the file's first lines.")
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lanes", type=int, default=2)
    parser.add_argument("--mutant", choices=MUTANTS)
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="killloop-", ignore_cleanup_errors=True) as folder:
        try:
            tallies = loop(options.runs, Path(folder), seed=options.seed, lanes=options.lanes, mutant=options.mutant)
        except BrokenPromiseError as error:
            sys.stdout.write(f"BROKEN: {error}\n")
            return 1
    for tally in tallies:
        sys.stdout.write(f"{tally}\n")
    sys.stdout.write(f"{options.runs} runs in {time.monotonic() - began:.0f} s: every promise was kept\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
