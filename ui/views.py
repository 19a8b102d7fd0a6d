"""What the pages show, as pure functions from records to markup: strip, cards, tables, one run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup
from pydantic import JsonValue

from engine import rescue
from engine.recipes import dump_recipe
from engine.records import Measurement, Recipe, Run, Status
from ui import audit, language, live, markup, sensitivity, wording
from ui.cards import compare_table, shown, story
from ui.desk import Entry
from ui.journal import Story
from ui.live import Series
from ui.markup import join, tag
from ui.messages import translate
from ui.wording import say

Machine = Mapping[str, JsonValue]  # what Scheduler.status() says: cpu in per cent, memory in bytes


def masthead() -> Markup:
    """The name, one sentence, and the languages: each a link in itself, by its own name."""
    name = tag("h1", tag("span", "", class_="mq-logo", aria_hidden="true"), "Maquette")
    links = [
        tag(
            "a", own, href=f"?{language.KEY}={code}", lang=code, hreflang=code, data_language=code,
            aria_current="true" if code == language.current() else None,
        )
        for code, own in language.LANGUAGES.items()
    ]  # fmt: skip
    switch = tag("nav", *links, class_="mq-languages", aria_label=say("language"))
    return tag("header", name, tag("p", say("tagline"), class_="mq-sub"), switch, class_="mq-masthead")


def strip(status: Machine, history: Mapping[str, Sequence[float]], mine: Run | None) -> Markup:
    """Processor, memory, GPU and engine with a minute of history; below it the run that works."""
    cpu, used, total, engine = (_number(status.get(key)) for key in ("cpu", "ram_used", "ram_total", "engine"))
    ram = f"{used / 2**30:.1f} / {wording.size(total)}"
    cells = [
        _cell("CPU", say("unit.percent", value=f"{cpu:.0f}"), history.get("cpu", ()), 100),
        _cell("RAM", ram, history.get("ram_used", ()), total or None),
        _cell(say("strip.engine"), wording.size(engine), history.get("engine", ()), None),
    ]
    gpu = status.get("gpu")
    if isinstance(gpu, dict):
        held, whole = _number(gpu.get("used")), _number(gpu.get("total"))
        memory = f"{wording.size(held)} / {wording.size(whole)}"
        cells.append(_cell(str(gpu.get("name", "GPU")), memory, history.get("gpu", ()), whole or None))
    else:
        cells.append(_cell("GPU", say("strip.no_gpu"), (), None))
    return tag("div", tag("div", *cells, class_="mq-strip"), _working(status, mine))


def _number(value: JsonValue) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _cell(name: str, value: str, history: Sequence[float], top: float | None) -> Markup:
    line = live.sparkline(history, f"{name}: {value}", top) if len(history) else None
    return tag("div", tag("span", name, class_="name"), tag("span", value, class_="value"), line, class_="cell")


def _working(status: Machine, mine: Run | None) -> Markup:
    queued = _number(status.get("queued"))
    if not status.get("running"):
        return tag("p", say("strip.idle"), class_="mq-working")
    title = wording.title(mine.recipe) if mine else say("strip.other")
    parts: list[Markup | None] = [tag("strong", title)]
    progress = status.get("progress")
    if mine and isinstance(progress, dict):
        parts.append(progress_line(progress))
    if queued:
        parts.append(markup.chip(say("strip.queued", count=round(queued))))
    return tag("div", *parts, class_="mq-working")


def progress_line(progress: Mapping[str, JsonValue]) -> Markup:
    """Phase, bar and time left."""
    done, total, eta = (progress.get(key) for key in ("done", "total", "eta"))
    phase = phase_name(str(progress.get("phase") or ""))
    text = phase
    if isinstance(done, int | float) and isinstance(total, int | float) and total > 0:
        if progress.get("unit") == "B":
            text += f" · {wording.size(done)} / {wording.size(total)}"
        else:
            unit = str(progress.get("unit") or "")
            text += f" · {done:.0f} / {total:.0f} {wording.known(f'progress.{unit}', unit)}".rstrip()
    if isinstance(eta, int | float) and math.isfinite(eta):
        text += f" · {say('eta', span=wording.duration(max(1.0, eta)))}"
    bar = markup.progress(_number(done), _number(total), phase)
    return join((tag("span", text), bar))


def phase_name(name: str) -> str:
    """A phase in words: of the pipeline, or a method's title; as it is where no words are known for it."""
    return wording.known(f"phase.{name}", translate(name[:1].upper() + name[1:]) or say("phase.start"))


