"""From a goal to what to do first: measures in the order of practice, each with what it is expected to bring and cost.

    1  optimise    batches, the KV cache in 8 bit, packed kernels, a shorter context: the model stays as it is
    2  quantize    minutes to hours, no training
    3  train       distill or prune: makes the most of few bytes, and costs training

Memory and bytes come from `engine.fit`, speed from the bytes that a token reads (`engine.pace`). Quality is what runs
on this machine have measured of the same steps on the same model; where there are none it is not known.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from engine import fit, methods, pace, sizes, suitability
from engine.assumptions import Assumptions
from engine.errors import BadParams, InputError, short
from engine.headers import QUANTIZED, Shape
from engine.methods import Method, Params
from engine.presets import preset
from engine.records import Measurement, Model, Recipe, Run, Status, Step
from engine.sizes import Holding

Kind = Literal["memory", "latency", "cost"]
Stage = Literal["optimise", "quantize", "train"]
Measured = Callable[[Recipe], Mapping[str, Measurement]]
KINDS: tuple[Kind, ...] = ("memory", "latency", "cost")
UNITS = {"": 1e9, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 2**10, "mib": 2**20, "gib": 2**30}
QUALITIES = ("perplexity", "accuracy", "kl")
GROUPS = (64, 128, 32, 16, 8)  # sizes of groups, the usual first; the first that divides a model's inputs is taken
BETTER = 0.99  # of what it was: less is no help


@dataclass(frozen=True)
class Goal:
    """Bytes of memory, a share of the latency, or USD for a million tokens (None: as few as can be)."""

    kind: Kind
    value: float | None = None

    @classmethod
    def parse(cls, text: str) -> Goal:
        """`memory=8GB`, `latency=0.5` or `cost`, as they are typed on a command line.

        Raises:
            BadParams: it is none of these, or a number out of its bounds.
        """
        kind, _, value = text.strip().partition("=")
        found = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)", value.strip())
        unit = found[2].lower() if found else ""
        wrong = BadParams(f"The goal is {short(text)!r}. Write memory=8GB, latency=0.5 (half), cost or cost=0.3 (USD).")
        if kind not in KINDS or (value and not found) or unit not in (UNITS if kind == "memory" else ("",)):
            raise wrong
        if found is None:
            if kind != "cost":
                raise wrong
            return cls("cost")
        return cls.of(kind, float(found[1]) * (UNITS[unit] if kind == "memory" else 1))

    @classmethod
    def of(cls, kind: str, value: float | None) -> Goal:
        """A goal with its number in bytes, as a share, or in USD.

        Raises:
            BadParams: no such goal, or a number out of its bounds.
        """
        highest = {"memory": 1e15, "latency": 1.0, "cost": 1e6}
        if kind not in KINDS:
            raise BadParams(f"There is no goal {short(kind)!r}. Choose memory, latency or cost.")
        if value is None and kind != "cost":
            raise BadParams(f"The goal {kind} needs a number: {kind}={'8GB' if kind == 'memory' else '0.5'}.")
        if value is not None and not 0 < value <= highest[kind]:
            raise BadParams(
                f"The number of the goal {kind} is {value:g}; it must lie above 0, up to {highest[kind]:g}."
            )
        return cls(kind, value)


@dataclass(frozen=True)
class Figures:
    """What serving takes: bytes in memory and in the file, seconds of a token at best, USD for a million tokens."""

    memory: int
    file: int
    token_seconds: float
    cost: float

    def of(self, goal: Goal) -> float:
        """The figure that a goal is about."""
        return {"memory": self.memory, "latency": self.token_seconds, "cost": self.cost}[goal.kind]


@dataclass(frozen=True)
class Advice:
    """One measure. name: what the page has words for; `needs` too.

    recipe: what to run, None where only a setting of serving changes: batch and context. hours: of a GPU, once; teacher
    and price: USD, once. quality: what own runs of these steps measured, empty where there are none. first: the
    mildest that reaches the goal.
    """

    name: str
    stage: Stage
    recipe: Recipe | None
    batch: int
    context: int
    figures: Figures
    needs: tuple[str, ...]
    hours: float = 0.0
    teacher: float = 0.0
    price: float = 0.0
    helps: bool = False
    reaches: bool = False
    first: bool = False
    quality: Mapping[str, Measurement] = field(default_factory=dict)


@dataclass(frozen=True)
class Advised:
    """The goal, what the model takes as it is, what own runs of it measured, and what can be done, in order."""

    goal: Goal
    now: Figures
    met: bool  # without any of it
    advices: tuple[Advice, ...]
    quality: Mapping[str, Measurement] = field(default_factory=dict)


def advise(
    goal: Goal, model: Model, shape: Shape, assumptions: Assumptions, measured: Measured = lambda recipe: {}
) -> Advised:
    """What to do, the mildest first. `measured` tells what runs of a recipe's steps on its model have measured."""
    base = Holding.of(shape, model.dtype)
    now = _figures(base, assumptions.batch, assumptions.context, assumptions)
    met = _reached(goal, now.of(goal), now)
    found: list[Advice] = []
    for advice in _measures(base, model, assumptions):
        figure = advice.figures.of(goal)
        helps = figure < BETTER * now.of(goal)
        quality = {} if advice.recipe is None else _qualities(measured(advice.recipe))
        found.append(replace(advice, helps=helps, reaches=helps and _reached(goal, figure, now), quality=quality))
    if goal.kind == "cost" and goal.value is None:
        best = min((advice.figures.cost for advice in found if advice.helps), default=-1.0)
        found = [replace(advice, reaches=advice.figures.cost == best) for advice in found]
    chosen = next((place for place, advice in enumerate(found) if advice.reaches), None)
    ordered = tuple(replace(each, first=place == chosen and not met) for place, each in enumerate(found))
    return Advised(goal, now, met, ordered, _qualities(measured(Recipe.model_validate({"model": model}))))


