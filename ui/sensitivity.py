"""What each block of a model can bear, shown before anybody chooses.

A table of the record that `engine.measure.sensitivity` makes; each column is coloured on a scale of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup
from pydantic import JsonValue

from engine.records import Measurement, Model, Recipe
from ui import markup, sheet, wording
from ui.desk import Entry
from ui.markup import tag
from ui.messages import translate
from ui.wording import say

NAME = "sensitivity"
COLUMNS = ("influence", "angle", "perplexity", "error_half", "error_3_bits")
SHARES = ("error_half", "error_3_bits")  # shown in per cent
Row = Mapping[str, JsonValue]


def recipe(model: Model, calibration: str) -> Recipe:
    """The run that measures it, and nothing else."""
    return Recipe.model_validate({"model": model, "measure": [NAME], "calibration": calibration})


def newest(entries: Sequence[Entry], model: Model) -> Measurement | None:
    """What the newest of the runs has measured on this model before any step; None where none has."""
    for entry in entries:
        if entry.run.recipe.model == model and not entry.run.recipe.steps and NAME in entry.measured:
            return entry.measured[NAME]
    return None


def table(found: Measurement | None) -> Markup:
    """Blocks down, what was measured across: darker where the block matters more. A line where nothing is known."""
    blocks = found.details.get("blocks") if found is not None else None
    rows = [row for row in blocks if isinstance(row, dict)] if isinstance(blocks, list) else []
    if found is None or not rows:
        return tag("p", say("sensitivity.none"), class_="mq-sub")
    heats = {column: _heats([_number(row.get(column)) for row in rows]) for column in COLUMNS}
    headers = (say("sensitivity.block"), *(say(f"sensitivity.{column}") for column in COLUMNS))
    body = [
        tag(
            "tr", tag("th", str(row.get("block")), scope="row"),
            *(tag("td", _shown(column, row), style=f"--heat: {heats[column][place]:.0f}%") for column in COLUMNS),
        )
        for place, row in enumerate(rows)
    ]  # fmt: skip
    caption = say("sensitivity.caption")
    head = tag("thead", tag("tr", *(tag("th", header, scope="col") for header in headers)))
    inner = tag("table", tag("caption", caption, class_="unseen"), head, tag("tbody", *body))
    file = sheet.write([headers, *([str(row.get("block")), *(_shown(c, row) for c in COLUMNS)] for row in rows)])
    whole = say(
        "sensitivity.whole", perplexity=wording.digits(_number(found.details.get("perplexity"))),
        protocol=translate(str(found.details.get("protocol", ""))),
    )  # fmt: skip
    return markup.join(
        (
            tag("p", caption, class_="mq-sub", aria_hidden="true"),
            tag("div", inner, class_="mq-heat", tabindex="0", role="region", aria_label=caption),
            tag("p", whole, class_="mq-sub"),
            markup.file_link(say("chart.csv"), file, "maquette-sensitivity.csv"),
        )
    )


def _heats(values: Sequence[float]) -> list[float]:
    """Each value's place between the least and the largest of its column, in per cent; by the logarithm."""
    logs = [math.log10(max(value, 1e-12)) for value in values]
    low, high = min(logs), max(max(logs), min(logs) + 1e-9)
    return [12 + 68 * (each - low) / (high - low) for each in logs]


def _shown(column: str, row: Row) -> str:
    value = _number(row.get(column))
    return say("unit.percent", value=wording.digits(100 * value, 2)) if column in SHARES else wording.digits(value)


def _number(value: JsonValue) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else 0.0
