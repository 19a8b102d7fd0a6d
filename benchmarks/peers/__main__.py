"""Maquette beside GPTQModel and llm-compressor: the same model, text and settings, on the same machine.

    python -m benchmarks.peers --write                       # what is not measured yet, then the table
    python -m benchmarks.peers --write --again maquette      # Maquette's own cells once more
    python -m benchmarks.peers --subject demo --task gptq-4 --peer gptqmodel

Each peer gets an environment of its own and each repetition a process of its own. Time is from the begin of loading
until the files are written, imports aside; memory is resident, its largest; perplexity and KL are measured by Maquette
on what each wrote (`products.py`). What was measured is kept in `.cache/peers/cells`, so that a run goes on where
another stopped.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.decode import priority
from benchmarks.peers import environments, products, subjects, watch
from benchmarks.peers.environments import CACHE, PACKAGES
from benchmarks.sections import README, ROOT, by_processor, write_section
from engine import hardware
from engine.wide import multiplies_bfloat16

OURS = "maquette"
PEERS = ("gptqmodel", "llmcompressor", OURS)
TASKS = {
    "gptq-4": ("GPTQ W4 g128", PEERS),
    "gptq-3": ("GPTQ W3 g128", PEERS),
    "awq-4": ("AWQ W4 g128", PEERS[1:]),
    "awq-4-asymmetric": ("AWQ W4 g128, asymmetric", PEERS[1:]),
    "w8a8": ("SmoothQuant W8A8", PEERS[1:]),
}
# What the others load the bfloat16 checkpoint in: the faster of the two for them. Maquette chooses by itself.
DTYPE = "bfloat16" if multiplies_bfloat16("cpu") else "float32"
Cell = dict[str, object]

log = logging.getLogger("peers")


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into benchmarks/README.md")
    parser.add_argument("--again", action="append", default=[], choices=PEERS, help="measure a peer once more")
    parser.add_argument("--subject", action="append", choices=tuple(subjects.TITLES), help="only this model")
    parser.add_argument("--task", action="append", choices=tuple(TASKS), help="only this method")
    parser.add_argument("--peer", action="append", choices=PEERS, help="only this peer")
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    for subject in options.subject or subjects.TITLES:
        for task in options.task or TASKS:
            for peer in TASKS[task][1]:
                if not options.peer or peer in options.peer:
                    if peer in options.again:
                        cell_file(subject, task, peer).unlink(missing_ok=True)
                    measure(subject, task, peer, options.repetitions)
    text = report()
    log.info("%s", text)
    if options.write:
        write_section(README, by_processor("peers"), text)


def cell_file(subject: str, task: str, peer: str) -> Path:
    """Where a cell's results are kept."""
    return CACHE / "cells" / f"{subject}.{task}.{peer}.json"


def measure(subject: str, task: str, peer: str, repetitions: int) -> None:
    """Bring one cell to so many repetitions; its fidelity is measured on the first."""
    file = cell_file(subject, task, peer)
    cell: Cell = json.loads(file.read_text()) if file.exists() else {"runs": [], "fidelity": {}}
    runs, name = cell["runs"], f"{subject}.{task}.{peer}"
    assert isinstance(runs, list)
    out = CACHE / "products" / name
    for number in range(len(runs), repetitions):
        shutil.rmtree(out, ignore_errors=True)
        if peer == OURS:
            out.mkdir(parents=True)
        script = (
            ["-m", "benchmarks.peers.by_maquette"] if peer == OURS else [str(Path(__file__).parent / f"by_{peer}.py")]
        )
        asked = {
            "model": str(subjects.folder(subject)), "dtype": DTYPE, "rows": str(subjects.rows()), "task": task,
            "out": str(out),
        }  # fmt: skip
        folder = ROOT if peer == OURS else CACHE  # where peers leave logs of their own
        said = CACHE / "logs" / f"{name}.{number}.log"
        found = watch.run([str(environments.python(peer)), *script], asked, folder, said)
        runs.append(asdict(found))
        log.info("%s: %.1f s, %.2f GiB", name, found.seconds, found.peak / 2**30)
        if number == 0:
            cell["fidelity"] = fidelity(out / "artifact" if peer == OURS else out, subjects.folder(subject))
        cell |= {"machine": hardware.machine(), "priority": priority(), "day": time.strftime("%Y-%m-%d")}
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(cell, indent=2))
    shutil.rmtree(out, ignore_errors=True)


def fidelity(product: Path, original: Path) -> dict[str, tuple[float, float]]:
    """Perplexity and KL to the original with their standard errors, of what a peer wrote."""
    dense = CACHE / "products" / "dense"
    folder = products.measurable(product, original, dense)
    command = [
        sys.executable, "-m", "engine", "measure", str(folder), "--measure", "perplexity,divergence",
        "--baseline", str(original), "--device", "cpu", "--json",
    ]  # fmt: skip
    said = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    shutil.rmtree(dense, ignore_errors=True)
    found = {m["name"]: (m["value"], m["error"]) for m in json.loads(said.splitlines()[-1])["measurements"]}
    return {name: found[name] for name in ("perplexity", "kl")}


def report() -> str:
    """The tables in Markdown, of all cells that are measured."""
    cells = {file.stem: json.loads(file.read_text()) for file in sorted((CACHE / "cells").glob("*.json"))}
    versions = ", ".join(PACKAGES[peer][0] for peer in PEERS if peer != OURS)
    about = (
        f"{versions}; {hardware.machine()}; torch {torch.__version__}. {subjects.SAMPLES} rows of {subjects.LENGTH} "
        f"tokens, the same ids for all; the others load the weights in {DTYPE}; symmetric unless said; what is not "
        "named is each library's default. Time is from loading to saved, median (least to most); memory is resident, "
        "its largest; KL to the original in nat, ± one standard error."
    )
    parts = [about + next((str(cell["priority"]) for cell in cells.values() if cell["priority"]), "")]
    head = ["| method | by | runs | seconds | peak, GiB | perplexity | KL |", "|---|---|---:|---:|---:|---:|---:|"]
    for subject, title in subjects.TITLES.items():
        lines = []
        for task, (name, peers) in TASKS.items():
            lines += [row(name, peer, cells[key]) for peer in peers if (key := f"{subject}.{task}.{peer}") in cells]
        parts += ["", f"On {title}:", "", *head, *lines] if lines else []
    return "\n".join(parts)


def row(name: str, peer: str, cell: Cell) -> str:
    """One line of a table."""
    runs, found = cell["runs"], cell["fidelity"]
    assert isinstance(runs, list)
    assert isinstance(found, dict)
    seconds = sorted(run["seconds"] for run in runs)
    spread = f"{statistics.median(seconds):.1f} ({seconds[0]:.1f} to {seconds[-1]:.1f})"
    peak = max(run["peak"] for run in runs) / 2**30
    (perplexity, _), (kl, error) = found["perplexity"], found["kl"]
    return f"| {name} | {peer} | {len(seconds)} | {spread} | {peak:.2f} | {perplexity:.4g} | {kl:.3g} ± {error:.1g} |"


if __name__ == "__main__":
    main()
