"""A scheduler without processes for tests of the page, and runs with made-up results in a real store."""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import JsonValue

from engine import methods, rescue
from engine.attempts import EXPORTS
from engine.card import CARD
from engine.errors import InputError, UnknownName
from engine.files import MANIFEST, digest
from engine.hub import Hub
from engine.modes import Limits
from engine.records import Event, EventKind, Measurement, Output, Recipe, Run, Status, Step, Token
from engine.store import Store

WORDS = re.findall(
    r"\S+", "Mara is a baker in Tallow. She has a grey cat and a long oven. Every morning she sells bread."
)
GPTQ = Recipe(steps=(Step(method="quantize/gptq", params={"bits": 4, "group_size": 64}),))
HALF = Recipe(steps=(Step(method="distill/logits", params={"keep_every": 2}),))
WANDA = Recipe(steps=(Step(method="prune/wanda", params={"pattern": "2:4"}),))


def measured(shrink: float = 1.0, worse: float = 0.0) -> list[Measurement]:
    """Measurements as the engine makes them; `shrink` divides bytes and times, `worse` costs quality."""
    kernel = "dense bfloat16" if shrink == 1 else "int4pack"
    times: dict[str, JsonValue] = {
        "kernel": kernel,
        "p50": 0.002 / shrink,
        "p95": 0.0026 / shrink,
        "p99": 0.004 / shrink,
        "count": 155,
        "largest": 0.005 / shrink,
    }
    first: dict[str, JsonValue] = {
        "kernel": kernel, "p50": 0.006, "p95": 0.011, "p99": 0.011, "repetitions": 5, "new_tokens": 32,
    }  # fmt: skip
    found = [
        Measurement(name="size.bytes", value=5_400_000 / shrink, unit="B", higher_is_better=False),
        Measurement(name="size.bits_per_weight", value=16 / shrink, unit="bit", higher_is_better=False),
        Measurement(name="size.parameters", value=2_700_000, unit="1", details={"architecture": "llama"}),
        Measurement(name="memory.loaded", value=9e6 / shrink + 4e6, unit="B", higher_is_better=False),
        Measurement(name="memory.peak", value=14e6 / shrink + 6e6, unit="B", higher_is_better=False),
        Measurement(name="latency.ttft", value=0.006, error=1e-4, unit="s", higher_is_better=False, details=first),
        Measurement(
            name="latency.tpot", value=0.002 / shrink, error=2e-5, unit="s", higher_is_better=False, details=times
        ),
        Measurement(name="throughput.b1", value=500 * shrink, unit="token/s", higher_is_better=True),
        Measurement(name="perplexity", value=4.2 + worse, error=0.06, unit="1", higher_is_better=False),
        Measurement(name="accuracy", value=0.94 - worse / 20, error=0.008, unit="1", higher_is_better=True),
    ]
    for index, task in enumerate(("facts", "grammar", "reading", "sums")):
        value = 0.97 - index * 0.03 - worse / 20
        found.append(Measurement(name=f"accuracy.{task}", value=value, error=0.012, unit="1", higher_is_better=True))
    if worse:
        items: dict[str, JsonValue] = {"items": 1000}
        found += [
            Measurement(name="kl", value=worse / 10, error=0.002, unit="nat", higher_is_better=False),
            Measurement(name="top1_agreement", value=1 - worse / 8, error=0.004, unit="1", higher_is_better=True),
            Measurement(name="flips", value=worse / 12, unit="1", higher_is_better=False, details=items),
        ]
    return found


def tokens(kl: bool = False, words: list[str] = WORDS) -> tuple[Token, ...]:
    """A text as a model saw it; with `kl` every few tokens have drifted."""
    shown = []
    for index, word in enumerate(words):
        top = ((f" {word}", 0.71), (" the", 0.12), (" a", 0.06), (" <b>", 0.02), ("\n", 0.01))
        drift = (0.01, 0.04, 0.01, 0.2, 0.0, 0.9)[index % 6] if kl else None
        shown.append(Token(text=f" {word}", probability=0.71, top=top, kl=drift))
    return tuple(shown)


