"""A set of prompts on which models are compared one after the other: the numbers of each, and of all together."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from engine import promptsets
from engine.errors import BadParams
from ui import markup, sheet, wording
from ui.markup import tag
from ui.panes import Panes, Value
from ui.theme import ASSETS
from ui.wording import say

TOKENS = 64  # each prompt's text at most: a set is kept whole while the page is open


@dataclass(frozen=True)
class Mark:
    """What one model did with one prompt: tokens, tokens a second, mean KL, where it left the first model's text."""

    tokens: int
    speed: float | None
    kl: float | None
    split: int | None


@dataclass(frozen=True)
class Result:
    """One prompt's texts, as the panes show them, and a mark for each model."""

    prompt: str
    value: Value
    marks: tuple[Mark, ...]


def bundled() -> tuple[str, ...]:
    """The prompts that ship with the project."""
    return promptsets.read((ASSETS / "demo" / "prompts.txt").read_bytes(), jsonl=False)


def read(data: object, name: str) -> tuple[str, ...]:
    """A visitor's file.

    Raises:
        BadText: it cannot be used, in one line that says why.
        BadParams: it is no file.
    """
    if not isinstance(data, bytes):
        raise BadParams(say("error.no_file"))
    return promptsets.read(data, jsonl=name.lower().endswith((".jsonl", ".json")))


def result(prompt: str, shown: Panes) -> Result:
    """What came of one prompt."""
    marks = []
    for pane, split in zip(shown.panes, shown.splits(), strict=True):
        drift = [token.kl for token in pane.tokens if token.kl is not None]
        marks.append(Mark(len(pane.tokens), pane.speed, statistics.fmean(drift) if drift else None, split))
    return Result(prompt, shown.value(), tuple(marks))


def table(titles: Sequence[str], results: Sequence[Result], waiting: int = 0) -> Markup:
    """A line for each prompt, which opens its texts; below them the mean; the same as CSV."""
    if not results:
        return Markup("")
    rows: list[tuple[Markup | str, ...]] = []
    for number, found in enumerate(results):
        text = found.prompt if len(found.prompt) <= 60 else found.prompt[:59] + "…"
        button = tag("button", text, type="button", data_run=str(number), class_="mq-open")
        rows.append((button, *(_cell(mark, place) for place, mark in enumerate(found.marks))))
    rows.append((tag("strong", say("sets.mean")), *(_mean(results, place) for place in range(len(titles)))))
    headers = (say("prompt"), *titles)
    left = tag("p", say("sets.waiting", count=waiting), class_="mq-sub", role="status") if waiting else None
    file = markup.file_link(say("chart.csv"), as_csv(titles, results), "maquette-prompts.csv")
    return markup.join((left, markup.table(headers, rows, caption=say("sets.title")), file))


def as_csv(titles: Sequence[str], results: Sequence[Result]) -> str:
    """A row for each prompt and model."""
    rows: list[list[str | float | None]] = [["prompt", "model", "tokens", "tokens_per_second", "mean_kl", "parts_at"]]
    for found in results:
        for title, mark in zip(titles, found.marks, strict=True):
            rows.append([found.prompt, title, mark.tokens, mark.speed, mark.kl, mark.split])
    return sheet.write(rows)


def _cell(mark: Mark, place: int) -> str:
    parts = [say("panes.tokens", count=mark.tokens)]
    if mark.speed:
        parts.append(f"{mark.speed:.0f} {say('unit.tokens_per_second')}")
    if mark.kl is not None:
        parts.append(say("panes.drift", kl=wording.digits(mark.kl, 2)))
    if mark.split is not None and place:
        parts.append(say("sets.split", place=mark.split + 1))
    return " · ".join(parts)


def _mean(results: Sequence[Result], place: int) -> str:
    """Means over the prompts; KL with its 95 % interval, for prompts differ."""
    marks = [found.marks[place] for found in results]
    parts = []
    speeds = [mark.speed for mark in marks if mark.speed]
    if speeds:
        parts.append(f"{statistics.fmean(speeds):.0f} {say('unit.tokens_per_second')}")
    drift = [mark.kl for mark in marks if mark.kl is not None]
    if drift:
        error = statistics.stdev(drift) / math.sqrt(len(drift)) if len(drift) > 1 else 0.0
        interval = f" ± {wording.digits(1.96 * error, 2)}" if error else ""
        parts.append(say("panes.drift", kl=wording.digits(statistics.fmean(drift), 2) + interval))
    apart = sum(mark.split is not None for mark in marks)
    if place and apart:
        parts.append(say("sets.apart", count=apart, total=len(marks)))
    return " · ".join(parts) or "–"