def of_runs(runs: Iterable[tuple[Run, Callable[[], Mapping[str, Measurement]]]]) -> Measured:
    """What the first of some runs that did just these steps to just this model has measured."""
    known = [(run.recipe.model, _said(run.recipe), look) for run, look in runs if run.status is Status.SUCCEEDED]

    def find(recipe: Recipe) -> Mapping[str, Measurement]:
        wanted = recipe.model, _said(recipe)
        looks = (look() for model, said, look in known if said is not None and (model, said) == wanted)
        return next((found for found in looks if set(found) & set(QUALITIES)), {})

    return find


def _said(recipe: Recipe) -> list[tuple[str, Params]] | None:
    """The steps with every setting, defaults too; None for recipes of methods that are no more."""
    try:
        return [(method.name, params) for method, params in methods.check(recipe)]
    except InputError:
        return None


def _reached(goal: Goal, figure: float, now: Figures) -> bool:
    if goal.value is None:
        return False
    return figure <= goal.value * (now.token_seconds if goal.kind == "latency" else 1)


def _qualities(found: Mapping[str, Measurement]) -> dict[str, Measurement]:
    return {name: found[name] for name in QUALITIES if name in found}


def _figures(held: Holding, batch: int, context: int, assumptions: Assumptions, paid: float = 0.0) -> Figures:
    seconds = pace.token_seconds(held, batch, context, assumptions.bandwidth * 1e9, assumptions.arithmetic * 1e12)
    cost = assumptions.served_usd(seconds, batch, paid)
    return Figures(fit.serving(held, batch, context).total, held.file_bytes(), seconds, cost)


