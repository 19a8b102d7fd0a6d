"""Words, units and numbers as a reader wants them: the only place that formats.

`say(key)` is the page's dictionary in the language that is spoken (`ui.language`), one dictionary a language.
Records hold SI units; here they become MiB, ms and per cent.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping

from engine import figures
from engine.presets import PRESETS
from engine.records import Measurement, Recipe, Run, Status
from ui import chinese_methods, flips, language
from ui.chinese import CHINESE
from ui.flips import Flips
from ui.words import ENGLISH

Measured = Mapping[str, Measurement]

# The order in which measurements are shown; names not listed follow in alphabetical order.
ORDER = (
    "size.bytes", "size.bits_per_weight", "size.sparsity", "memory.loaded", "memory.peak", "memory.kv_cache",
    "latency.ttft", "latency.tpot", "throughput.b1", "throughput.b4", "throughput.b8", "throughput.b16", "perplexity",
    "bits_per_byte", "accuracy", "kl", "top1_agreement", "flips",
)  # fmt: skip
FRACTIONS, digits = figures.FRACTIONS, figures.digits
UNITS = {"tokens/s": "unit.tokens_per_second"}  # the key of a unit's words where it is not its name
DICTIONARIES: Mapping[str, Mapping[str, str]] = {language.ENGLISH: ENGLISH, language.CHINESE: CHINESE}


def say(key: str, **values: object) -> str:
    """The words for `key`, with `values` filled in; where `count` is 1 and the language has a form for it, that one."""
    words = DICTIONARIES[language.current()]
    if values.get("count") == 1 and f"{key}.one" in words:
        key = f"{key}.one"
    text = words[key] if key in words else ENGLISH[key]
    return text.format(**values) if values else text


def known(key: str, otherwise: str) -> str:
    """The words for `key`, or `otherwise` where there are none: for names that come from methods and workers."""
    return DICTIONARIES[language.current()].get(key, ENGLISH.get(key, otherwise))


def name(measurement: str) -> str:
    """A measurement's name for a reader: `latency.tpot` -> `Time per token`."""
    if measurement.startswith("accuracy."):
        return say("name.accuracy.task", task=task(measurement.removeprefix("accuracy.")))
    return known(f"name.{measurement}", measurement)


def task(name: str) -> str:
    """A task's name for a reader, as it is where it is not one of ours."""
    return known(f"task.{name}", name)


def field(name: str) -> str:
    """The label of a method's setting."""
    if language.current() == language.CHINESE and name in chinese_methods.FIELDS:
        return chinese_methods.FIELDS[name]
    return known(f"field.{name}", name.replace("_", " ").capitalize())


def choice(value: object) -> str:
    """The label of one of a setting's choices."""
    if language.current() == language.CHINESE and value in chinese_methods.CHOICES:
        return chinese_methods.CHOICES[str(value)]
    return known(f"choice.{value}", str(value))


def title(recipe: Recipe) -> str:
    """A recipe's title in words; a chain that has a name goes by it."""
    chain = next((name for name, steps in PRESETS.items() if len(steps) > 1 and steps == recipe.steps), None)
    if chain is not None:
        return say(f"title.{chain}")
    text = recipe.title()
    return known(f"title.{text}", " → ".join(map(_step, text.split(" → "))))


def _step(text: str) -> str:
    if language.current() != language.CHINESE:
        return text
    name, _, rest = text.partition(" ")
    for pattern, written in chinese_methods.SETTINGS:
        rest = re.sub(pattern, written, rest)
    return f"{chinese_methods.STEPS.get(name, name)} {rest}".rstrip()


def size(count: float) -> str:
    """Bytes in binary units with three digits: `7.42 MiB`."""
    return " ".join(figures.size(count))