def runs_table(
    runs: Sequence[Run], picked: str, needle: str, now: float, marks: Mapping[str, str] | None = None
) -> Markup:
    """The visitor's runs; the title of each is a button that opens it. `needle` filters titles, models, states.

    marks: what stands beside a title, by the run's id.
    """
    if not runs:
        return tag("div", tag("p", say("runs.none")), class_="mq-empty")
    rows = []
    for run in runs:
        title, state = wording.title(run.recipe), wording.status(run.status)
        source = run.recipe.model.source
        if needle and needle.casefold() not in f"{title} {source} {state} {run.id}".casefold():
            continue
        span = (run.finished or now) - run.started if run.started else 0
        on = run.id == picked
        button = tag(
            "button", title, type="button", data_run=run.id, class_="mq-open", aria_pressed="true" if on else "false"
        )
        took = wording.duration(span) if span > 0 else ""
        rows.append(
            (
                join((button, markup.chip(marks[run.id]))) if marks and run.id in marks else button,
                tag("span", wording.source(source), title=source),
                markup.badge(run.status),
                took,
                wording.when(run.created, now),
            )
        )
    if not rows:
        return tag("div", tag("p", say("runs.no_match")), class_="mq-empty")
    headers = (say("run"), say("model"), say("state"), say("took"), say("started"))
    return markup.table(headers, rows, caption=say("runs.title"))


def _healed(recipe: Recipe) -> bool:
    """Whether a step trains what one before it has quantized."""
    families = [step.method.partition("/")[0] for step in recipe.steps]
    return "quantize" in families and "distill" in families[families.index("quantize") :]


def run_detail(
    run: Run, story: Story, series: Sequence[Series], progress: Mapping[str, JsonValue] | None, entry: Entry | None,
    baseline: Entry | None, formats: Sequence[str] = (),
) -> Markup:  # fmt: skip
    """One run: where it stands, what it measured, its charts, its log, its files.

    formats: the other ones in which its model is there.
    """
    head = tag(
        "header",
        tag("h2", wording.title(run.recipe)),
        markup.badge(run.status),
        tag("code", run.id),
        class_="mq-run-head",
    )
    parts: list[Markup | None] = [head]
    if run.reason:
        parts.append(
            markup.notice(translate(run.reason), "bad" if run.status in (Status.FAILED, Status.REFUSED) else "warn")
        )
    parts.append(_diverged(run, entry))
    if run.status is Status.RUNNING:
        parts.append(
            tag(
                "div",
                progress_line(progress or {"phase": story.phases[-1][1] if story.phases else ""}),
                class_="mq-working",
            )
        )
    if run.status is Status.QUEUED:
        parts.append(markup.notice(say("runs.queued")))
    if entry is not None and entry.measured:
        parts.append(_results(entry, baseline))
    if truth := _estimate(run, story, series):
        parts.append(truth)
    parts += [_live(item, run, story) for item in series]
    if entry is not None and sensitivity.NAME in entry.measured:
        parts.append(
            tag("section", tag("h3", say("sensitivity.title")), sensitivity.table(entry.measured[sensitivity.NAME]))
        )
    whole = entry.measured.get("size.bits_per_weight") if entry is not None else None
    stored, healed = whole.value if whole else None, _healed(run.recipe)
    parts.append(audit.report([*story.linears.values()], story.budget, stored, story.kept, healed))
    if run.status is Status.SUCCEEDED:
        names = ("recipe.yaml", "measurements.csv", "report.md", *(("README.md", "model.zip") if run.artifact else ()))
        files = [
            tag("li", markup.link(say(f"file.{name}"), f"./runs/{run.id}/{name}", download=True)) for name in names
        ]
        for name in formats:
            said = say("file.export", format=wording.known(f"format.{name}", name))
            files.append(tag("li", markup.link(said, f"./runs/{run.id}/{name}.zip", download=True)))
        parts.append(tag("ul", *files, class_="mq-files"))
    if story.log:
        text = "\n".join(translate(line) for _, line in list(story.log)[-14:])
        parts.append(
            tag(
                "section",
                tag("h3", say("runs.log")),
                tag("pre", text, tabindex="0", aria_label=say("runs.log")),
                class_="mq-log",
            )
        )
    parts.append(
        tag(
            "section",
            tag("h3", say("recipe")),
            tag("pre", dump_recipe(run.recipe), tabindex="0", aria_label=say("recipe")),
            class_="mq-log",
        )
    )
    return tag("article", *parts, class_="mq-run")