def outputs(small: bool) -> list[Output]:
    """What a run wrote after two fixed prompts."""
    words = [*WORDS[:7], *reversed(WORDS[7:])] if small else WORDS
    forced = tokens(kl=True) if small else ()
    return [Output(prompt=prompt, tokens=tokens(words=words), forced=forced) for prompt in ("Mara lives in", "2 + 3 =")]


class FakeScheduler:
    """The scheduler's public face over a real store. Nothing runs until a test says so."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.store = Store(home / "maquette.db")
        self.limits = Limits(folders=False)
        self.hub = Hub(home / "cache" / "hub", offline=True)
        self.closed_streams = 0
        self.asked: list[tuple[list[str], str, bool]] = []
        self.writing: list[dict[str, object]] = []
        self.pause = 0.0
        self.alike = False  # whether all models write the same
        self.idle = 0

    def submit(self, recipe: Recipe, owner: str = "", token: str = "") -> Run:
        methods.check(recipe)
        if sum(run.status is Status.QUEUED for run in self.store.runs(owner)) >= 3:
            raise InputError("3 of your runs are waiting already.")
        return self.store.add_run(recipe, owner)

    def cancel(self, run_id: str, owner: str | None = "") -> None:
        run = self._own(run_id, owner)
        self.store.say(run, "finished", {"status": "cancelled", "reason": "Cancelled."})

    def resume(self, run_id: str, owner: str | None = "", token: str = "", factor: float | None = None) -> Run:
        run = self._own(run_id, owner)
        found = self.store.divergences(run_id)
        return self.store.requeue(run_id, None if factor is None else rescue.amended(run, found, factor))

    def delete(self, run_id: str, owner: str | None = "") -> None:
        self._own(run_id, owner)
        self.store.delete_run(run_id)

    def share(self, run_id: str, shared: bool, owner: str | None = "") -> Run:
        self._own(run_id, owner)
        return self.store.share(run_id, shared)

    def status(self) -> dict[str, JsonValue]:
        unfinished = self.store.unfinished()
        running = next((run.id for run in unfinished if run.status is Status.RUNNING), None)
        progress: dict[str, JsonValue] = {"phase": "GPTQ", "done": 3, "total": 8, "unit": "blocks", "eta": 12.0}
        return {
            "cpu": 37.5, "ram_used": 3 << 30, "ram_total": 24 << 30, "gpu": None, "engine": 412 << 20,
            "running": running, "progress": progress if running else None,
            "queued": sum(run.status is Status.QUEUED for run in unfinished),
        }  # fmt: skip

    def spare(self, recipe: Recipe) -> int:
        return self.idle

    def room(self, recipe: Recipe) -> int:
        return 0

    def history(self) -> dict[str, list[float]]:
        wave = [30 + 25 * math.sin(i / 5) for i in range(60)]
        return {"cpu": wave, "ram_used": [3e9 + 1e8 * w for w in wave], "engine": [4e8 + 1e6 * w for w in wave]}

    def stream(
        self, sources: list[str], prompt: str, *, max_tokens: int = 48, temperature: float = 0.0, seed: int = 0,
        same_text: bool = False, top_p: float = 1.0, top_k: int = 0, stop_strings: Sequence[str] = (),
        chat: bool = False, system: str = "", stop: threading.Event | None = None,
    ) -> Iterator[tuple[int, str, dict[str, JsonValue]]]:  # fmt: skip
        self.asked.append((sources, prompt, same_text))
        self.writing.append({"max_tokens": max_tokens, "temperature": temperature, "seed": seed, "top_p": top_p,
                             "top_k": top_k, "stop_strings": stop_strings, "chat": chat, "system": system})  # fmt: skip
        try:
            for pane in range(len(sources)):
                yield pane, "loading", {}
            apart = [[*WORDS[:cut], *WORDS[cut + 4 :]] for cut in (5, 8, 2)]
            texts = [tokens(), *(tokens(kl=same_text, words=WORDS if same_text else words) for words in apart)]
            if self.alike:
                texts = [tokens()] * len(sources)
            stopped = False
            for index in range(len(WORDS)):
                stopped = stop is not None and stop.is_set()
                for pane in range(len(sources)):
                    if not stopped and index < len(texts[pane]):
                        time.sleep(self.pause)
                        yield pane, "token", texts[pane][index].model_dump(mode="json")
            for pane in range(len(sources)):
                yield pane, "done", {"ttft": 0.006, "tpot": 0.002, "tokens": len(WORDS), "stopped": stopped}
        finally:
            self.closed_streams += 1

    def export(
        self, run_id: str, name: str, owner: str | None = "", stop: threading.Event | None = None
    ) -> Iterator[float]:
        run = self._own(run_id, owner)
        yield 1.0
        export(run, name)

    def _own(self, run_id: str, owner: str | None) -> Run:
        run = self.store.run(run_id)
        if owner is not None and run.owner != owner:
            raise UnknownName("run", run_id, ())
        return run


def export(run: Run, name: str) -> None:
    """An export of a run, by its look."""
    folder = Path(str(run.artifact)).parent / EXPORTS / name
    folder.mkdir(parents=True)
    for file, text in ((CARD, f"# As {name}"), ("model.safetensors", "codes")):
        (folder / file).write_text(text)
    files = {file.name: {"bytes": file.stat().st_size, "sha256": digest(file)} for file in folder.iterdir()}
    (folder / MANIFEST).write_text(json.dumps({"files": files, "recipe": run.recipe.model_dump(mode="json")}))


def say(scheduler: FakeScheduler, run: Run, *events: tuple[EventKind, dict[str, JsonValue]], start: int = 1) -> None:
    """Events of a run's worker, half a second apart."""
    begun = run.started or time.time()
    scheduler.store.append(
        Event(run=run.id, attempt=run.attempt, number=start + i, time=begun + (start + i) / 2, kind=kind, data=data)
        for i, (kind, data) in enumerate(events)
    )


