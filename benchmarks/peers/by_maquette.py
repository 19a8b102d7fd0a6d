"""Quantize with Maquette's pipeline, up to the saved artifact; the others do not verify what they saved either.

Settings that are not named are its defaults.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

from pydantic import JsonValue

from benchmarks.peers.runner import mark, request
from benchmarks.peers.subjects import LENGTH, SAMPLES
from engine import methods, pipeline
from engine.errors import Cancelled
from engine.records import EventKind, Recipe

GROUPS: dict[str, JsonValue] = {"group_size": 128}
STEPS: dict[str, tuple[str, dict[str, JsonValue]]] = {
    "gptq-4": ("quantize/gptq", GROUPS | {"bits": 4}),
    "gptq-3": ("quantize/gptq", GROUPS | {"bits": 3}),
    "awq-4": ("quantize/awq", GROUPS | {"bits": 4}),
    "awq-4-asymmetric": ("quantize/awq", GROUPS | {"bits": 4, "symmetric": False}),
    "w8a8": ("quantize/smoothquant", {"strength": 0.5}),
}


def main() -> None:
    asked = request()
    method, settings = STEPS[asked["task"]]
    calibration = {"samples": SAMPLES, "sequence_length": LENGTH}
    body = {"model": asked["model"], "steps": [{method: settings | calibration}], "measure": [], "device": "cpu"}

    def hear(kind: EventKind, data: dict[str, JsonValue]) -> None:
        if kind == "log":
            sys.stderr.write(f"{data['text']}\n")
        if kind == "phase" and data["name"] == "verifying":
            mark("saved")
            raise Cancelled("It is saved.")  # before a process begins that would be counted with this one

    methods.methods()  # imports them all
    mark("loading")
    with suppress(Cancelled):
        pipeline.run(Recipe.model_validate(body), Path(asked["out"]), hear, lambda: None)


if __name__ == "__main__":
    main()
