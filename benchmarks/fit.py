"""What was said a run would need beside what it took: `python -m benchmarks.fit [--write] [--again]`.

The demo and two random Llama shapes are measured, rounded, solved, taught and served by the real worker processes.
Resident memory of all processes of a run together is sampled from outside; each phase keeps its highest. What was
measured is kept in `.cache`, so that the table can be made again from another estimate; `--again` measures anew.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from transformers import LlamaConfig

from benchmarks import larger
from benchmarks.sections import README, ROOT, write_section
from engine import hardware, headers, places, preflight
from engine.attempts import EventReader, prepare
from engine.fit import Estimate, serving
from engine.methods import check
from engine.records import Recipe
from engine.runners.local import COMMAND, environment
from engine.sizes import Holding

log = logging.getLogger("fit")
CACHE = ROOT / "benchmarks" / ".cache" / "fit"
NICE = 5
EVERY = 0.02  # seconds between two looks
GPTQ = {"bits": 4, "group_size": 64, "samples": 32}
TEACH = {"steps": 3, "batch": 4}
PARTS = {"micro_batch": 1, "gradient_checkpointing": True}
BATCH, TOKENS = 1, 200  # that a warm model writes
SHAPES = {
    "0.27 B": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12, "num_attention_heads": 16,
        "num_key_value_heads": 16,
    },
    "0.4 B": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 6, "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
}  # fmt: skip
Peaks = dict[str, int]


def model(name: str) -> str:
    """The source of a subject: `demo`, or a folder with a random model of its shape."""
    if name == "demo":
        return "demo"
    folder = CACHE / "models" / name.replace(" ", "")
    config = LlamaConfig(
        vocab_size=32000, tie_word_embeddings=False, max_position_embeddings=2048, bos_token_id=0, eos_token_id=0,
        **SHAPES[name],
    )  # fmt: skip
    larger.make(folder, config)
    return str(folder)


def recipes(name: str) -> dict[str, Recipe]:
    """What is run of each subject."""
    once = ["size", "memory", *(["perplexity"] if name != "0.4 B" else [])]  # reading the text takes minutes
    both = [*once, "divergence"] if name == "demo" else ["size", "memory", "outputs"]
    steps: dict[str, tuple[list[object], list[str]]] = {
        "original": ([], once),
        "rtn": ([{"quantize/rtn": {"bits": 4, "group_size": 64}}], both),
        "gptq": ([{"quantize/gptq": GPTQ}], ["size"]),
        "teach": ([{"distill/logits": {**TEACH, "keep_every": 2}}], ["size"]),
        "lora": ([{"distill/repair": {**TEACH, "scope": "lora"}}], ["size"]),
        "teach in parts": ([{"distill/logits": {**TEACH, **PARTS, "keep_every": 2}}], ["size"]),
    }
    return {
        key: Recipe.model_validate({"model": model(name), "steps": each, "measure": wanted, "device": "cpu"})
        for key, (each, wanted) in steps.items()
    }


@contextmanager
def watching(process: subprocess.Popen[str]) -> Iterator[list[tuple[float, int]]]:
    """(time, resident bytes of the process and its children), sampled until the block ends."""
    found: list[tuple[float, int]] = []
    ended = threading.Event()

    def look() -> None:
        leader = psutil.Process(process.pid)
        while not ended.wait(EVERY):
            try:
                group = [leader, *leader.children(recursive=True)]
                hurry(group)
            except psutil.Error:
                return
            found.append((time.time(), larger.resident(group)))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


def hurry(group: list[psutil.Process]) -> None:
    """Let workers not step behind everything else: to memory it is the same, and a busy machine makes hours of it."""
    for process in group:
        if process.nice() > NICE:
            process.nice(NICE)
            with suppress(OSError):  # no grouping
                Path(f"/proc/{os.getsid(process.pid)}/autogroup").write_text(str(NICE))


def start(request: Path, **more: object) -> subprocess.Popen[str]:
    """A worker as the scheduler starts it."""
    return subprocess.Popen(
        [*COMMAND, str(request)], cwd=request.parent, env=environment("cpu", hardware.worker_threads()), text=True,
        start_new_session=True, stderr=subprocess.DEVNULL, **more,  # type: ignore[call-overload]
    )  # fmt: skip


def run(recipe: Recipe, home: Path) -> Peaks:
    """Highest resident bytes in each phase of a run, and its seconds; the artifact stays below `home`."""
    shutil.rmtree(home, ignore_errors=True)
    body = {"kind": "run", "run": "fit", "attempt": 1, "recipe": recipe.model_dump(mode="json")}
    request = prepare(home, "fit", 1, body)
    began = time.time()
    with start(request, stdout=subprocess.DEVNULL) as process, watching(process) as samples:
        process.wait()
    events = EventReader(request.parent).read()
    if not events or events[-1].data.get("status") != "succeeded":
        raise SystemExit(f"{recipe.title()}: {events[-1].data if events else 'no word'}")
    phases = [(event.time, str(event.data["name"])) for event in events if event.kind == "phase"]
    peaks: Peaks = {"seconds": round(time.time() - began)}
    for moment, resident in samples:
        name = next((name for begun, name in reversed(phases) if begun <= moment), "starting")
        peaks[name] = max(peaks.get(name, 0), resident)
    return peaks


def serve(source: str, folder: Path) -> Peaks:
    """Highest resident bytes of a warm process that loads a model, and of its writing."""
    folder.mkdir(parents=True, exist_ok=True)
    request = folder / "request.json"
    request.write_text(json.dumps({"kind": "serve", "model": source, "device": "cpu"}))
    asked = {"do": "generate", "prompt": "Mara is", "max_tokens": TOKENS, "temperature": 1.0, "seed": 0, "write": None}
    with start(request, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process, watching(process) as samples:
        assert process.stdin is not None
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line)["event"]
            if event == "ready":
                process.stdin.write(json.dumps(asked) + "\n")
                process.stdin.flush()
            if event in ("done", "error"):
                break
        last = samples[-1][1]
        process.stdin.close()
    return {"loading": max(resident for _, resident in samples), "writing": last}


def measured(name: str, again: bool, kept: bool) -> dict[str, Peaks]:
    """What each recipe of a subject took, kept in `.cache`; what is `kept` there alone, where that is wanted."""
    found: dict[str, Peaks] = {}
    for key, recipe in recipes(name).items():
        home = CACHE / "home" / f"{name}-{key}".replace(" ", "")
        if kept and not (CACHE / f"{home.name}.json").exists():
            continue
        found[key] = _kept(CACHE / f"{home.name}.json", lambda r=recipe, h=home: run(r, h), again)  # type: ignore[misc]
        log.info("%s, %s: %s", name, key, found[key])
    artifact = CACHE / "home" / f"{name}-rtn".replace(" ", "") / "runs" / "fit" / "attempt-1" / "artifact"
    for key, source in {"original": model(name), "rtn": str(artifact)}.items():
        home = CACHE / "home" / f"{name}-serve-{key}".replace(" ", "")
        if kept and not (CACHE / f"{home.name}.json").exists():
            continue
        found[f"serve {key}"] = _kept(CACHE / f"{home.name}.json", lambda s=source, h=home: serve(s, h), again)  # type: ignore[misc]
        log.info("%s, serve %s: %s", name, key, found[f"serve {key}"])
    return found


def _kept(file: Path, look: Callable[[], Peaks], again: bool) -> Peaks:
    if again or not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(look()))
    peaks: Peaks = json.loads(file.read_text())
    return peaks


# Phases of a run by the beginning of their names; what is none of these, is a step or loading.
AFTER = {
    "probing": "probe", "saving": "save", "verifying": "verify", "measuring": "measure", "loading packed": "measure",
    "writing": "measure",
}  # fmt: skip
BEFORE = ("seconds", "starting", "checking")


def peaks_by_situation(peaks: Peaks) -> Peaks:
    """The highest of the phases that a situation stands for."""
    found: Peaks = {}
    for phase, value in peaks.items():
        if phase not in BEFORE:
            situation = next((each for words, each in AFTER.items() if phase.startswith(words)), "compress")
            found[situation] = max(found.get(situation, 0), value)
    return found


def expected(recipe: Recipe) -> Estimate:
    """As preflight estimates it."""
    return preflight.estimate(recipe)


def lines(name: str, found: dict[str, Peaks]) -> Iterator[tuple[str, str, int, int]]:
    """(recipe, situation, expected bytes, measured bytes) for everything of a subject."""
    for key, recipe in recipes(name).items():
        if key not in found:
            continue
        estimate = expected(recipe)
        for situation, took in peaks_by_situation(found[key]).items():
            needs = [need.total for need in estimate.needs if need.situation == situation]
            if needs:
                yield key, situation, max(needs), took
        took = max(value for phase, value in found[key].items() if phase != "seconds")
        yield key, "the whole run", estimate.total, took
    for key in ("original", "rtn"):
        if f"serve {key}" not in found:
            continue
        shape = headers.inspect(places.resolve(model(name)))
        held = Holding(shape, 2)
        for _, params in check(recipes(name)[key]):
            held = held.after(params)
        yield key, "serve", serving(held, BATCH, TOKENS).total, max(found[f"serve {key}"].values())


def report(names: list[str], again: bool, kept: bool) -> str:
    """The table in Markdown."""
    rows = []
    errors = []
    for name in names:
        for key, situation, thought, took in lines(name, measured(name, again, kept)):
            error = thought / took - 1
            errors.append(abs(error))
            rows.append(
                f"| {name} | {key} | {situation} | {thought / 2**20:,.0f} | {took / 2**20:,.0f} | {error:+.0%} |"
            )
    head = ["| model | recipe | situation | estimate, MiB | measured, MiB | error |", "|---|---|---|---:|---:|---:|"]
    within = sum(error <= 0.15 for error in errors)
    about = (
        f"Resident memory of all processes of a run together, sampled every {EVERY * 1000:.0f} ms from outside, the "
        f"highest of each situation. {hardware.machine()}; {hardware.worker_threads()} thread a worker. "
        f"{within} of {len(errors)} sums within 15 %, the worst {max(errors):.0%} off. "
        "The constants of `engine.fit` were chosen with such figures in sight; other shapes are its test."
    )
    return "\n".join([about, "", *head, *rows])


def main() -> None:
    """Measure and report; with --write also into README.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(["demo", *SHAPES]))
    parser.add_argument("--write", action="store_true", help="put the table into benchmarks/README.md")
    parser.add_argument("--again", action="store_true", help="measure anew what is kept in .cache")
    parser.add_argument("--kept", action="store_true", help="measure nothing: show what is kept in .cache")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    text = report(arguments.models.split(","), arguments.again, arguments.kept)
    log.info("%s", text)
    if arguments.write:
        write_section(README, "fit", text)


if __name__ == "__main__":
    main()