def _diverged(run: Run, entry: Entry | None) -> Markup | None:
    """What a training that diverged came to: what can be done now, or what was done."""
    if entry is None or not (found := entry.diverged):
        return None
    if run.status in (Status.FAILED, Status.INTERRUPTED) and found[-1].attempt == run.attempt:
        said = [say("runs.diverged")]
        if left := rescue.left(run, found):
            said += [say("runs.diverged.slower", step=left.kept)]
            said += [say("runs.diverged.finish")] if rescue.may_end(run, found) else []
        else:
            said += [say("runs.diverged.anew")]
        return markup.notice(" ".join(said))
    return markup.notice(" ".join(map(translate, story(entry))), "warn")


def _results(entry: Entry, baseline: Entry | None) -> Markup:
    about = tag("p", say("noise.about"), class_="mq-sub")
    if baseline is None or baseline.key == entry.key:
        rows = [(wording.name(key), shown(entry.measured[key])) for key in wording.sort(entry.measured)]
        return join((markup.table((say("measurement"), say("result")), rows, caption=say("result")), about))
    words = wording.verdict(baseline.measured, entry.measured)
    return join((tag("p", words, class_="mq-verdict"), compare_table([baseline, entry]), about))


def _live(series: Series, run: Run, story: Story) -> Markup:
    label = wording.known(f"series.{series.name}", series.name)
    named = Series(label, series.unit, series.points)
    phases = [(moment, phase_name(name)) for moment, name in story.phases] if series.name.startswith("memory") else []
    memory, seconds = (_number(story.estimate.get(key)) for key in ("memory", "seconds"))
    expected = None
    if series.name == "memory.resident" and memory and run.started:
        expected = live.Expected(memory, run.started + seconds)
    return live.lines(named, phases, expected)


def _estimate(run: Run, story: Story, series: Sequence[Series]) -> Markup | None:
    """What was expected of the run beside what it took, once it is done."""
    points = next((item.points for item in series if item.name == "memory.resident"), ())
    memory, seconds = (_number(story.estimate.get(key)) for key in ("memory", "seconds"))
    if run.status is not Status.SUCCEEDED or not points or not run.started or not run.finished:
        return None
    if min(memory, seconds) <= 0:
        return None
    peak, span = max(value for _, value in points), run.finished - run.started
    rows = [
        (say("estimate.memory"), wording.size(memory), wording.size(peak), _times(peak / memory)),
        (say("estimate.time"), wording.duration(seconds), wording.duration(span), _times(span / seconds)),
    ]
    expected = say("estimate.probed" if story.estimate.get("probed") else "estimate.expected")
    headers = (say("estimate.title"), expected, say("estimate.took"), say("estimate.ratio"))
    return markup.table(headers, rows, caption=say("estimate.title"))


def _times(ratio: float) -> str:
    return f"{wording.digits(ratio, 2)}×"


def differences(entries: Sequence[Entry]) -> Markup:
    """Settings and results in which the picked runs differ, one column a run; the best of each row is marked."""
    if len(entries) < 2:
        return tag("p", say("diff.pick"), class_="mq-sub")
    rows: list[tuple[Markup | str, ...]] = []
    settings = [_settings(entry.run) for entry in entries]
    for key in dict.fromkeys(key for found in settings for key in found):
        values = [found.get(key, "–") for found in settings]
        if len(set(values)) > 1:
            rows.append((key, *values))
    for name in wording.sort({key for entry in entries for key in entry.measured}):
        found = [entry.measured.get(name) for entry in entries]
        texts = [wording.value(m) if m else "–" for m in found]
        if len(set(texts)) > 1:
            rows.append((wording.name(name), *_marked(found)))
    if not rows:
        return tag("p", say("diff.same"), class_="mq-sub")
    return markup.table((say("difference"), *(entry.label for entry in entries)), rows, caption=say("diff.title"))


def _settings(run: Run) -> dict[str, str]:
    found = {say("model"): run.recipe.model.source, say("seed"): str(run.recipe.seed)}
    for number, step in enumerate(run.recipe.steps, 1):
        found[say("step", number=number)] = step.method
        for key, value in step.params.items():
            found[f"{number} · {wording.field(key)}"] = json.dumps(value)
    return found


def _marked(found: Sequence[Measurement | None]) -> list[Markup | str]:
    """The values; marked are the best and those that noise may keep from being it, unless these are all."""
    known = [m for m in found if m is not None]
    sense = known[0].higher_is_better
    best = (max if sense else min)(known, key=lambda m: m.value)
    top = [m for m in known if sense is not None and (m.value == best.value or wording.is_noise(best, m))]
    cells: list[Markup | str] = []
    for m in found:
        if m is None or not any(m is each for each in top) or len(top) == len(known):
            cells.append(shown(m))
        else:
            cells.append(join((tag("strong", wording.value(m)), tag("span", f" {say('best')}", class_="mq-sub"))))
    return cells
