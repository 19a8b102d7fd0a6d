"""Distill with Maquette's method; the student is the half of the teacher's blocks, as that of the others.

`teacher_logits` is `live` (the full distribution in each step, as trl does it) or `cached` (the teacher runs once).
The seconds in which it takes the KL on held-out rows, which trl does not, are told beside.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from pydantic import JsonValue

from benchmarks.peers.runner import mark, request, say
from engine.lesson import Lesson
from engine.methods import Context, get
from engine.models import load
from engine.records import EventKind


def main() -> None:
    asked = request()
    torch.manual_seed(0)
    model, out = load(Path(asked["model"])), Path(asked["out"])
    losses: list[float] = []
    looks: list[float] = []
    held_out = Lesson.held_out

    def look(lesson: Lesson) -> float:
        began = time.monotonic()
        found = held_out(lesson)
        looks.append(time.monotonic() - began)
        return found

    Lesson.held_out = look  # type: ignore[method-assign]

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
    say("looks", f"{sum(looks):.3f}")


if __name__ == "__main__":
    main()
