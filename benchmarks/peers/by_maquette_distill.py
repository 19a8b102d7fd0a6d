"""Distill with Maquette's method; the student is the half of the teacher's blocks, as that of the others.

`teacher_logits` is `live` (the full distribution in each step, as trl does it) or `cached` (the teacher runs once).
As of trl, the training's own seconds count, and those in which the teacher's answers are made or found. What trl does
not do is told beside: the KL on held-out rows and the checkpoint.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
from pydantic import JsonValue

from benchmarks.peers.runner import mark, request, say
from engine import hardware, lesson
from engine.distill import _teachers
from engine.methods import Context, get
from engine.models import load
from engine.records import EventKind
from engine.training import Training


def main() -> None:
    asked = request()
    torch.manual_seed(0)
    hardware.keep_memory()  # as a run does before its steps
    model, out = load(Path(asked["model"])), Path(asked["out"])
    losses: list[float] = []
    spent: dict[str, float] = defaultdict(float)
    timed(lesson, "train", spent, "training")
    timed(_teachers, "cached", spent, "training")
    timed(lesson.Lesson, "held_out", spent, "beside")
    timed(Training, "keep", spent, "beside")

    def hear(kind: EventKind, data: dict[str, JsonValue]) -> None:
        if kind == "sample" and data["series"] == "loss":
            losses.append(float(str(data["value"])))
        if kind == "log":
            sys.stderr.write(f"{data['text']}\n")

    method = get("distill/logits")
    params = method.check({
        "student": "blocks", "keep_every": 2, "label_weight": 0.0, "temperature": 1.0, "steps": int(asked["steps"]),
        "batch": int(asked["batch"]), "sequence_length": int(asked["length"]), "learning_rate": float(asked["rate"]),
        "text": asked["text"], "teacher_logits": asked["task"],
    })  # fmt: skip
    context = Context("cpu", 0, out / "blocks", Path(asked["cache"]), Path(asked["text"]), hear, lambda: None)
    mark("training")
    with torch.no_grad():
        method.apply(model, params, context)
    mark("trained")
    say("loss", f"{losses[-1]:.4f}")
    say("seconds", f"{spent['training'] - spent['beside']:.3f}")
    say("beside", f"{spent['beside']:.3f}")


def timed(owner: object, name: str, spent: dict[str, float], what: str) -> None:
    """Let a function of a module or a class add its seconds to `spent[what]`."""
    work = getattr(owner, name)

    def work_timed(*args: object, **kwargs: object) -> object:
        began = time.monotonic()
        try:
            return work(*args, **kwargs)
        finally:
            spent[what] += time.monotonic() - began

    setattr(owner, name, work_timed)


if __name__ == "__main__":
    main()
