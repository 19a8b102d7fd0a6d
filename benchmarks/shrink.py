"""Models of another shape: what pruning, distillation and the chain of both with quantization give and cost.

    python -m benchmarks.shrink [part ...]    # bar, sparsity, students, assistant, ensemble, chain; all: an hour

Writes the sections of these names: whole in docs/results.md, in brief in README.md. Every line is a run of the real
pipeline on the demo model, with text that the demo's own world tells (six million tokens from a seed that its training
never used). What was run is kept in `.cache/trials`: a run goes on where another stopped.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Self

import torch
from pydantic import JsonValue

from benchmarks.sections import RESULTS, ROOT, write_section
from benchmarks.trials import CACHE, FIDELITY, TASKS, Trial, table, trial
from engine import hardware, pipeline
from engine.measure import _text, accuracy
from engine.models import load
from engine.presets import PRESETS
from engine.records import EventKind, Measurement

DEMO = ROOT / "assets" / "demo"
DOCUMENTS, LITTLE, SEED = 120_000, 1200, 12_345
BATCH = 32
SHORT, MIDDLE, LONG = 600, 800, 4800  # steps
EIGHT, MANY = 8, 64  # texts that are read in one pass
QUARTER: dict[str, JsonValue] = {"prune/depth": {"share": 0.25}}  # of the blocks that go
REPAIRS = {"norms": "norms and scales", "low-rank additions": "lora", "every weight": "all"}
REPAIR_STEPS = 150
BRIEF = ("size.bytes", "perplexity", "kl", "accuracy")
COLUMNS = (*BRIEF, *(f"accuracy.{task}" for task in TASKS))

log = logging.getLogger("shrink")


class Shown(NamedTuple):
    """What a part found, as docs/results.md has it and as README.md does."""

    whole: str
    brief: str

    @classmethod
    def of(cls, trials: Sequence[Trial], words: str = "", without: str = "") -> Self:
        """A table of trials and what is to be said of it. without: a column that says nothing here."""
        below = f"\n\n{words}" if words else ""
        tables = (table(trials, [each for each in columns if each != without]) for columns in (COLUMNS, BRIEF))
        return cls(*(f"{each}{below}" for each in tables))


def text(documents: int = DOCUMENTS) -> str:
    """A JSONL file of the first documents that the demo's world tells; made where it is not there."""
    file = CACHE / ("world.jsonl" if documents == DOCUMENTS else f"world-{documents}.jsonl")
    if not file.exists():
        sys.path.insert(0, str(DEMO))
        import world

        file.parent.mkdir(parents=True, exist_ok=True)
        told = islice(world.stream(world.inhabitants(2000, 0), SEED, world.LAST), documents)
        file.write_text("".join(json.dumps({"text": each}) + "\n" for each in told))
    return str(file)


def lesson(steps: int, **changes: JsonValue) -> dict[str, JsonValue]:
    """A step of distillation on that text."""
    usual: dict[str, JsonValue] = {"steps": steps, "batch": BATCH, "learning_rate": 0.002, "text": text()}
    return {"distill/logits": usual | changes}


def sparsity() -> Shown:
    """Magnitude, Wanda and SparseGPT at the same zeros, before and after repair; in brief KL and accuracy alone."""
    trials = [trial("original", [])]
    brief = [" | ".join(["", "not repaired", *REPAIRS]), " | ".join(["---", *["---:"] * (1 + len(REPAIRS))])]
    for pattern in ("unstructured", "2:4"):
        shown = "half" if pattern == "unstructured" else pattern
        for name in ("magnitude", "wanda", "sparsegpt"):
            step: dict[str, JsonValue] = {f"prune/{name}": {"pattern": pattern}}
            found = [trial(f"{name}, {shown}", [step])]
            for repaired, scope in REPAIRS.items():
                repair: dict[str, JsonValue] = {"distill/repair": {"scope": scope, "steps": REPAIR_STEPS}}
                found.append(trial(f"{name}, {shown}, repaired: {repaired}", [step, repair]))
            trials += found
            cells = [f"{each.measured['kl'].value:.3g} ({100 * each.measured['accuracy'].value:.1f})" for each in found]
            brief.append(" | ".join([f"{name}, {shown}", *cells]))
    words = "\n\nKL to the original in nat, and accuracy in %."
    return Shown(table(trials, COLUMNS), "\n".join(f"| {line} |" for line in brief) + words)


