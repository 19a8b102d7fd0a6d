"""What can become of a run whose training diverged: on from its last good checkpoint at a lower rate, or an end there.

Both are a setting of the step that trains, which the run's recipe gets when the run is resumed:

    learning_rate_factors: 0.1 after 100, 0 after 150

After 100 steps the learning rate is a tenth of what the schedule says, after 150 it is nothing, so training ends. The
recipe then says what was done: from the beginning it makes the same model, and files that model under no other key.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from pydantic import JsonValue

from engine import methods
from engine.errors import InputError
from engine.records import Divergence, Recipe, Run, Status

SETTING = "learning_rate_factors"
PART = re.compile(r"\s*(\d{1,9}(?:\.\d{1,20})?(?:e-\d{1,3})?) after ([1-9]\d{0,6})\s*", re.ASCII)
Factors = tuple[tuple[int, float], ...]  # (steps done, by what the schedule's rate is multiplied from then on)


def read(text: str) -> Factors:
    """The factors that a setting names.

    Raises:
        ValueError: it names none, or not in the order of the steps.
    """
    found: list[tuple[int, float]] = []
    for part in text.split(",") if text.strip() else ():
        match = PART.fullmatch(part)
        if match is None or not float(match[1]) <= 1:
            raise ValueError("write a factor from 0 to 1 and the steps before it, such as `0.1 after 100`")
        if found and (int(match[2]) <= found[-1][0] or not found[-1][1]):
            raise ValueError("steps must rise from factor to factor, and nothing comes after the factor 0")
        found.append((int(match[2]), float(match[1])))
    return tuple(found)


def at(factors: Factors, step: int) -> float:
    """The factor of a step, counted from 0."""
    return next((factor for first, factor in reversed(factors) if first <= step), 1.0)


def end(factors: Factors, steps: int) -> int:
    """How many of the schedule's steps are done."""
    return min([steps, *(first for first, factor in factors if not factor)])


def left(run: Run, found: Sequence[Divergence]) -> Divergence | None:
    """The divergence that ended a run's last attempt and left a checkpoint to go on from; None where there is none."""
    if run.status not in (Status.FAILED, Status.INTERRUPTED):
        return None
    return next((each for each in reversed(found) if each.attempt == run.attempt and each.kept), None)


def amended(run: Run, found: Sequence[Divergence], factor: float) -> Recipe:
    """The recipe with which a run goes on from its last good checkpoint at `factor` times its rate; 0: ends there.

    Raises:
        InputError: there is no such checkpoint, the factor is none, or the method cannot end there.
    """
    divergence = left(run, found)
    if divergence is None:
        raise InputError(
            f"Run {run.id} has no checkpoint to go on from at a lower rate: its last attempt did not diverge, "
            "or before the first one was written."
        )
    if not 0 <= factor < 1:
        raise InputError("The factor of the learning rate is a number from 0, which ends the training, to below 1.")
    step, kept = run.recipe.steps[divergence.number], divergence.kept
    # Without an end: where one stood at the checkpoint, and the last look found that to be bad, training goes on.
    before = tuple(each for each in read(str(step.params.get(SETTING, ""))) if each[1])
    held = [*(each for each in before if each[0] < kept), (kept, factor * at(before, kept))]
    held += [(first, factor * own) for first, own in before if first > kept and factor]
    text = ", ".join(f"{own:g} after {first}" for first, own in held)
    params: dict[str, JsonValue] = {**step.params, SETTING: text}
    steps = list(run.recipe.steps)
    steps[divergence.number] = step.model_copy(update={"params": params})
    recipe = run.recipe.model_copy(update={"steps": tuple(steps)})
    methods.check(recipe)
    return recipe


def may_end(run: Run, found: Sequence[Divergence]) -> bool:
    """Whether a run's training can end at its last good checkpoint.

    Not where weights are to be pruned yet, nor where it has ended there already, and was found to be bad.
    """
    try:
        return amended(run, found, 0) != run.recipe
    except InputError:
        return False


def told(divergence: Divergence) -> str:
    """A divergence as a sentence for who reads of what came after."""
    kept = (
        f"Its last good checkpoint was that of step {divergence.kept}." if divergence.kept else "It had no checkpoint."
    )
    return f"Training diverged at step {divergence.step} in attempt {divergence.attempt}: {divergence.why}. {kept}"


def effects(recipe: Recipe) -> list[str]:
    """What the factors in a recipe make of its trainings, as sentences."""
    return [
        f"{step.method}: after step {first} the learning rate is {factor:g} times what the schedule says."
        if factor
        else f"{step.method}: the training ends after step {first}, with the weights of that step."
        for step in recipe.steps
        for first, factor in read(str(step.params.get(SETTING, "")))
    ]
