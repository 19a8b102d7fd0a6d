"""A finished run as files to take away: the recipe, the measurements as CSV, a report in Markdown."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from engine import card as model_card
from engine.errors import BadModel
from engine.recipes import dump_recipe
from ui import cards, flips, language, sheet, wording
from ui.desk import Entry
from ui.messages import translate
from ui.wording import Measured, say

Writer = Callable[[Entry, Entry | None], str]


def recipe(entry: Entry, baseline: Entry | None = None) -> str:
    """The recipe as YAML, as the command line reads it."""
    return dump_recipe(entry.run.recipe)


def measurements(entry: Entry, baseline: Entry | None = None) -> str:
    """Every measurement as one CSV row: name, value, standard error, unit, protocol."""
    rows: list[list[str | float | None]] = [["name", "value", "standard_error", "unit", "higher_is_better", "details"]]
    for name in wording.sort(entry.measured):
        m = entry.measured[name]
        better = "" if m.higher_is_better is None else str(m.higher_is_better)
        rows.append([m.name, m.value, m.error, m.unit, better, json.dumps(m.details)])
    return sheet.write(rows)


def folder(entry: Entry) -> Path:
    """The artifact of a run.

    Raises:
        BadModel: it has none on this machine.
    """
    if entry.stored or not entry.run.artifact or not Path(entry.run.artifact).is_dir():
        raise BadModel(say("error.no_artifact", run=entry.run.id))
    return Path(entry.run.artifact)


def card(entry: Entry, baseline: Entry | None = None) -> str:
    """The model card with what was measured here.

    Raises:
        BadModel: there is no model to describe.
    """
    try:
        config = json.loads((folder(entry) / "config.json").read_text())
    except (OSError, ValueError):
        raise BadModel(say("error.no_artifact", run=entry.run.id)) from None
    with language.use(language.ENGLISH):  # as all of the card: it is read by whoever finds the model
        return model_card.text(entry.run.recipe, config, results(entry, baseline))


def results(entry: Entry, baseline: Entry | None) -> str:
    """What was measured, as a section of the card; empty where nothing was."""
    if not entry.measured:
        return ""
    known = baseline.measured if baseline is not None and baseline.key != entry.key else {}
    lines = [f"## {say('card.title')}", ""]
    if known:
        lines += [wording.verdict(known, entry.measured), ""]
        found = flips.between(known, entry.measured)
        lines += [wording.flipped(found), ""] if found else []
    lines += [*numbers(entry, known), "", say("card.about"), say("noise.about")]
    where = dict.fromkeys(str(m.details["machine"]) for m in entry.measured.values() if m.details.get("machine"))
    lines += ["", say("card.machine", machine=_plain(", ".join(where)))] if where else []
    return "\n".join(lines)


def markdown(entry: Entry, baseline: Entry | None = None) -> str:
    """What was done, what came out beside the original, and how to do it again."""
    run = entry.run
    lines = [f"# {_plain(wording.title(run.recipe))}", ""]
    if baseline is not None and baseline.key != entry.key:
        lines += [wording.verdict(baseline.measured, entry.measured), ""]
    recipe = model_card.shareable(run.recipe)  # the file goes to others
    source = recipe.model.source.replace("`", "'")
    lines += [f"{say('model')}: `{source}` · {say('run')}: `{run.id}`", ""]
    if said := cards.story(entry):
        lines += [f"**{_plain(' '.join(map(translate, said)))}**", ""]
    known = baseline.measured if baseline is not None and baseline.key != entry.key else {}
    lines += [*numbers(entry, known), "", say("noise.about")]
    lines += ["", "```yaml", dump_recipe(recipe).rstrip().replace("```", "'''"), "```", ""]
    return "\n".join(lines)


def numbers(entry: Entry, known: Measured) -> list[str]:
    """Every measurement as a row of a Markdown table, beside the original's where that is known."""
    lines = [f"| | {say('original')} | {say('result')} | {say('difference')} |", "|---|---|---|---|"]
    for name in wording.sort(entry.measured):
        b, a = entry.measured[name], known.get(name)
        before = f"{wording.value(a)} {wording.error(a)}".strip() if a else ""
        change = wording.change(a, b) if a else ""
        now = f"{wording.value(b)} {wording.error(b)}".strip()
        lines.append(f"| {_plain(wording.name(name))} | {_plain(before)} | {_plain(now)} | {_plain(change)} |")
    return lines


WRITERS: dict[str, tuple[Writer, str]] = {
    "recipe.yaml": (recipe, "application/yaml; charset=utf-8"),
    "measurements.csv": (measurements, "text/csv; charset=utf-8"),
    "report.md": (markdown, "text/markdown; charset=utf-8"),
}


def _plain(text: str) -> str:
    """Text that neither ends a table cell nor begins markup."""
    cleaned = " ".join(text.split())
    for mark in "\\`*_[]<>|":
        cleaned = cleaned.replace(mark, f"\\{mark}")
    return cleaned
