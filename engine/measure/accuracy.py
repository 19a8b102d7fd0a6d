"""Accuracy on multiple-choice tasks, and the answers that flipped against the baseline.

The option with the highest total log-probability after the prompt is the model's choice; no option is
generated. Standard errors are binomial. A flip is an answer that went from right to wrong or back
(Dutta et al., 2024, arXiv 2407.09141): equal accuracies can hide many.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import JsonValue
from torch import Tensor

from engine.measure._text import Item, batches, log_probabilities
from engine.models import LoadedModel
from engine.records import Measurement


def choices(model: LoadedModel, items: Sequence[Item]) -> list[int]:
    """The option that the model prefers, for each item."""
    return [row.index(max(row)) for row in scores(model, items)]


def scores(model: LoadedModel, items: Sequence[Item]) -> list[list[float]]:
    """The total log-probability of each option of each item."""
    found = [[0.0] * len(item.options) for item in items]
    # An option of one token can be read off the prompt's own prediction: one row for all options.
    rows: list[tuple[int, ...]] = []
    jobs: list[tuple[int, range]] = []  # which item, which of its options
    for number, item in enumerate(items):
        if all(len(option) == 1 for option in item.options):
            rows.append(item.prompt)
            jobs.append((number, range(len(item.options))))
        else:
            rows += [item.prompt + option[:-1] for option in item.options]
            jobs += [(number, range(place, place + 1)) for place in range(len(item.options))]
    for batch in batches(rows):
        logs = log_probabilities(model, [rows[i] for i in batch])
        for line, index in enumerate(batch):
            number, places = jobs[index]
            item = items[number]
            for place in places:
                found[number][place] = option_score(logs[line], len(item.prompt), item.options[place])
    return found


def option_score(logs: Tensor, prompt: int, option: tuple[int, ...]) -> float:
    """Total log-probability of an option's tokens after `prompt` tokens, from logs (length, V)."""
    return sum(float(logs[prompt - 1 + i, token]) for i, token in enumerate(option))


def measure(items: Sequence[Item], chosen: Sequence[int]) -> list[Measurement]:
    """Accuracy of each task and their mean."""
    found, values, errors = [], [], []
    for task in sorted({item.task for item in items}):
        right = [chosen[i] == item.answer for i, item in enumerate(items) if item.task == task]
        value, error = proportion(sum(right), len(right))
        values.append(value)
        errors.append(error)
        details: dict[str, JsonValue] = {
            "protocol": "highest total log-probability of the options, zero-shot",
            "items": len(right),
            "right": "".join("1" if answer else "0" for answer in right),
        }
        found.append(
            Measurement(
                name=f"accuracy.{task}", value=value, error=error, unit="1", higher_is_better=True, details=details
            )
        )
    mean = Measurement(
        name="accuracy",
        value=sum(values) / len(values),
        error=math.sqrt(sum(e * e for e in errors)) / len(errors),
        unit="1",
        higher_is_better=True,
        details={"protocol": "mean of the tasks", "tasks": len(values), "items": len(items)},
    )
    return [mean, *found]


def flips(items: Sequence[Item], chosen: Sequence[int], baseline: Sequence[int]) -> Measurement:
    """Share of items on which the model and the baseline differ in being right."""
    pairs = [(c == item.answer, b == item.answer) for item, c, b in zip(items, chosen, baseline, strict=True)]
    changed = sum(ours != theirs for ours, theirs in pairs)
    value, error = proportion(changed, len(pairs))
    lost = sum(theirs and not ours for ours, theirs in pairs)
    return Measurement(
        name="flips",
        value=value,
        error=error,
        unit="1",
        higher_is_better=False,
        details={"items": len(pairs), "right_to_wrong": lost, "wrong_to_right": changed - lost},
    )


def proportion(count: int, total: int) -> tuple[float, float]:
    """A share and its binomial standard error."""
    value = count / total
    return value, math.sqrt(value * (1 - value) / total)