def _measures(base: Holding, model: Model, assumptions: Assumptions) -> Iterator[Advice]:
    """All measures that the model allows, in the order of practice."""
    batch, context = assumptions.batch, assumptions.context

    def setting(name: str, batch: int, context: int) -> Advice:
        return Advice(name, "optimise", None, batch, context, _figures(base, batch, context, assumptions), ())

    if assumptions.largest_batch > batch:
        yield setting("batch", assumptions.largest_batch, context)
    if batch > 1:
        yield setting("one_at_a_time", 1, context)
    changeable = QUANTIZED.isdisjoint(base.shape.config)
    if changeable:
        yield from _of_recipes("kv8", "optimise", _cache_steps(base), base, model, assumptions)
    yield replace(setting("kernels", batch, context), needs=("packed",))
    if context >= 256:
        yield setting("context", batch, context // 2)
    if not changeable:
        return
    for name, stage, steps in _recipes(base):
        yield from _of_recipes(name, stage, steps, base, model, assumptions)


def _cache_steps(base: Holding) -> list[tuple[Step, ...]]:
    size = sizes.attention_sizes(base.shape.config)[2]
    groups = next((group for group in (32, 16, 8) if size % group == 0), 32)
    return [(Step(method="quantize/kv_cache", params={"bits": 8, "group_size": groups}),)]


def _recipes(base: Holding) -> Iterator[tuple[str, Stage, list[tuple[Step, ...]]]]:
    """Recipes by name and stage, with the alternatives of each, of which the first that suits the model is taken."""

    def gptq(bits: int, *before: Step, after: tuple[Step, ...] = (), beyond: bool = False) -> list[tuple[Step, ...]]:
        more = {"head": True, "embeddings": True} if beyond else {}
        return [
            (*before, Step(method="quantize/gptq", params={"bits": bits, "group_size": size, **more}), *after)
            for size in GROUPS
        ]

    (cache,) = _cache_steps(base)
    yield "w8a8", "quantize", [(Step(method="quantize/smoothquant"),)]
    yield "gptq8", "quantize", gptq(8)
    yield "gptq4", "quantize", gptq(4)
    yield "gptq4_kv8", "quantize", gptq(4, after=cache)
    yield "gptq4_all", "quantize", gptq(4, beyond=True)
    yield "mixed", "quantize", [(Step(method="quantize/mixed", params={"budget": 3.25}),)]
    yield "gptq3", "quantize", gptq(3)
    heal = Step(method="distill/logits", params={"student": "current"})
    depth = Step(method="prune/depth", params={"share": 0.25})
    yield "depth", "train", [(depth, heal)]
    yield "student", "train", [(Step(method="distill/logits", params={"keep_every": 2}),)]
    yield "depth_gptq4", "train", gptq(4, depth, heal)
    yield "student_gptq4", "train", gptq(4, Step(method="distill/logits", params={"keep_every": 2}))
    yield "tenth", "train", [tuple(_in_groups(step, size) for step in preset("tenth")) for size in GROUPS]


def _in_groups(step: Step, size: int) -> Step:
    """A step; of GPTQ, with groups of that size."""
    return Step(method=step.method, params={**step.params, "group_size": size}) if "gptq" in step.method else step


def _of_recipes(
    name: str, stage: Stage, alternatives: Sequence[tuple[Step, ...]], base: Holding, model: Model,
    assumptions: Assumptions,
) -> Iterator[Advice]:  # fmt: skip
    """Advice with the first of some recipes that suits the model, none where none does."""
    for steps in alternatives:
        recipe = Recipe.model_validate({"model": model, "steps": steps})
        try:
            checked = methods.check(recipe)
            suitability.check_steps(checked, base.shape)
            held = [*itertools.accumulate((params for _, params in checked), Holding.after, initial=base)]
        except InputError:
            continue
        hours, teacher = _work(held, checked, assumptions)
        price = hours * assumptions.gpu_rate + teacher
        figures = _figures(held[-1], assumptions.batch, assumptions.context, assumptions, price)
        yield Advice(
            name, stage, recipe, assumptions.batch, assumptions.context, figures, _needs(checked), hours, teacher, price
        )
        return


def _work(
    held: Sequence[Holding], steps: Sequence[tuple[Method, Params]], assumptions: Assumptions
) -> tuple[float, float]:
    """GPU hours and the price of the teacher's tokens; `held` is the model before and after each step."""
    hours = teacher = 0.0
    for (method, params), (before, after) in zip(steps, itertools.pairwise(held), strict=True):
        if method.family == "distill":
            hours += assumptions.training_hours(after.shape.parameters)
            teacher += assumptions.teacher_usd()
        elif methods.calibrates(params):
            hours += assumptions.quantize_hours(before.shape.parameters)
    return hours, teacher


def _needs(steps: Sequence[tuple[Method, Params]]) -> tuple[str, ...]:
    """What must be there: calibration text, a teacher and training, kernels for packed weights."""
    found = []
    if any(methods.calibrates(params) for _, params in steps):
        found.append("calibration")
    if any(method.family == "distill" for method, _ in steps):
        found.append("training")
    if any(params.stored_bits(1024, 1024) for _, params in steps):
        found.append("packed")
    return tuple(found)
