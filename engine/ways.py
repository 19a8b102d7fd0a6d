"""Ways out where a recipe does not fit: the same recipe with one thing changed, and what it needs then."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pydantic import JsonValue

from engine import fit, methods
from engine.errors import InputError
from engine.fit import Estimate, Machine
from engine.headers import Shape
from engine.methods import Method, Params
from engine.records import Recipe, Step

PHRASES = {
    "four_bits": "4 bit needs",
    "no_original": "without the original beside it, it needs",
    "size_alone": "measuring `size` alone needs",
    "fewer_samples": "32 shorter calibration sequences need",
    "smaller_batch": "a batch of 2 needs",
    "lora": "training additions of low rank needs",
    "every_second": "a student of every second block needs",
    "cached": "asking the teacher once, before, needs",
    "streamed": "GPTQ block by block needs",
}  # fmt: skip
OF_ORIGINAL = ("accuracy", "divergence", "outputs")  # measures that read the original too
FOUR_BITS = Step(method="quantize/gptq", params={"bits": 4, "group_size": 64})


@dataclass(frozen=True)
class Way:
    """A change by its name in `PHRASES`, the changed recipe, the bytes that it needs, and whether they are free."""

    name: str
    recipe: Recipe
    total: int
    fits: bool

    @property
    def phrase(self) -> str:
        """`4 bit needs 5.2`"""
        return f"{PHRASES[self.name]} {self.total / 2**30:.1f}"


def out(
    recipe: Recipe, shape: Shape, machine: Machine, now: Estimate,
    checked: Callable[[Recipe], list[tuple[Method, Params]]] = methods.check,
) -> Way | None:  # fmt: skip
    """The first change with which a recipe fits, else the one that needs least; None where none needs less.

    checked: the methods of a recipe, with settings that know the models they name.
    """
    found = []
    for name, changed in _changes(recipe):
        try:
            total = fit.estimate(changed, shape, checked(changed), machine).total
        except InputError:  # it cannot follow the other steps, or does not suit the model
            continue
        if total < now.total:
            found.append(Way(name, changed, total, total <= machine.free))
    fitting = [way for way in found if way.fits]
    return fitting[0] if fitting else min(found, key=lambda way: way.total, default=None)


def _changes(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """What could be changed, the least first; at last everything that helps at once."""
    yield from _in_steps(recipe)
    fewer = tuple(name for name in recipe.measure if name not in OF_ORIGINAL)
    if recipe.steps and fewer != recipe.measure:
        yield "no_original", recipe.model_copy(update={"measure": fewer or ("size",)})
    quantized = any(step.method.startswith("quantize/") for step in recipe.steps)
    if not quantized:
        steps = (*recipe.steps, FOUR_BITS)
        yield "four_bits", recipe.model_copy(update={"steps": steps, "measure": fewer or ("size",)})
    if set(recipe.measure) - {"size"}:
        yield "size_alone", recipe.model_copy(update={"measure": ("size",)})
    if recipe.steps and any(params.whole() for _, params in methods.check(recipe)):
        yield "streamed", recipe.model_copy(update={"steps": (FOUR_BITS,), "measure": ("size",)})


def _in_steps(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    wishes: dict[str, dict[str, JsonValue]] = {
        "fewer_samples": {"samples": 32, "sequence_length": 128},
        "cached": {"teacher_logits": "cached"},
        "smaller_batch": {"batch": 2},
        "lora": {"scope": "lora"},
    }
    for name, wanted in wishes.items():
        changed = recipe.model_copy(update={"steps": tuple(_with(step, wanted) for step in recipe.steps)})
        if changed != recipe:
            yield name, changed
    if any(step.params.get("student") == "size" for step in recipe.steps):
        yield "every_second", recipe.model_copy(update={"steps": tuple(map(_of_every_second, recipe.steps))})


def _of_every_second(step: Step) -> Step:
    """The step with every second block for a student, where it has one of a given size."""
    if step.params.get("student") != "size":
        return step
    kept = {name: value for name, value in step.params.items() if name not in ("hidden_size", "num_blocks")}
    return step.model_copy(update={"params": {**kept, "student": "blocks", "keep_every": 2}})


def _with(step: Step, wanted: dict[str, JsonValue]) -> Step:
    """The step with these settings, where it has all of them and one would become smaller or another."""
    method = methods.get(step.method)
    fields = method.params.model_fields
    if not set(wanted) <= set(fields) or (set(wanted) <= {"sequence_length", "samples"} and "steps" in fields):
        return step
    now = {name: step.params.get(name, fields[name].default) for name in wanted}
    if all(_no_more(now[name], value) for name, value in wanted.items()):
        return step
    return step.model_copy(update={"params": {**step.params, **wanted}})


def _no_more(now: object, wanted: JsonValue) -> bool:
    if isinstance(now, int) and isinstance(wanted, int):
        return now <= wanted
    return now == wanted
