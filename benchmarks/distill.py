"""Distillation beside trl: `python -m benchmarks.distill [--write]`.

The same teacher, student, rows, batch and loss (forward KL over the whole vocabulary at temperature 1): trl's trainer
for generalised knowledge distillation in an environment of its own, and `distill/logits`, with the teacher in each
step and with its cached likeliest tokens. Each repetition is a process of its own, taken in turns. Time is that of the
training with models and rows at hand, and of the teacher's cache, made or found; memory is resident, its largest.
Maquette also takes the KL on held-out rows as it goes, and ends with a checkpoint, trl with neither: these seconds are
told apart, and are not in the throughput.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.decode import priority
from benchmarks.peers import environments, watch
from benchmarks.peers.watch import Watched
from benchmarks.sections import README, ROOT, by_processor, write_section
from engine import hardware
from engine.calibration import token_rows
from engine.distill._student import every_kth
from engine.models import load
from engine.places import DEMO

CACHE = environments.CACHE.parent / "distill"
WAYS = {
    "trl": "trl 1.16, `GKDTrainer`",
    "live": "Maquette, teacher in each step",
    "cached": "Maquette, the teacher's cache made",
    "again": "Maquette, the cache found",
}

log = logging.getLogger("distill")


@dataclass(frozen=True)
class Subject:
    """A teacher and how its student is trained."""

    title: str  # of the teacher, and what its student has of it
    steps: int
    batch: int
    length: int


SUBJECTS = {
    "demo": Subject("the demo model (2.3 M parameters, 1,280 tokens), half the blocks", 100, 16, 128),
    "wide": Subject("60 M parameters at random (8 blocks of 512, 32,000 tokens), half the blocks", 12, 4, 256),
}  # fmt: skip


def teacher(name: str) -> Path:
    """The folder of a teacher; the random one is made where it is not there."""
    if name == "demo":
        return DEMO / "model"
    folder = CACHE / name
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=32_000, hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
            num_key_value_heads=4, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0, pad_token_id=0,
            max_position_embeddings=512, initializer_range=0.05,
        )  # fmt: skip
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        load(DEMO / "model").tokenizer.save_pretrained(folder)
    return folder


def prepare(name: str) -> dict[str, str]:
    """The files that all ways read: the teacher, its student, the text, and the rows of token ids."""
    subject, folder = SUBJECTS[name], CACHE / f"{name}-files"
    folder.mkdir(parents=True, exist_ok=True)
    model = load(teacher(name))
    every_kth(model, 2).network.save_pretrained(folder / "student")
    rows = token_rows(model.tokenizer, DEMO / "text.txt", subject.length, subject.steps * subject.batch)
    (folder / "rows.json").write_text(json.dumps(rows.tolist()))
    return {
        "model": str(teacher(name)), "student": str(folder / "student"), "rows": str(folder / "rows.json"),
        "text": str(DEMO / "text.txt"), "steps": str(subject.steps), "batch": str(subject.batch),
        "length": str(subject.length), "rate": "0.001", "out": str(folder / "out"), "cache": str(folder / "cache"),
    }  # fmt: skip


def measure(name: str, way: str, files: dict[str, str], number: int) -> Watched:
    """One run of one way."""
    shutil.rmtree(files["out"], ignore_errors=True)
    if way != "again":
        shutil.rmtree(files["cache"], ignore_errors=True)
    said = CACHE / "logs" / f"{name}.{way}.{number}.log"
    if way == "trl":
        command = [str(environments.python("trl")), str(Path(environments.__file__).parent / "by_trl.py")]
    else:
        command = [sys.executable, "-m", "benchmarks.peers.by_maquette_distill"]
    asked = {**files, "task": "live" if way == "live" else "cached"}
    found = watch.run(command, asked, CACHE if way == "trl" else ROOT, said, ("training", "trained"))
    log.info("%s, %s: %.1f s, %.2f GiB, %s", name, WAYS[way], found.seconds, found.peak / 2**30, found.words)
    return found


def beside(run: Watched) -> float:
    """Seconds for the KL on held-out rows and the checkpoint."""
    return float(run.words.get("beside", 0))


def trained(run: Watched) -> float:
    """Seconds of the training without them."""
    return float(run.words.get("seconds", run.seconds))


def table(name: str, runs: dict[str, list[Watched]]) -> str:
    """The table of one subject."""
    subject = SUBJECTS[name]
    tokens = subject.steps * subject.batch * subject.length
    usual = statistics.median(trained(run) for run in runs["trl"])
    lines = [
        f"On {subject.title}; {subject.steps} steps of {subject.batch} x {subject.length} tokens:", "",
        "| by | seconds, median (least to most) | and KL, checkpoint | tokens a second | times trl's | peak, GiB |",
        "|---|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for way, title in WAYS.items():
        seconds = sorted(trained(run) for run in runs[way])
        others = statistics.median(beside(run) for run in runs[way])
        middle = statistics.median(seconds)
        peak = max(run.peak for run in runs[way]) / 2**30
        lines.append(
            f"| {title} | {middle:.1f} ({seconds[0]:.1f} to {seconds[-1]:.1f}) | {others:.1f} | {tokens / middle:,.0f} "
            f"| {usual / middle:.2f} | {peak:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the tables into benchmarks/README.md")
    parser.add_argument("--subject", action="append", choices=tuple(SUBJECTS))
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parts = [
        f"{hardware.machine()}; torch {torch.__version__}; {options.repetitions} repetitions in turns.{priority()}"
    ]
    for name in options.subject or SUBJECTS:
        files = prepare(name)
        runs: dict[str, list[Watched]] = {way: [] for way in WAYS}
        for number in range(options.repetitions):
            for way in WAYS:
                runs[way].append(measure(name, way, files, number))
        parts += ["", table(name, runs)]
    text = "\n".join(parts)
    log.info("%s", text)
    if options.write:
        write_section(README, by_processor("distill"), text)


if __name__ == "__main__":
    main()