def duration(seconds: float) -> str:
    """Seconds as `420 µs`, `31 ms`, `4.2 s`, `3 min 20 s` or `2 h 5 min`."""
    if seconds < 60:
        text, unit = figures.duration(seconds)
        return say("unit.seconds", value=text) if unit == "s" else f"{text} {unit}"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        key = "unit.minutes_seconds" if rest else "unit.minutes"
        return say(key, minutes=minutes, seconds=rest)
    return say("unit.hours_minutes", hours=minutes // 60, minutes=minutes % 60)


def percent(fraction: float, signed: bool = False) -> str:
    """A fraction in per cent with one decimal, or none where it is round: `92.4 %`."""
    text = figures.percent(fraction)
    return say("unit.percent", value=minus(f"+{text}" if signed and not text.startswith("-") else text))


def minus(text: str) -> str:
    """A number with a real minus sign, which stands as wide as a plus."""
    return text.replace("-", "−")


def quantity(value: float, unit: str, label: str = "") -> str:
    """A number of a record with its unit: bytes, seconds, fractions and plain numbers each in their way."""
    if unit in figures.SECONDS:
        return duration(value)
    text, shown = figures.scaled(value, unit, label)
    if shown == "%":
        return percent(value)
    return f"{text} {known(UNITS.get(shown, f'unit.{shown}'), shown)}".rstrip()


def value(measurement: Measurement) -> str:
    """A measurement's value with its unit: `7.42 MiB`, `31 ms`, `92.4 %`."""
    return quantity(measurement.value, measurement.unit, measurement.name)


def error(measurement: Measurement) -> str:
    """Its 95 % interval, `± 1.3 %`, or nothing where no standard error is known."""
    if not measurement.error:
        return ""
    return f"± {quantity(1.96 * measurement.error, measurement.unit, measurement.name)}"


def shown(measurement: Measurement) -> str:
    """Its value and, where it is known, its 95 % interval."""
    return f"{value(measurement)} {error(measurement)}".strip()


def difference(a: Measurement, b: Measurement) -> str:
    """From A to B: a ratio for sizes, times and speeds, a difference for shares and fidelity."""
    root = a.name.split(".")[0]
    if root in FRACTIONS or a.name in FRACTIONS:
        return f"{minus(f'{100 * (b.value - a.value):+.1f}')} {say('unit.points')}"
    if a.value <= 0 or b.value <= 0:
        return minus(f"{b.value - a.value:+.3g}")
    if root in ("perplexity", "bits_per_byte", "kl"):
        return percent(b.value / a.value - 1, signed=True)
    if 0.95 <= b.value / a.value <= 1.05:
        return percent(b.value / a.value - 1, signed=True)
    if root == "throughput":
        return say("ratio.faster" if b.value > a.value else "ratio.slower", ratio=ratio(a.value, b.value))
    words = ("ratio.faster", "ratio.slower") if root == "latency" else ("ratio.smaller", "ratio.larger")
    return say(words[0] if b.value < a.value else words[1], ratio=ratio(a.value, b.value))


def change(a: Measurement, b: Measurement) -> str:
    """`difference`, called noise where it is not beyond the error of measuring."""
    text = difference(a, b)
    return say("noise.inside", change=text) if is_noise(a, b) else text


def is_noise(a: Measurement, b: Measurement) -> bool:
    """Whether a known error explains the difference between two values."""
    return bool(a.error or b.error) and a.value != b.value and better(a, b) == 0


def floor(a: Measurement, b: Measurement) -> str:
    """The smallest difference that counts: two joint standard errors; nothing where no error is known."""
    if not (a.error or b.error):
        return ""
    return quantity(2 * math.hypot(a.error or 0, b.error or 0), a.unit, a.name)


def ratio(a: float, b: float) -> str:
    """How many times the larger holds the smaller: `3.6×`."""
    return f"{digits(max(a, b) / min(a, b), 2)}×"


def better(a: Measurement, b: Measurement) -> int:
    """+1 where B is better beyond two joint standard errors, -1 where worse, 0 where nobody can tell."""
    if a.higher_is_better is None or a.value == b.value or is_vague(a, b):
        return 0
    if a.error or b.error:
        noise = 2 * math.hypot(a.error or 0, b.error or 0)
    else:
        noise = 0.005 * max(abs(a.value), abs(b.value))
    if abs(b.value - a.value) <= noise:
        return 0
    return 1 if (b.value > a.value) == a.higher_is_better else -1


def is_vague(a: Measurement, b: Measurement) -> bool:
    """Whether the 95 % interval of a time or a speed reaches beyond the value itself: then no ratio says anything."""
    timed = a.name.split(".")[0] in ("latency", "throughput")
    return timed and any(1.96 * (each.error or 0) >= abs(each.value) > 0 for each in (a, b))


def verdict(a: Measured, b: Measured) -> str:
    """One sentence: what became smaller and faster from A to B, and what it cost."""
    gains = [part for part in (_smaller(a, b), _faster(a, b), _later(a, b), _crowded(a, b), _memory(a, b)) if part]
    costs = [part for part in (_perplexity(a, b), _accuracy(a, b), _flips(a, b)) if part]
    if not gains + costs:
        return say("verdict.unknown")
    text = say("list.comma").join(gains + costs)
    return say("list.sentence", text=text[0].upper() + text[1:])


def _pair(key: str, a: Measured, b: Measured) -> tuple[Measurement, Measurement] | None:
    if key in a and key in b and a[key].value > 0 and b[key].value > 0:
        return a[key], b[key]
    return None


def _smaller(a: Measured, b: Measured) -> str:
    pair = _pair("size.bytes", a, b)
    if pair is None:
        return ""
    same = 0.98 <= pair[1].value / pair[0].value <= 1.02
    return say("verdict.same_size") if same else difference(*pair)


def _faster(a: Measured, b: Measured) -> str:
    pair = _pair("latency.tpot", a, b)
    if pair is None or is_vague(*pair):
        return ""
    if 0.95 <= pair[1].value / pair[0].value <= 1.05 or is_noise(*pair):
        return say("verdict.same_speed")
    return difference(*pair)


def _later(a: Measured, b: Measured) -> str:
    """That the first token comes later, where it does: packed weights save reading, and prefill computes."""
    slower = _slowdown("latency.ttft", a, b)
    return say("verdict.first_slower", ratio=slower[1]) if slower else ""


def _crowded(a: Measured, b: Measured) -> str:
    """That many texts at a time are written slower, at the batch size where most so."""
    batches = [int(key.removeprefix("throughput.b")) for key in a if re.fullmatch(r"throughput\.b\d{1,4}", key)]
    found = [(slower, batch) for batch in batches if batch > 1 and (slower := _slowdown(f"throughput.b{batch}", a, b))]
    if not found:
        return ""
    (_, text), batch = max(found)
    return say("verdict.batch_slower", ratio=text, batch=batch)


def _slowdown(key: str, a: Measured, b: Measured) -> tuple[float, str] | None:
    """How many times B is slower than A, as a number and in words, where that is more than noise."""
    pair = _pair(key, a, b)
    if pair is None or 0.95 <= pair[1].value / pair[0].value <= 1.05 or better(*pair) >= 0:
        return None
    values = sorted(each.value for each in pair)
    return values[1] / values[0], ratio(*values)


def _memory(a: Measured, b: Measured) -> str:
    pair = _pair("memory.loaded", a, b)
    if pair is None or 0.9 <= pair[1].value / pair[0].value <= 1.1:
        return ""
    less = pair[1].value < pair[0].value
    said = ratio(pair[0].value, pair[1].value)
    peak = _pair("memory.peak", a, b)
    turned = peak is not None and (peak[1].value > 1.1 * peak[0].value if less else 1.1 * peak[1].value < peak[0].value)
    if peak is None or not turned or is_noise(*peak):
        return say("verdict.less_memory" if less else "verdict.more_memory", ratio=said)
    key = "verdict.less_memory_more_peak" if less else "verdict.more_memory_less_peak"
    return say(key, ratio=said, peak=ratio(peak[0].value, peak[1].value))


def _perplexity(a: Measured, b: Measured) -> str:
    pair = _pair("perplexity", a, b)
    if pair is None:
        return ""
    return say("verdict.perplexity", change=change(*pair))


def _accuracy(a: Measured, b: Measured) -> str:
    if "accuracy" not in a or "accuracy" not in b:
        return ""
    return say("verdict.accuracy", change=change(a["accuracy"], b["accuracy"]))


def _flips(a: Measured, b: Measured) -> str:
    found = flips.between(a, b)
    if found is not None:
        return say("verdict.flips", count=found.changed, total=found.total)
    if "flips" not in b or "flips" in a:
        return ""
    details = b["flips"].details
    total = next((details[key] for key in ("total", "items", "count", "n") if key in details), None)
    if isinstance(total, int | float) and total > 0:
        return say("verdict.flips", count=round(b["flips"].value * total), total=round(total))
    return say("verdict.flips_share", share=percent(b["flips"].value))


def flipped(found: Flips) -> str:
    """One line: how many answers changed, which way, and whether that could be chance."""
    key = "flips.none" if not found.changed else "flips.chance" if found.p > 0.05 else "flips.real"
    odds = "< 0.001" if found.p < 0.001 else f"= {digits(found.p, 2)}"
    return say(key, changed=found.changed, total=found.total, lost=found.lost, won=found.won, p=odds)


def sort(names: Mapping[str, object] | set[str]) -> list[str]:
    """Measurement names in the order of the page."""
    place = {key: index for index, key in enumerate(ORDER)}
    return sorted(names, key=lambda key: (place.get(key, place["accuracy"] + 0.5), key))


def status(state: Status) -> str:
    """A run's status in words."""
    return say(f"status.{state.value}")


def when(moment: float, now: float | None = None) -> str:
    """How long ago: `just now`, `4 min ago`, or the date."""
    past = (time.time() if now is None else now) - moment
    if past < 60:
        return say("when.now")
    if past < 86_400:
        minutes = round(past / 60)
        short = say("unit.minutes", minutes=minutes) if minutes < 60 else say("unit.hours", hours=minutes // 60)
        return say("when.ago", span=short)
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(moment))


def run_label(run: Run) -> str:
    """A run for a list of choices: as `run_name`, and a piece of its id."""
    return f"{run_name(run)} · {run.id[-6:]}"


def run_name(run: Run) -> str:
    """A run's title, and its model where it is not the demo."""
    name, model = title(run.recipe), run.recipe.model.source
    return name if model == "demo" else f"{name} · {source(model)}"


def source(path: str) -> str:
    """A model's source for a reader: the folder's name; the run's where it is what a run has made."""
    parts = path.rstrip("/").split("/")
    if len(parts) > 2 and parts[-1] == "artifact":
        return say("source.run", run=parts[-3][-6:])
    return parts[-1]