def shallow(**changes: JsonValue) -> list[object]:
    """Three of the four blocks, trained for a short time."""
    return [QUARTER, lesson(SHORT, student="current", **changes)]


def slim() -> list[object]:
    """Three of the four blocks with a little less than half of their neurons, not trained yet."""
    return [QUARTER, {"prune/width": {"neurons": 0.54, "multiple": 16}}]


def taught(steps: int, **changes: JsonValue) -> list[object]:
    """That student, trained on half as many sequences a step as the others: it learns more from as many tokens."""
    return [*slim(), lesson(steps, student="current", batch=BATCH // 2, **changes)]


def bar() -> Shown:
    """What a student of three of the four blocks with half of the channels saves and keeps."""
    halved: dict[str, JsonValue] = {"prune/width": {"neurons": 0.0, "channels": 0.5, "multiple": 64}}
    steps = [QUARTER, halved, lesson(2 * SHORT, student="current", batch=BATCH // 2)]
    shown = [trial("original", []), trial(f"three blocks, half the channels, distilled, {2 * SHORT:,} steps", steps)]
    paces = [Pace(*each) for each in zip(decoding(shown), reading(shown, EIGHT), reading(shown, MANY), strict=True)]
    return Shown.of(shown, saved(*shown, *paces))


def students() -> Shown:
    """A student with the teacher and with labels alone, on much text and on little; each pair is trained thrice."""
    name, few = "three blocks, 46 % of the neurons", text(LITTLE)

    def thrice(what: str, **changes: JsonValue) -> list[Trial]:
        return [trial(f"{name}, {what}", taught(MIDDLE, **changes), seed=seed) for seed in range(3)]

    original = trial("original", [])
    long = trial(f"{name}, distilled, {LONG:,} steps", taught(LONG))
    much = thrice(f"distilled, {MIDDLE} steps"), thrice(f"labels alone, {MIDDLE} steps", label_weight=1.0)
    little = (
        thrice("distilled on little text", text=few, label_weight=0.0),
        thrice("labels alone on little text", text=few, label_weight=1.0),
    )
    words = [
        f"{documents:,} documents: {margin('distilled', by_teacher, 'labels alone', by_labels)}"
        for documents, (by_teacher, by_labels) in ((DOCUMENTS, much), (LITTLE, little))
    ]
    shown = [original, long, *(each[0] for each in (*much, *little))]
    return Shown.of(shown, "\n".join(f"- {each}" for each in words))


class Pace(NamedTuple):
    """Seconds for the next token at batch 1, and to read eight texts, and 64, of 128 tokens in one pass."""

    decoding: float
    eight: float
    many: float


def saved(original: Trial, student: Trial, before: Pace, after: Pace) -> str:
    """What a student saves and keeps."""
    kept = student.measured["accuracy"].value / original.measured["accuracy"].value
    size = 1 - student.measured["size.bytes"].value / original.measured["size.bytes"].value
    return (
        f"{student.name}: {size:.0%} smaller, {kept:.1%} of the original's accuracy; reads {MANY} texts of 128 tokens "
        f"{before.many / after.many:.2f} times as fast ({1e3 * after.many:.0f} against {1e3 * before.many:.0f} ms), "
        f"{EIGHT} of them {before.eight / after.eight:.2f} times ({1e3 * after.eight:.1f} against "
        f"{1e3 * before.eight:.1f} ms), writes one text "
        f"{before.decoding / after.decoding:.2f} times as fast ({1e3 * after.decoding:.2f} against "
        f"{1e3 * before.decoding:.2f} ms a token; medians in turns)."
    )


def decoding(trials: Sequence[Trial], turns: int = 5) -> list[float]:
    """Seconds for the next token at batch 1 of each, the median of medians taken in turns."""
    found: list[list[float]] = [[] for _ in trials]
    for _ in range(turns):
        for place, each in enumerate(trials):

            def hear(kind: EventKind, data: dict[str, JsonValue], place: int = place) -> None:
                if kind == "measurement" and data["name"] == "latency.tpot":
                    found[place].append(float(str(data["value"])))

            pipeline.measure_folder(each.artifact, ("latency",), None, hear, lambda: None, "cpu")
    return [statistics.median(each) for each in found]


@torch.inference_mode()
def reading(trials: Sequence[Trial], texts: int, turns: int = 30) -> list[float]:
    """Seconds of one pass over so many texts of 128 tokens of each, the median of passes taken in turns."""
    networks = [load(each.artifact).network for each in trials]
    ids = torch.randint(networks[0].config.vocab_size, (texts, 128), generator=torch.Generator().manual_seed(0))
    found: list[list[float]] = [[] for _ in trials]
    for _ in range(turns):
        for network, seconds in zip(networks, found, strict=True):
            began = time.perf_counter()
            network(input_ids=ids, use_cache=False)
            seconds.append(time.perf_counter() - began)
    return [statistics.median(each) for each in found]


def margin(a_name: str, a: Sequence[Trial], b_name: str, b: Sequence[Trial]) -> str:
    """How far two models are apart, each trained with the same seeds: in accuracy, question by question, in perplexity,
    and in KL to the original; means over the trainings, with the errors of one, for all are measured on one text.
    """
    points, error = paired(a, b)
    words = []
    for name, title in (("perplexity", "perplexity"), ("kl", "KL")):
        (one, of_one), (other, of_other) = (
            (statistics.fmean(m.value for m in measured), statistics.fmean(m.error or 0 for m in measured))
            for measured in ([each.measured[name] for each in trials] for trials in (a, b))
        )
        apart = abs(one - other) / math.hypot(of_one, of_other)
        words.append(f"{title} {one:.3g} against {other:.3g} ({apart:.1f} standard errors)")
    alone = ", ".join(f"{100 * paired([one], [other])[0]:+.1f}" for one, other in zip(a, b, strict=True))
    return (
        f"after the same tokens, {len(a)} trainings each, {a_name} against {b_name}: {100 * points:+.1f} points of "
        f"accuracy ({abs(points) / error:.1f} standard errors of the questions' differences; by training {alone}), "
        f"{', '.join(words)}."
    )


def paired(a: Sequence[Trial], b: Sequence[Trial]) -> tuple[float, float]:
    """The difference of two models' accuracies and its standard error, for both answered the same questions.

    Of several trainings each question's answers are averaged first.
    """

    def answers(of: Trial) -> list[int]:
        return [int(mark) for task in TASKS for mark in str(of.measured[f"accuracy.{task}"].details["right"])]

    means = [[statistics.fmean(marks) for marks in zip(*map(answers, trials), strict=True)] for trials in (a, b)]
    apart = [one - other for one, other in zip(*means, strict=True)]
    return statistics.fmean(apart), statistics.stdev(apart) / math.sqrt(len(apart))


def assistant() -> Shown:
    """A student of about a tenth of the weights, taught by the original, and by an assistant of a size in between."""
    tenth: dict[str, JsonValue] = {"student": "size", "hidden_size": 64, "num_blocks": 2}
    direct = trial("a tenth, taught by the original", [lesson(SHORT, **tenth)])
    helped = trial("a tenth, taught by an assistant", [lesson(SHORT, assistants=1, **tenth)])
    trials = [trial("original", []), direct, helped]
    gain = helped.measured["accuracy"].value - direct.measured["accuracy"].value
    error = math.hypot(helped.measured["accuracy"].error or 0, direct.measured["accuracy"].error or 0)
    verdict = "helped" if gain > 2 * error else "harmed" if gain < -2 * error else "made no difference beyond the error"
    return Shown.of(trials, f"The assistant {verdict} ({100 * gain:+.1f} ± {100 * error:.1f} points).")


def ensemble() -> Shown:
    """Two students that differ by their seed, and the mean of their probabilities, distilled into one of their size.

    The one begins as both did, before they were trained, and is given their probabilities alone.
    """
    members = [trial(f"student {seed + 1} of two", taught(MIDDLE), seed=seed) for seed in (0, 1)]
    first, second = (str(each.artifact) for each in members)
    fresh = trial("not trained", slim())
    steps = lesson(
        2 * MIDDLE, student="folder", folder=str(fresh.artifact), teachers=second, batch=BATCH // 2, label_weight=0.0
    )
    pupil = trial("one student, taught by both", [steps], FIDELITY[:-1], first)
    together = accuracy_of_mean([each.artifact for each in members])
    share = pupil.measured["accuracy"].value / together.value
    words = (
        f"The mean of both students' probabilities is right in {100 * together.value:.1f} ± "
        f"{100 * (together.error or 0):.1f} %; the one student keeps {share:.1%} of that."
    )
    return Shown.of([fresh, *members, pupil], words, without="kl")


def accuracy_of_mean(folders: Sequence[Path]) -> Measurement:
    """The accuracy of the mean of several models' probabilities of each option."""
    models = [load(folder) for folder in folders]
    items = _text.items(models[0], models[0].network.num_parameters())
    scores = [accuracy.scores(model, items) for model in models]
    means = [[sum(map(math.exp, option)) for option in zip(*rows, strict=True)] for rows in zip(*scores, strict=True)]
    return accuracy.measure(items, [row.index(max(row)) for row in means])[0]


def chain() -> Shown:
    """The presets that prune, distill back and quantize, healed for longer; beside quantization alone."""
    packed: dict[str, JsonValue] = {"head": True, "embeddings": True}
    trials = [
        trial("original", []),
        trial("half: fewer blocks, distilled, 8 bit", healed("half", 2 * SHORT)),
        trial("quarter: fewer blocks, distilled, 4 bit", healed("quarter", 2 * SHORT)),
        trial("GPTQ 3 bit alone", [{"quantize/gptq": {"bits": 3, **packed}}]),
        trial("GPTQ 2 bit alone", [{"quantize/gptq": {"bits": 2, **packed}}]),
        trial("tenth: fewer blocks, narrower, distilled, 3 bit, repaired", healed("tenth", 2 * SHORT)),
    ]
    size = trials[-1].measured["size.bytes"].value / trials[0].measured["size.bytes"].value
    return Shown.of(trials, f"The tenth is {size:.1%} of the bytes.")


def healed(name: str, steps: int) -> list[object]:
    """A preset whose distillation reads the world's text for so many steps, and its repair of codes for a quarter."""
    heals: dict[str, dict[str, JsonValue]] = {
        "distill/logits": lesson(steps, student="current", batch=BATCH // 2),
        "distill/repair": {"distill/repair": {"steps": steps // 4, "text": text()}},
    }
    return [heals.get(step.method, {step.method: step.params}) for step in PRESETS[name]]


PARTS: dict[str, tuple[str, Callable[[], Shown]]] = {
    "bar": ("DistilBERT's bar, 40 % smaller, 60 % faster, 97 % of the accuracy:", bar),
    "sparsity": ("Zeros at the same number, before and after self-repair of 150 steps:", sparsity),
    "students": ("A student, by what it learns from, for how long, and from how much text:", students),
    "assistant": (
        "A student of a tenth of the weights, with and without an assistant of a size in between:",
        assistant,
    ),
    "ensemble": ("Two students taught into one:", ensemble),
    "chain": ("The chain prune, distill, quantize, beside quantization alone:", chain),
}


def main() -> None:
    """Run the parts and write their sections."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all where none is named")
    parts = parser.parse_args().parts or list(PARTS)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    for name in parts:
        title, make = PARTS[name]
        found = make()
        about = f"Measured {time.strftime('%Y-%m-%d')} on {hardware.machine()}; ± is one standard error."
        log.info("%s\n%s", name, found.whole)
        for file, body in ((RESULTS, found.whole), (ROOT / "README.md", found.brief)):
            write_section(file, name, f"{title}\n\n{body}\n\n{about}")


if __name__ == "__main__":
    main()