def running(scheduler: FakeScheduler, recipe: Recipe, owner: str) -> Run:
    """A run in the middle of its work, with memory, loss and a log."""
    run = scheduler.store.begin_attempt(scheduler.store.add_run(recipe, owner).id)
    events: list[tuple[EventKind, dict[str, JsonValue]]] = [("estimate", {"memory": 5 * 2**30, "seconds": 40.0})]
    for phase in ("loading", "GPTQ", "measuring"):
        events.append(("phase", {"name": phase}))
        events.append(("log", {"text": f"{phase} <script>alert(1)</script>"}))
        for i in range(12):
            value = 3e8 + 1e8 * len(phase) * math.sin(i / 4)
            events.append(("sample", {"series": "memory.resident", "value": value, "unit": "B"}))
            events.append(("sample", {"series": "loss", "value": 4.0 / (1 + i), "unit": "nat"}))
    say(scheduler, run, *events)
    return run


def diverged(scheduler: FakeScheduler, recipe: Recipe, owner: str, kept: int = 100) -> Run:
    """A run whose first step's training diverged, with a checkpoint of so many steps."""
    run = running(scheduler, recipe, owner)
    event: dict[str, JsonValue] = {"number": 0, "step": 121, "kept": kept, "why": "the loss is nan"}
    reason = "Training diverged at step 121: the loss is nan. Use a lower learning_rate."
    say(scheduler, run, ("diverged", event), ("finished", {"status": "failed", "reason": reason}), start=200)
    return scheduler.store.run(run.id)


def finished(
    scheduler: FakeScheduler, recipe: Recipe, owner: str, shrink: float = 1.0, worse: float = 0.0,
    measurements: list[Measurement] | None = None,
) -> Run:  # fmt: skip
    """A run that succeeded, with measurements (the usual ones where none are given), outputs and an artifact folder."""
    run = running(scheduler, recipe, owner)
    folder = scheduler.home / "runs" / run.id / f"attempt-{run.attempt}" / "artifact"
    folder.mkdir(parents=True)
    events: list[tuple[EventKind, dict[str, JsonValue]]] = [("artifact", {"path": "artifact"})]
    events += [("measurement", m.model_dump(mode="json")) for m in measurements or measured(shrink, worse)]
    events += [("output", o.model_dump(mode="json")) for o in outputs(small=shrink != 1)]
    events.append(("finished", {"status": "succeeded", "reason": ""}))
    say(scheduler, run, *events, start=200)
    return scheduler.store.run(run.id)
