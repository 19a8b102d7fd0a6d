"""`python -m engine advise MODEL --goal memory=8GB`: the adviser's answer as rows of text and as JSON."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import JsonValue, ValidationError

from engine import adviser, headers, places
from engine.adviser import Advice, Advised, Goal
from engine.assumptions import Assumptions
from engine.errors import BadParams, UnknownName, short
from engine.hub import Hub
from engine.records import Measurement, Model
from engine.store import Store

TITLES = {
    "batch": "write for more sequences at a time",
    "one_at_a_time": "write for one sequence at a time",
    "kv8": "KV cache in 8 bit",
    "kernels": "compute on packed weights",
    "context": "half the context",
    "w8a8": "8-bit weights and inputs",
    "gptq8": "GPTQ, 8 bit",
    "gptq4": "GPTQ, 4 bit",
    "gptq4_kv8": "GPTQ, 4 bit; KV cache in 8",
    "gptq4_all": "GPTQ, 4 bit, the head too, embeddings in 8",
    "mixed": "mixed bits, 3.25 on average",
    "gptq3": "GPTQ, 3 bit",
    "depth": "three of four blocks, distilled",
    "student": "half the blocks, distilled",
    "depth_gptq4": "three of four blocks, distilled, 4 bit",
    "student_gptq4": "half the blocks, distilled, 4 bit",
    "tenth": "fewer blocks, half the channels, distilled, 3 bit, repaired",
}
NOT_MEASURED = "not measured here"
MARKS = "Marked: > the mildest that reaches the goal, + reaches it too, x does not help"


def answer(model: Model, goal: str, settings: Sequence[str], database: Path, hub: Hub | None = None) -> Advised:
    """What to do with a model for a goal; quality is what the runs in the database measured.

    Raises:
        HubError: the hub does not answer.
        InputError: no such model, a goal that is none, an assumption that does not exist or is out of its bounds.
    """
    wanted = Goal.parse(goal)
    assumptions = assume(settings)
    shape = headers.inspect(places.open_model(model, hub))
    if not database.exists():
        return adviser.advise(wanted, model, shape, assumptions)
    store = Store(database, read_only=True)
    runs = [(run, functools.partial(store.measurements, run.id)) for run in store.runs()]
    return adviser.advise(wanted, model, shape, assumptions, adviser.of_runs(runs))


def assume(settings: Sequence[str]) -> Assumptions:
    """The usual assumptions with some of them changed: `teacher_price=3`.

    Raises:
        UnknownName: there is no such assumption.
        BadParams: no value, or one out of its bounds.
    """
    body = {}
    for setting in settings:
        name, _, value = (part.strip() for part in setting.partition("="))
        if name and name not in Assumptions.model_fields:
            raise UnknownName("assumption", name, Assumptions.model_fields)
        if not name or not value:
            names = ", ".join(Assumptions.model_fields)
            raise BadParams(
                f"{short(setting)!r} is no assumption with its number. Write it as teacher_price=3; there are {names}."
            )
        body[name] = value
    try:
        return Assumptions.model_validate(body)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise BadParams(f"{where}: {problem['msg']}, got {short(problem['input'])}.") from None


def rows(found: Advised) -> list[list[str]]:
    """A table with a line for each measure, marked as MARKS says."""
    lines = [["", "", "memory", "file", "latency", "USD / M tokens", "GPU hours", "USD once", "quality"]]
    now = found.now
    original = _figures(now.memory, now.file, 1.0, now.cost)
    lines.append([">" if found.met else "", "as it is", *original, "", "", _quality(found.quality)])
    for advice in found.advices:
        figures = advice.figures
        ratio = figures.token_seconds / now.token_seconds
        lines.append([
            _mark(advice), TITLES[advice.name], *_figures(figures.memory, figures.file, ratio, figures.cost),
            f"{advice.hours:.3g}", f"{advice.price:,.2f}",
            _quality(advice.quality) if advice.recipe is not None else "the same",
        ])  # fmt: skip
    return lines


def as_json(found: Advised) -> dict[str, JsonValue]:
    """The answer as JSON: bytes, seconds, USD; recipes as `run` reads them."""
    return {
        "goal": {"kind": found.goal.kind, "value": found.goal.value},
        "now": {**vars(found.now)},
        "met": found.met,
        "advice": [*_entries(found)],
    }


def _entries(found: Advised) -> Iterator[JsonValue]:
    for advice in found.advices:
        recipe: JsonValue = None if advice.recipe is None else advice.recipe.model_dump(mode="json")
        yield {
            "name": advice.name, "stage": advice.stage, "batch": advice.batch, "context": advice.context,
            **vars(advice.figures), "hours": advice.hours, "teacher": advice.teacher, "price": advice.price,
            "helps": advice.helps, "reaches": advice.reaches, "first": advice.first, "needs": [*advice.needs],
            "quality": {name: m.model_dump(mode="json") for name, m in advice.quality.items()}, "recipe": recipe,
        }  # fmt: skip


def _mark(advice: Advice) -> str:
    return ">" if advice.first else "+" if advice.reaches else " " if advice.helps else "x"


def _figures(memory: int, file: int, ratio: float, cost: float) -> list[str]:
    return [_size(memory), _size(file), f"{ratio:.2f}x", f"{cost:.3g}"]


def _size(count: int) -> str:
    """Bytes in the unit that a goal is typed in, GB; below one in MB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def _quality(found: Mapping[str, Measurement]) -> str:
    if not found:
        return NOT_MEASURED
    return ", ".join(f"{name} {m.value:.4g}" for name, m in found.items())
