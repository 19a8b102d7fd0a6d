"""Trials: recipes run through the real pipeline, what they measured kept, and the tables made of them.

A trial that was run before with the same recipe is read from `.cache/trials`, so that a benchmark goes on where it
was stopped. All trials share one data folder: steps that recipes begin with alike are done once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from benchmarks.sections import ROOT
from engine import pipeline
from engine.records import EventKind, Measurement, Output, Recipe

CACHE = ROOT / "benchmarks" / ".cache" / "trials"
TASKS = ("facts", "reading", "sums", "grammar")
FIDELITY = ("size", "perplexity", "accuracy", "divergence")
COLUMNS = {
    "size.bytes": "MB", "size.bits_per_weight": "bits per weight", "perplexity": "perplexity",
    "kl": "KL to the original, nat", "accuracy": "accuracy, %", **{f"accuracy.{task}": task for task in TASKS},
}  # fmt: skip

log = logging.getLogger("trials")


@dataclass(frozen=True)
class Trial:
    """What one run of the pipeline said. artifact: its folder."""

    name: str
    recipe: Recipe
    measured: dict[str, Measurement]
    outputs: list[Output]
    began: float
    ended: float
    artifact: Path

    def cell(self, name: str) -> str:
        """A figure with its standard error, as the tables print it."""
        if name not in self.measured:
            return "–"
        found = self.measured[name]
        if name == "size.bytes":
            return f"{found.value / 1e6:.2f}"
        if name.startswith("accuracy"):
            return f"{100 * found.value:.1f} ± {100 * (found.error or 0):.1f}"
        return f"{found.value:.4g} ± {found.error:.2g}" if found.error is not None else f"{found.value:.3g}"


def trial(
    name: str, steps: Sequence[object], measure: Sequence[str] = FIDELITY, source: str = "demo", seed: int = 0
) -> Trial:
    """Run the steps on a model, or read what they gave before."""
    body = {"model": source, "steps": list(steps), "measure": list(measure), "seed": seed}
    recipe = Recipe.model_validate(body)
    key = hashlib.sha256(recipe.model_dump_json().encode()).hexdigest()[:16]
    file, folder = CACHE / f"{key}.json", CACHE / "home" / "runs" / key / "attempt-1"
    if not file.exists():
        _run(recipe, folder, file)
        log.info("%s: %.0f s", name, json.loads(file.read_text())["ended"] - json.loads(file.read_text())["began"])
    said = json.loads(file.read_text())
    measured = {m["name"]: Measurement.model_validate(m) for m in said["measured"]}
    outputs = [Output.model_validate(each) for each in said["outputs"]]
    return Trial(name, recipe, measured, outputs, said["began"], said["ended"], folder / "artifact")


def forget() -> None:
    """Let every trial be run again."""
    shutil.rmtree(CACHE, ignore_errors=True)


def _run(recipe: Recipe, folder: Path, file: Path) -> None:
    found: dict[str, list[JsonValue]] = {"measurement": [], "output": []}

    def hear(kind: EventKind, data: dict[str, JsonValue]) -> None:
        if kind in found:
            found[kind].append(data)

    folder.mkdir(parents=True, exist_ok=True)
    began = time.time()
    pipeline.run(recipe, folder, hear, lambda: None)
    shutil.rmtree(folder / "blocks", ignore_errors=True)
    body = {"began": began, "ended": time.time(), "measured": found["measurement"], "outputs": found["output"]}
    file.write_text(json.dumps(body))


def table(trials: Sequence[Trial], columns: Sequence[str] = tuple(COLUMNS)) -> str:
    """A Markdown table of trials."""
    lines = [
        " | ".join(["", *(COLUMNS.get(column, column) for column in columns)]),
        " | ".join(["---", *(["---:"] * len(columns))]),
        *(" | ".join([each.name, *(each.cell(column) for column in columns)]) for each in trials),
    ]
    return "\n".join(f"| {line} |" for line in lines)
