"""Work on one real block before all the others, and say what the whole will take on this machine.

Blocks are alike: what a step takes on the first, times their number, is what it will take, after what it does once
(reading the text, the embeddings). Memory does not add up: one block is in memory at a time. So minutes of measuring
replace a guess about hours; `engine.fit` says which runs are long enough, with so many blocks that one is little of the
work. It is thrown away, in a process of its own, which also frees its memory. A step that takes whole blocks away has
nothing to do on one: its time stays a guess.
"""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from pydantic import JsonValue

from engine import hardware, headers, methods, models, pace, places, sizes
from engine.methods import Context, Emit, Params, Selection
from engine.models import LoadedModel, blocks, linears
from engine.pace import Rates
from engine.records import EventKind, Recipe
from engine.sizes import Holding


class Clock:
    """Stands in a run's event stream's place and adds up what walks spent in the first block: some methods take two.

    What comes behind the blocks, as the head does, is no block. units: other units of progress that are to be timed.
    """

    def __init__(self, units: Collection[str] = ()) -> None:
        self.began, self.start, self.block = time.monotonic(), time.monotonic(), 0.0
        self.units = dict.fromkeys(units, (0.0, 0))  # seconds, and how many were done

    def __call__(self, kind: EventKind, data: dict[str, JsonValue]) -> None:
        if kind != "progress" or (unit := str(data["unit"])) not in ("blocks", *self.units):
            return
        now, done = time.monotonic(), headers.integer(data["done"])
        if unit != "blocks":
            self.units[unit] = (self.units[unit][0] + (now - self.began) * (done > 0), done)
        elif done == 1:
            self.block += now - self.began
        self.began = now

    def total(self, count: int, units: Mapping[str, float]) -> float:
        """Seconds for `count` blocks and so many of each unit."""
        once = time.monotonic() - self.start - self.block - sum(seconds for seconds, _ in self.units.values())
        others = sum(seconds / max(done, 1) * units[unit] for unit, (seconds, done) in self.units.items())
        return once + count * self.block + others


def probe(recipe: Recipe, source: Path, device: str, emit: Emit) -> None:
    """Apply the recipe's steps to the first block of the model in `source`; emits `estimate`, seconds for all blocks.

    `rates` in it: by method, how many times as long it takes here as `engine.pace` thought. Nothing is emitted where
    the steps have no block in common.
    """
    model = models.stream(source, recipe.model.dtype, device)
    steps = methods.check(recipe)
    probed = on_first_block(model, [params for _, params in steps])
    if probed is None:
        return
    keep_first_block(model)
    hardware.keep_memory()  # as the run does
    seconds, rates = 0.0, dict[str, JsonValue]()
    held = Holding(headers.inspect(source), model.network.dtype.itemsize)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for number, ((method, params), own) in enumerate(zip(steps, probed, strict=True)):
            if not params.told_by_a_block():
                seconds += pace.step_seconds(held, params, Rates())
                held = held.after(params)
                continue
            survey = params.survey(held.shape, held.width)
            units = {} if survey is None else survey.units
            clock = Clock(units)
            text = places.calibration_file(recipe.calibration)
            kept = Path(folder) / str(number)
            model = method.apply(model, own, Context(device, recipe.seed, kept, kept, text, clock, _go_on))
            took = clock.total(sizes.blocks_of(held.shape.config), units)
            rates[method.name] = took / pace.step_seconds(held, params, Rates())
            held = held.after(params)
            seconds += took
    emit("estimate", {"memory": peak(device), "seconds": seconds, "probed": True, "rates": rates})


def on_first_block(model: LoadedModel, steps: Sequence[Params]) -> list[Params] | None:
    """The steps as they would treat the first block if that were one in which each selects a linear: the first such.

    Recipes may leave some blocks as they are, often the first. None: there is no such block.
    """
    name, modules = blocks(model.network)
    for number, module in enumerate(modules):
        named = [(path, f"{name}.{number}.{path}") for path, _ in linears(module) if path]
        paths = [
            [path for path, linear in named if params.selects(linear)] if isinstance(params, Selection) else None
            for params in steps
        ]
        if all(own is None or own for own in paths):
            return [
                params if own is None else params.model_copy(update={"targets": targets(name, own), "ignore": ""})
                for params, own in zip(steps, paths, strict=True)
            ]
    return None


def targets(name: str, paths: Sequence[str]) -> str:
    """A setting that selects linears of the first block."""
    return " ".join(f"{name}.0.{path}" for path in paths)


def keep_first_block(model: LoadedModel) -> None:
    """Make the model one of its first block alone."""
    name, modules = blocks(model.network)
    del modules[1:]
    model.network.config.get_text_config().num_hidden_layers = 1
    assert model.parts is not None
    others = [part for part in model.parts.where if part.startswith(f"{name}.") and part != f"{name}.0"]
    model.parts = replace(
        model.parts, where={part: place for part, place in model.parts.where.items() if part not in others}
    )  # fmt: skip


def peak(device: str) -> int:
    """Bytes that were in use at most: of the GPU where that computes, else resident in this process."""
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts it in KiB


def _go_on() -> None:
    """Nobody stops a probe but the process that started it."""
